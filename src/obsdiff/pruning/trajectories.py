"""Running the real pipeline over calibration prompts, seen call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.wiring import denoiser_of
from obsdiff.numbers import check_number, check_whole


class CallCounter:
    """Which denoising step the denoiser is in: ``index`` of ``total``, from 0, set before each of its calls.

    The pipeline's own scheduler tells the step where it can, so that second-order samplers (two calls a step) and
    extra calls within a step (skip-layer guidance) are counted right; otherwise calls are counted.
    """

    def __init__(self, pipe: Any) -> None:
        self.scheduler = pipe.scheduler
        self.calls = 0
        self.index = 0
        self.total = 1

    def restart(self) -> None:
        """Begin a new trajectory."""
        self.calls = 0

    def __call__(self, *_: object) -> None:
        """Advance; installed as a forward pre-hook of the denoiser."""
        step = getattr(self.scheduler, "step_index", None)
        first = self.calls == 0
        self.index = 0 if first else self.calls if step is None else int(step)
        self.total = max(len(self.scheduler.timesteps), self.index + 1)
        self.calls += 1


def noise_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """One seed per prompt, depending on its index alone: not on batch size or number of processes."""
    return [(seed * 1_000_003 + index) % 2**63 for index in range(first, first + count)]


def check_call(call: Mapping[str, Any]) -> None:
    """Refuse call arguments that no pipeline can run with.

    Raises:
        UserError: Steps, sizes or guidance are out of range.
    """
    names = {
        "num_inference_steps": "steps",
        "height": "height",
        "width": "width",
        "max_sequence_length": "max_sequence_length",
    }
    for key, name in names.items():
        if call.get(key) is not None:
            check_whole(name, call[key], 1)
    if call.get("guidance_scale") is not None:
        check_number("guidance_scale", call["guidance_scale"], 0.0)


@torch.no_grad()
def run_trajectories(
    pipe: Any,
    conditioning: Conditioning,
    seeds: Sequence[int],
    batch_size: int,
    call: Mapping[str, Any],
    before_batch: Callable[[slice], None] = lambda _: None,
) -> Iterator[tuple[slice, Tensor]]:
    """Denoise every prompt to its final latents, without decoding; yields each batch's slice and latents.

    Args:
        pipe: The pipeline, with its own sampler.
        conditioning: The encoded prompts.
        seeds: One noise seed per prompt.
        batch_size: Prompts per call of the pipeline.
        call: Its call arguments (steps, guidance, size).
        before_batch: Called with the slice of prompts that comes next.
    """
    device = pipe._execution_device
    arguments = {key: value for key, value in call.items() if value is not None}
    for start in range(0, len(conditioning), batch_size):
        part = slice(start, min(start + batch_size, len(conditioning)))
        before_batch(part)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        embeds = {name: tensor[part].to(device) for name, tensor in conditioning.embeds.items()}
        try:
            latents = pipe(**embeds, **arguments, generator=generators, output_type="latent").images
        except RuntimeError as error:
            own, given = denoiser_of(pipe).dtype, next(iter(embeds.values())).dtype
            if own == given:
                raise
            raise UserError(
                f"the denoiser is {own}, but the prompts' embeds are {given}; bring all parts of the pipeline to one "
                "dtype, such as pipe.to(torch.bfloat16)"
            ) from error
        yield part, latents


@contextmanager
def counted_calls(pipe: Any) -> Iterator[CallCounter]:
    """A :class:`CallCounter` on the pipeline's denoiser."""
    counter = CallCounter(pipe)
    handle = denoiser_of(pipe).register_forward_pre_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()
