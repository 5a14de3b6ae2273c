"""What was tried in place of what is built, so that its figures can be had again (docs/results.md):
``python -m obsdiff.bench.alternatives maps --output maps.json``, or ``residuals``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import obsdiff
from obsdiff.allocation.stage import prune_stage
from obsdiff.compare.intervals import mean_interval, ratio_interval
from obsdiff.errors import UserError
from obsdiff.evaluation.prompts import evaluation_prompts
from obsdiff.evaluation.sampling import sample
from obsdiff.files import check_writable, write_json
from obsdiff.models.modes import eval_mode
from obsdiff.models.replay import MadeCall, answering, stopping
from obsdiff.models.subject import subject_of
from obsdiff.obs.hessian import Gram
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.stream import stream
from obsdiff.versions import versions

PIPELINE, PROMPTS, BATCH = "digits-sd3", 100, 50
IMAGES, FIRST_SEED = 100, 1000  # noise seeds 1000, 2000, ... of the seeds 0, 1, ...
RIDGE = 1e-6  # of maps, on the mean of the diagonal
RANK, KEPT = 4, (0.5, 0.3, 0.2)  # of residuals, and of the weights that they are added to
Errors = dict[tuple[str, str], list[Tensor]]  # squared errors of the images (n,) by seed; by size, and by way: the
# first way of each size is what the others are compared with


# ---- a linear map where a block was removed


class Map(nn.Module):
    """In place of a block with two streams: each gets a linear map of itself added."""

    def __init__(self, image: nn.Linear, text: nn.Linear) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states + self.text(encoder_hidden_states), hidden_states + self.image(hidden_states)


def fitted(inputs: Tensor, outputs: Tensor) -> nn.Linear:
    """The least squares of outputs (n, r) on inputs (n, c) and a constant."""
    x = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).double()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, x.T @ outputs.double()).float()
    layer = nn.Linear(inputs.shape[1], outputs.shape[1])
    layer.weight.data, layer.bias.data = solved[:-1].T.contiguous(), solved[-1].clone()
    return layer


def maps(seed: int) -> Errors:
    """Images without 1, 2, 3 blocks, with maps in their places, and with each map fitted behind the ones before it."""
    found: Errors = {}
    calls = recorded(seed)
    for count in (1, 2, 3):
        dropped = obsdiff.load_pipeline(PIPELINE)
        asked = PruningOptions(pattern=f"depth:{count}", seed=seed)
        removed = prune_stage(dropped, asked, told_to_calibrate(seed)).plan.removed
        found[f"{count} of 6 blocks", "dropped"] = [errors(dropped, seed)]
        dense = obsdiff.load_pipeline(PIPELINE).transformer
        wanted = {name: streams(dense, name, calls) for name in removed}
        for behind in (False, True):
            pipe = obsdiff.load_pipeline(PIPELINE)
            for name in sorted(removed, key=subject_of(pipe).graph.stages.index):
                seen = streams(pipe.transformer, name, calls)[0] if behind else wanted[name][0]
                made = [fitted(x, y - x) for x, y in zip(seen, wanted[name][1], strict=True)]
                owner, _, child = name.rpartition(".")
                pipe.transformer.get_submodule(owner)[int(child)] = Map(*made)
            way = "mapped, one behind the other" if behind else "mapped"
            found[f"{count} of 6 blocks", way] = [errors(pipe, seed)]
    return found


def streams(denoiser: nn.Module, name: str, calls: Sequence[MadeCall]) -> tuple[list[Tensor], list[Tensor]]:
    """What a block is given in all calls, and what it makes of it: image and text tokens, (n, width) each."""
    given: list[list[Tensor]] = [[], []]
    made: list[list[Tensor]] = [[], []]

    def see(_: nn.Module, __: Any, kwargs: dict[str, Any], answer: tuple[Tensor, Tensor]) -> None:
        for at, stream_of in enumerate(("hidden_states", "encoder_hidden_states")):
            given[at].append(kwargs[stream_of].flatten(0, 1))
            made[at].append(answer[1 - at].flatten(0, 1))

    block = denoiser.get_submodule(name)
    handle = block.register_forward_hook(see, with_kwargs=True)
    try:
        run(denoiser, calls, block)
    finally:
        handle.remove()
    return [torch.cat(parts) for parts in given], [torch.cat(parts) for parts in made]


# ---- a low rank beside the single weights that stay


def residual(lost: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Of what a weight lost (r, c) the part of that rank which leaves least of ``E‖(lost - part) x‖²``."""
    values, vectors = torch.linalg.eigh(covariance.double())
    root = values.clamp_min(values[-1] * 1e-10).sqrt()
    u, s, v = torch.linalg.svd((lost.double() @ vectors) * root, full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ (v[:rank] / root) @ vectors.T).to(lost.dtype)


@torch.no_grad()
def residuals(seed: int) -> Errors:
    """Images of single weights alone, and of fewer with a low rank beside them, at the same number of numbers."""
    found: Errors = {}
    statistics = calibrated(seed)
    for kept in KEPT:
        dense, pipe, alone = (obsdiff.load_pipeline(PIPELINE) for _ in range(3))
        graph = subject_of(pipe).graph
        layers = list(obsdiff.prune(pipe, f"unstructured:{1 - kept:g}", statistics=statistics).layer_error)
        weights = [graph.weight(layer) for layer in layers]
        share = RANK * sum(sum(weight.shape) for weight in weights) / sum(weight.numel() for weight in weights)
        size = f"{kept + share:.1%} of the weights"
        obsdiff.prune(alone, f"unstructured:{1 - kept - share:.6f}", statistics=statistics)
        found[size, "sparse alone"] = [errors(alone, seed)]
        found[size, f"{kept:.0%} alone"] = [errors(pipe, seed)]
        for layer, weight in zip(layers, weights, strict=True):
            site = statistics.site(graph.site_of[layer].name)
            assert isinstance(site, Gram)
            part = residual(dense.transformer.get_parameter(f"{layer}.weight") - weight, site.covariance(), RANK)
            weight += part
            if isinstance(bias := graph.layer(layer).bias, Tensor):
                bias -= part @ site.mean().float()
        found[size, f"{kept:.0%} and rank {RANK}"] = [errors(pipe, seed)]
    return found


# ---- what all of them need


def told_to_calibrate(seed: int) -> list[str]:
    """The calibration's prompts."""
    return obsdiff.load_prompts("digits-train", num=PROMPTS, seed=seed)


def recorded(seed: int) -> Sequence[MadeCall]:
    """The dense denoiser's calls along the calibration's way."""
    return stream(obsdiff.load_pipeline(PIPELINE), told_to_calibrate(seed), batch_size=BATCH, seed=seed).record()


def calibrated(seed: int) -> Statistics:
    """The statistics that patterns are solved with."""
    return obsdiff.calibrate(obsdiff.load_pipeline(PIPELINE), told_to_calibrate(seed), batch_size=BATCH, seed=seed)


@torch.no_grad()
def run(denoiser: nn.Module, calls: Sequence[MadeCall], last: nn.Module) -> None:
    """Make calls again by another denoiser, each until ``last`` has run."""
    with eval_mode(denoiser), answering(denoiser, ()) as replay, stopping(last):
        for call in calls:
            replay.run(replace(call, model=denoiser))


def errors(pipe: Any, seed: int) -> Tensor:
    """Mean squared errors of a pipeline's images to those of the dense one, on held-out prompts, (n,)."""
    return (drawn(pipe, seed) - dense_images(seed)).square().flatten(1).mean(1)


def drawn(pipe: Any, seed: int) -> Tensor:
    """A pipeline's images, float64."""
    first = FIRST_SEED * (seed + 1)
    prompts = evaluation_prompts(pipe, EvaluationOptions(num_images=IMAGES, seed=first), CalibrationOptions())
    return sample(pipe, prompts, list(range(first, first + IMAGES)), batch_size=BATCH).double()


@cache
def dense_images(seed: int) -> Tensor:
    """Those of the dense pipeline."""
    return drawn(obsdiff.load_pipeline(PIPELINE), seed)


def told(found: Errors) -> list[dict[str, Any]]:
    """For JSON: means with intervals that draw seeds and then images again, means by seed, and the ratio to the first
    way of the same size, in pairs."""
    first: dict[str, list[Tensor]] = {}
    rows = []
    for (size, way), values in found.items():
        others = first.setdefault(size, values)
        ratio = None if others is values else ratio_interval(values, others)
        by_seed = [float(value.mean()) for value in values]
        row = {"size": size, "way": way, "mse": asdict(mean_interval(values)), "by_seed": by_seed}
        rows.append({**row, "ratio": None if ratio is None else asdict(ratio)})
    return rows


WAYS: dict[str, Callable[[int], Errors]] = {"maps": maps, "residuals": residuals}


def main(args: list[str] | None = None) -> None:
    """The command line; exit code 2 for anything the user can mend."""
    parser = argparse.ArgumentParser(description="Measure what was tried in place of what is built, on digits-sd3.")
    parser.add_argument("what", choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibrations and noise")
    parser.add_argument("--output", type=Path, required=True, help="JSON file that receives the figures")
    options = parser.parse_args(args)
    try:
        check_writable(options.output.parent)
        found: Errors = {}
        for seed in options.seeds:
            for what, values in WAYS[options.what](seed).items():
                found.setdefault(what, []).extend(values)
                print(f"seed {seed}, {', '.join(what)}: {float(values[0].mean()):.3g}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"alternatives: {error}", file=sys.stderr)
        sys.exit(2)
    settings = {"pipeline": PIPELINE, "prompts": PROMPTS, "images": IMAGES, "seeds": options.seeds}
    write_json(options.output, {**settings, "versions": versions(), "found": told(found)})


if __name__ == "__main__":
    main()
