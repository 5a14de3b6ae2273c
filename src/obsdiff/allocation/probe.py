"""The denoiser's inputs on the way of the dense pipeline, recorded once, and its output error on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.calling import paths_of
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import CallRows, Path, flattened, join_rows, take_rows
from obsdiff.models.subject import Subject
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.trajectories import counted_calls, noise_seeds, run_trajectories, seen_calls

CHOICE = 4  # calls recorded for each one that is used, so that prompts and steps mix
BATCH_ROWS = 64  # rows of one denoiser call


@dataclass(frozen=True)
class ProbeCall:
    """The rows of one (latent, step, prompt) triple in a recorded call: one, or with guidance two, the negative
    prompt's first (:class:`obsdiff.models.rows.CallRows`).

    Attributes:
        denoiser: Of two denoisers, the name of the one that is asked; else "".
        arguments: By name; what has an entry per row holds the triple's rows alone.
        weight: Timestep weight α_t.
        rows: How many.
    """

    denoiser: str
    arguments: dict[str, Any]
    weight: float
    rows: int


@dataclass(frozen=True)
class Probe:
    """Recorded calls of the denoiser.

    Attributes:
        calls: One per triple.
        paths: Arguments that have an entry per row (:func:`obsdiff.models.rows.row_paths`).
        guidance: The pipeline's guidance scale.
        recorded: Calls of the denoiser, one prompt each, that recording took.
    """

    calls: list[ProbeCall]
    paths: frozenset[Path] = frozenset()
    guidance: float = 1.0
    recorded: int = 0

    def __len__(self) -> int:
        return len(self.calls)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
        """Joint calls of about ``size`` rows: the denoiser's name, its arguments, and each triple's weight (triples,)
        float64.

        Calls of different kinds (guidance switched off for a part of the steps) are not joined.
        """
        kinds: dict[str, list[ProbeCall]] = {}
        for call in self.calls:
            kinds.setdefault(self._kind(call), []).append(call)
        for members in kinds.values():
            step = max(1, size // members[0].rows)
            for start in range(0, len(members), step):
                part = members[start : start + step]
                weights = torch.tensor([call.weight for call in part], dtype=torch.float64)
                yield part[0].denoiser, join_rows([call.arguments for call in part], self.paths), weights

    def _kind(self, call: ProbeCall) -> str:
        """Equal for calls that can be joined: their rows, and whatever is common to all rows."""
        return repr([call.denoiser, *((k, _looks(v, k in self.paths)) for k, v in flattened(call.arguments).items())])

    def guided(self, output: Tensor | list[Tensor], triples: int) -> Tensor:
        """What a sampler makes of an output (rows, ...): with guidance ``n + g (p − n)``, float64 (triples, …).

        Errors of the two rows largely cancel or add up in it; going by it halves the image error of an allocation
        (docs/method.md).
        """
        whole = torch.stack(output) if isinstance(output, list) else output
        rows = whole.double().unflatten(0, (triples, -1))
        negative, positive = rows[:, 0], rows[:, -1]
        return negative + self.guidance * (positive - negative) if rows.shape[1] == 2 else positive


def _looks(value: Any, by_row: bool) -> Any:
    """What an argument must have in common with those it is joined with: shapes, and of what rows share the values."""
    if isinstance(value, Tensor):
        shape = tuple(value.shape[1:] if by_row else value.shape)
        return (shape, len(value) if by_row else None, None if by_row else value.flatten().tolist())
    if isinstance(value, list | tuple):
        return [_looks(inner, False) if not by_row else "listed" for inner in value]
    return value


@torch.no_grad()
def record_probe(subject: Subject, conditioning: Conditioning, settings: Settings, triples: int) -> Probe:
    """Run the pipeline over a few prompts and keep ``triples`` of the denoiser's calls, drawn at random.

    Args:
        subject: The dense pipeline; run with its own sampler, not changed.
        conditioning: The calibration's prompts.
        settings: The calibration's settings; prompt i has the same noise here as there.
        triples: How many (latent, step, prompt) triples to keep; all that there are if there are fewer.
    """
    steps = int(settings.call.get("num_inference_steps") or 1)
    count = min(len(conditioning), max(1, -(-CHOICE * triples // steps)))
    chosen, pipe = replace(conditioning[:count], text_mask=None, negative_text_mask=None), subject.pipe
    calls: dict[tuple[int, int], ProbeCall] = {}  # by prompt and call, whatever the batches
    paths = paths_of(pipe, conditioning)
    names = {id(model): name if len(subject.components) > 1 else "" for name, model in subject.components.items()}
    now = slice(0)

    def begin(part: slice) -> None:
        nonlocal now
        counter.restart()
        now = part
        checked.begin(part)

    def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = checked.look(model, args, kwargs) | {"return_dict": False}
        if checked.repeated:  # an extra call within a step; what it adds is not in the guided output
            return
        weight = timestep_weights(settings.weighting, counter.total)[counter.index]
        prompts = now.stop - now.start
        total = checked.each * prompts
        for path, value in flattened(given).items():
            if path in paths and value is not None and len(value) != total:
                raise UserError(
                    f"the denoiser's {'.'.join(path)} has {len(value)} rows in a call of {total}; the scan needs one "
                    "each"
                )
        for i in range(prompts):
            own = take_rows(given, paths, checked.of_prompt(i))
            key = now.start + i, counter.calls
            calls[key] = ProbeCall(names[id(model)], own, float(weight), checked.each)

    checked = CallRows(pipe, subject.family, chosen)
    seeds = noise_seeds(settings.seed, len(conditioning))[:count]
    with eval_mode(pipe), counted_calls(subject) as counter, seen_calls(subject, record):
        for _ in run_trajectories(subject, chosen, seeds, settings.batch_size, settings.call, begin):
            pass
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(settings.seed))
    keys = sorted(calls)
    picked = [calls[keys[i]] for i in sorted(order[:triples].tolist())]
    scale = float(settings.call.get("guidance_scale") or 1.0) + subject.family.guidance_offset
    return Probe(picked, paths, scale, len(calls))


def power(outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> float:
    """``Σ α_t ‖output‖²`` over batches of outputs (triples, ...) and weights (triples,)."""
    return sum(
        float((w * output.square().flatten(1).sum(1).cpu()).sum()) for output, w in zip(outputs, weights, strict=True)
    )
