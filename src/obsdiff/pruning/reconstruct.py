"""Reconstruction: one stage after the other is trained to give what the dense stage gives, before anything else is.

Stage s reads what the pruned stages before it make of a recorded call, x̂, and its kept weights are trained by Adam to
minimise ``Σ_k ‖f̂_s(x̂)_k − f_s(x)_k‖² / ‖f_s(x)_k‖²`` over the tensors k that the stage gives, f_s(x) being the dense
stage on dense inputs: errors of earlier stages are taken up where they can be (BRECQ, 2102.05426, and block-wise
tuning of pruned language models, EBFT 2402.12419, with the pruned prefix as the source of inputs). What was pruned
stays pruned.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.diffusion.distill import feature_loss
from obsdiff.models.content import component_hash, tensor_bytes
from obsdiff.models.denoisers import parts_of
from obsdiff.models.modes import eval_mode
from obsdiff.models.nested import copied_to, each_tensor, tensors_in
from obsdiff.progress import track
from obsdiff.pruning.finished import Finished, StageError
from obsdiff.pruning.masks import apply_masks
from obsdiff.pruning.options import ReconstructionOptions

HELD_OUT = 5  # every so many-th call is not trained on: it says whether training helped


@dataclass(frozen=True)
class Pair:
    """A pruned denoiser and the dense one.

    Attributes:
        pruned: Changed in place.
        dense: The same model before pruning.
        stages: Names of its blocks, in the order of execution, and what each was called in ``dense``.
        masks: Bool by layer (True = kept) of weights that stay zero elsewhere.
    """

    pruned: nn.Module
    dense: nn.Module
    stages: Mapping[str, str]
    masks: Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A recorded call of some rows.

    Attributes:
        denoiser: Of two denoisers, the name of the one that is asked; else "".
        arguments: By name.
        rows: How many.
    """

    denoiser: str
    arguments: Mapping[str, Any]
    rows: int


class _Stop(Exception):
    """The stage was seen; nothing behind it has to run."""


def reconstruct(
    models: Pair,
    calls: Sequence[Call],
    options: ReconstructionOptions,
    *,
    seed: int = 0,
    store: Path | None = None,
    quiet: bool = True,
) -> dict[str, StageError]:
    """Train the stages of a pruned denoiser in their order, in place.

    A stage whose error on held-out calls does not fall keeps its weights.

    Args:
        models: The pruned denoiser, and what it is to be like.
        calls: Recorded along the dense pipeline's way, at least two.
        options: Steps of Adam for each stage, one call each, and their learning rate.
        seed: Of the order of the calls.
        store: Folder to keep finished stages in; those that it holds of the same models, calls and settings are not
            trained again.
        quiet: No progress bar.

    Returns:
        By stage, its error before and after.
    """
    held = calls[::HELD_OUT]
    seen = [call for at, call in enumerate(calls) if at % HELD_OUT]
    denoiser, dense, stages = models.pruned, models.dense, models.stages
    finished = None if store is None else Finished(store, _key(models, calls, options, seed), list(stages))
    found = {}
    with eval_mode(denoiser), eval_mode(dense):
        for name, before in track(stages.items(), len(stages), "reconstructing", quiet):
            own, like = denoiser.get_submodule(name), dense.get_submodule(before)
            if finished is not None and (error := finished.load(name, own)) is not None:
                found[name] = error
                continue
            started = time.perf_counter()
            examples, checks = (
                [example for call in part if (example := _example(denoiser, own, dense, like, call)) is not None]
                for part in (seen, held)
            )
            if examples and checks:  # of two denoisers, a stage answers the calls of its own
                inside = {layer: mask for layer, mask in models.masks.items() if f"{layer}.".startswith(f"{name}.")}
                error = _train(denoiser, own, examples, checks, inside, options, seed)
                found[name] = replace(error, time_s=time.perf_counter() - started)
                if finished is not None:
                    finished.save(name, own, found[name])
    return found


def _key(models: Pair, calls: Sequence[Call], options: ReconstructionOptions, seed: int) -> str:
    """SHA-256 of all that the stages' weights depend on."""
    hashes = [[component_hash(part) for part in parts_of(model).values()] for model in (models.pruned, models.dense)]
    digest = hashlib.sha256(json.dumps([hashes, dict(models.stages), asdict(options), seed]).encode())

    def add(tensor: Tensor) -> str:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
        return ""

    for name, mask in sorted(models.masks.items()):
        digest.update(name.encode())
        add(mask)
    for call in calls:  # what is no tensor in the arguments, and the names of all
        digest.update(repr((call.denoiser, call.rows, each_tensor(dict(call.arguments), add))).encode())
    return digest.hexdigest()


Example = tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]


def _example(denoiser: nn.Module, own: nn.Module, dense: nn.Module, like: nn.Module, call: Call) -> Example | None:
    """What a stage is given by the pruned prefix, and what it should answer; None if the call does not pass it."""
    given = _seen(denoiser, own, call)
    wanted = _seen(dense, like, call)
    return None if given is None or wanted is None else (given[0], given[1], list(tensors_in(wanted[2])))


@torch.no_grad()
def _seen(model: nn.Module, stage: nn.Module, call: Call) -> tuple[tuple[Any, ...], dict[str, Any], Any] | None:
    """Arguments and answer of a stage in a call."""
    found: list[Any] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        # a copy: a stage may write into its input's memory, and so may those behind it
        found.append((copied_to(args, "cpu"), copied_to(kwargs, "cpu"), copied_to(answer, "cpu")))
        raise _Stop

    handle = stage.register_forward_hook(look, with_kwargs=True)
    try:
        asked = model.get_submodule(call.denoiser) if call.denoiser else model
        asked(**call.arguments)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def _train(
    denoiser: nn.Module,
    stage: nn.Module,
    examples: Sequence[Example],
    checks: Sequence[Example],
    masks: Mapping[str, Tensor],
    options: ReconstructionOptions,
    seed: int,
) -> StageError:
    before = _error(stage, checks)
    state = copy.deepcopy(stage.state_dict())
    trained = [parameter for parameter in stage.parameters() if parameter.is_floating_point()]
    weights: list[Tensor] = [denoiser.get_parameter(f"{layer}.weight") for layer in masks]
    factors = [mask.to(weight) for mask, weight in zip(masks.values(), weights, strict=True)]
    optimizer = torch.optim.Adam(trained, options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(seed)
    with _trainable(trained):
        for _ in range(options.steps):
            loss = _loss(stage, examples[int(torch.randint(len(examples), (), generator=generator))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                apply_masks(weights, factors)
    after = _error(stage, checks)
    if not after < before:
        stage.load_state_dict(state)
        after = before
    return StageError(before, after)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters, and as it was afterwards."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _loss(stage: nn.Module, example: Example) -> Tensor:
    """Of one call; examples wait in the host's memory."""
    device = next(stage.parameters()).device
    args, kwargs, wanted = each_tensor(example, lambda tensor: tensor.to(device))
    return feature_loss(list(tensors_in(stage(*args, **kwargs))), wanted, robust=False)


@torch.no_grad()
def _error(stage: nn.Module, examples: Sequence[Example]) -> float:
    return sum(float(_loss(stage, example)) for example in examples) / len(examples)
