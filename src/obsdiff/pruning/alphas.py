"""Timestep weights found out on the model: how far an error of its answer at each step moves the image.

The published weights (:mod:`obsdiff.obs.timesteps`) are a guess at that; weights that adapt to the model are the
outlook of OBS-Diff (2510.06751). Here ``α_t = ‖x₀ − x₀(ε_t + δ)‖² / ‖δ‖²``: the pipeline runs over a few prompts with
the denoiser's answer at step t disturbed by noise δ of a hundredth of its size, the same for the prompt's and the
negative prompt's row, so that δ is what the guided answer is off by; x₀ are the final latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.modes import eval_mode
from obsdiff.models.subject import Subject
from obsdiff.obs.timesteps import MEASURED, listed_weights
from obsdiff.pruning.trajectories import CallCounter, counted_calls, noise_seeds, run_trajectories
from obsdiff.ranks import broadcast_numbers, keyed_generator

PROMPTS = 2
SIZE = 0.01  # of the disturbance, of the answer's root mean square


def named_weighting(
    subject: Subject, prompts: Sequence[str] | Conditioning, weighting: str, call: Mapping[str, Any], seed: int
) -> str:
    """The weighting itself, or where it is to be measured the weights as a list.

    Args:
        subject: The dense pipeline.
        prompts: Of the calibration; the first few are used.
        weighting: As for :func:`obsdiff.obs.timesteps.timestep_weights`, or "measured".
        call: All the pipeline's call arguments.
        seed: Of the noise.

    Raises:
        UserError: The final latents are not finite, or do not move.
    """
    if weighting != MEASURED:
        return weighting
    few = prompts[:PROMPTS]
    told = few if isinstance(few, Conditioning) else encode_prompts(subject.pipe, few, call)
    alphas = measured_alphas(subject, told, call, seed)
    return listed_weights(broadcast_numbers(alphas, subject.pipe._execution_device))


def calls_for(steps: int) -> int:
    """Denoiser calls with one prompt each that measuring takes."""
    return PROMPTS * steps * (steps + 1)


@torch.no_grad()
def measured_alphas(subject: Subject, told: Conditioning, call: Mapping[str, Any], seed: int) -> list[float]:
    """``α_t`` by step, up to a factor.

    Raises:
        UserError: The final latents are not finite, or do not move.
    """
    seeds = noise_seeds(seed, len(told))

    def run(step: int | None) -> tuple[Tensor, float, int]:
        with counted_calls(subject) as counter, _disturbed(subject, counter, step, len(told), seed) as noise:
            [(_, latents)] = run_trajectories(subject, told, seeds, len(told), call)
        return latents.double(), sum(float(of.double().square().sum()) for of in noise), counter.total

    with eval_mode(subject.pipe):
        dense, _, steps = run(None)
        alphas = []
        for step in range(steps):
            latents, size, _ = run(step)
            alphas.append(float((latents - dense).square().sum()) / size if size else 0.0)
    if not all(0 < alpha < float("inf") for alpha in alphas):
        raise UserError(
            "timestep weights cannot be measured: the final latents are not finite or do not depend on every step; "
            "name a weighting, such as log_decrease"
        )
    return alphas


@contextmanager
def _disturbed(
    subject: Subject, counter: CallCounter, step: int | None, prompts: int, seed: int
) -> Iterator[list[Tensor]]:
    """Noise on the denoiser's answers at one step (None: none), one row for each prompt; it stands in the list then."""
    found: list[Tensor] = []

    def disturb(_: nn.Module, __: Any, answer: Any) -> Any:
        if counter.index != step:
            return None
        if isinstance(answer, tuple):
            return (off(answer[0]), *answer[1:])
        return type(answer)(sample=off(answer.sample))

    def off(value: Any) -> Any:
        rows = torch.stack(value) if isinstance(value, list) else value
        if not found:  # a second call at the step, such as a negative prompt's own, has the same
            noise = torch.randn((prompts, *rows.shape[1:]), generator=keyed_generator(seed, int(counter.index)))
            found.append(noise.to(rows) * SIZE * rows.square().mean().sqrt())
        changed = rows + torch.cat(found * (len(rows) // prompts))
        return list(changed) if isinstance(value, list) else changed

    handles = [model.register_forward_hook(disturb) for model in subject.components.values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
