"""The denoiser's inputs on the way of the dense pipeline, recorded once, and its output error on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import CallRows
from obsdiff.models.wiring import denoiser_of
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.trajectories import counted_calls, noise_seeds, run_trajectories

CHOICE = 4  # calls recorded for each one that is used, so that prompts and steps mix
BATCH_ROWS = 64  # rows of one denoiser call


@dataclass(frozen=True)
class Probe:
    """Recorded calls of the denoiser.

    Attributes:
        rows: Per (latent, step, prompt) triple the keyword arguments of the call; tensors keep only the triple's rows:
            one, or with guidance two, the negative prompt's first (:class:`obsdiff.models.rows.CallRows`).
        weights: Timestep weight α_t of each triple.
        guidance: The pipeline's guidance scale.
        recorded: Calls of the denoiser, one prompt each, that recording took.
    """

    rows: list[dict[str, Any]]
    weights: list[float]
    guidance: float = 1.0
    recorded: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Keyword arguments of joint calls of about ``size`` rows, and each triple's weight (triples,) float64.

        Calls of different kinds (guidance switched off for a part of the steps) are not joined.
        """
        kinds: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            kinds.setdefault(_kind(row), []).append(i)
        for members in kinds.values():
            step = max(1, size // _rows_of(self.rows[members[0]]))
            for start in range(0, len(members), step):
                part = [self.rows[i] for i in members[start : start + step]]
                arguments = {
                    key: torch.cat([row[key] for row in part]) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in part[0].items()
                }
                weights = [self.weights[i] for i in members[start : start + step]]
                yield arguments, torch.tensor(weights, dtype=torch.float64)

    def guided(self, output: Tensor, triples: int) -> Tensor:
        """What a sampler makes of an output (rows, ...): with guidance ``n + g (p − n)``, float64 (triples, …).

        Errors of the two rows largely cancel or add up in it; going by it halves the image error of an allocation
        (docs/method.md).
        """
        rows = output.double().unflatten(0, (triples, -1))
        negative, positive = rows[:, 0], rows[:, -1]
        return negative + self.guidance * (positive - negative) if rows.shape[1] == 2 else positive


def _kind(arguments: dict[str, Any]) -> str:
    """Equal for calls that can be joined: their rows, and whatever is common to all rows."""
    return repr(
        [
            (key, tuple(value.shape), value.item() if value.dim() == 0 else None)
            if isinstance(value, Tensor)
            else (key, value)
            for key, value in arguments.items()
        ]
    )


def _rows_of(arguments: dict[str, Any]) -> int:
    return next(len(value) for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 1)


@torch.no_grad()
def record_probe(pipe: Any, conditioning: Conditioning, settings: Settings, triples: int) -> Probe:
    """Run the pipeline over a few prompts and keep ``triples`` of the denoiser's calls, drawn at random.

    Args:
        pipe: The dense pipeline; run with its own sampler, not changed.
        conditioning: The calibration's prompts.
        settings: The calibration's settings; prompt i has the same noise here as there.
        triples: How many (latent, step, prompt) triples to keep; all that there are if there are fewer.
    """
    steps = int(settings.call.get("num_inference_steps") or 1)
    count = min(len(conditioning), max(1, -(-CHOICE * triples // steps)))
    chosen = Conditioning({name: tensor[:count] for name, tensor in conditioning.embeds.items()})
    rows: dict[tuple[int, int], tuple[dict[str, Any], float]] = {}  # by prompt and call, whatever the batches
    now = slice(0)

    def begin(part: slice) -> None:
        nonlocal now
        counter.restart()
        now = part
        checked.begin(part)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = checked.look(args, kwargs)
        if checked.repeated:  # an extra call within a step; what it adds is not in the guided output
            return
        weight = timestep_weights(settings.weighting, counter.total)[counter.index]
        prompts = now.stop - now.start
        total = checked.each * prompts
        for key, value in given.items():
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) != total:
                raise UserError(
                    f"the denoiser's {key} has {len(value)} rows in a call of {total}; the scan needs one each"
                )
        for i in range(prompts):  # with guidance, prompt i has rows i and prompts + i
            at = list(range(i, total, prompts))
            own = {k: v[at] if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in given.items()}
            rows[now.start + i, counter.calls] = own, float(weight)

    checked = CallRows(pipe, chosen)
    with eval_mode(pipe), counted_calls(pipe) as counter:
        handle = denoiser_of(pipe).register_forward_pre_hook(record, with_kwargs=True)
        try:
            seeds = noise_seeds(settings.seed, len(conditioning))[:count]
            for _ in run_trajectories(pipe, chosen, seeds, settings.batch_size, settings.call, begin):
                pass
        finally:
            handle.remove()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
    keys = sorted(rows)
    picked = [rows[keys[i]] for i in sorted(order[:triples].tolist())]
    guidance = float(settings.call.get("guidance_scale") or 1.0)
    return Probe([arguments for arguments, _ in picked], [weight for _, weight in picked], guidance, len(rows))


def power(outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> float:
    """``Σ α_t ‖output‖²`` over batches of outputs (triples, ...) and weights (triples,)."""
    return sum(
        float((w * output.square().flatten(1).sum(1).cpu()).sum()) for output, w in zip(outputs, weights, strict=True)
    )
