"""Running the real pipeline over calibration prompts, seen call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.calls import arguments_of
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import dtype_of
from obsdiff.models.subject import Subject
from obsdiff.models.texts import texts_kept
from obsdiff.numbers import check_number, check_whole


class CallCounter:
    """Which denoising step the denoiser is in: ``index`` of ``total``, from 0, set before each of its calls.

    The pipeline's own scheduler tells the step where it can, so that second-order samplers (two calls a step) and
    extra calls within a step (skip-layer guidance) are counted right; otherwise the times are counted that the denoiser
    is told, so that two calls at one time (a negative prompt of its own) are one step.
    """

    def __init__(self, pipe: Any, time: str) -> None:
        self.scheduler = pipe.scheduler
        self.time = time
        self.calls = 0
        self.index = 0
        self.total = 1
        self._times: list[Any] = []

    def restart(self) -> None:
        """Begin a new trajectory."""
        self.calls = 0
        self._times.clear()

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Advance; installed as a forward pre-hook of the denoiser."""
        step = getattr(self.scheduler, "step_index", None)
        if step is None:
            now = torch.as_tensor(arguments_of(denoiser, args, kwargs)[self.time]).flatten()[:1].tolist()
            if now not in self._times:
                self._times.append(now)
            step = self._times.index(now)
        self.index = 0 if self.calls == 0 else int(step)
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
    subject: Subject,
    conditioning: Conditioning,
    seeds: Sequence[int],
    batch_size: int,
    call: Mapping[str, Any],
    before_batch: Callable[[slice], None] = lambda _: None,
) -> Iterator[tuple[slice, Tensor]]:
    """Denoise every prompt to its final latents, without decoding; yields each batch's slice and latents.

    Args:
        subject: The pipeline, with its own sampler.
        conditioning: The encoded prompts.
        seeds: One noise seed per prompt.
        batch_size: Prompts per call of the pipeline.
        call: Its call arguments (steps, guidance, size).
        before_batch: Called with the slice of prompts that comes next.
    """
    pipe, output = subject.pipe, "latent" if subject.family.latents else "np"
    own, device = dtype_of(subject.denoiser), pipe._execution_device
    arguments = {key: value for key, value in call.items() if value is not None}
    for start in range(0, len(conditioning), batch_size):
        part = slice(start, min(start + batch_size, len(conditioning)))
        before_batch(part)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        told = conditioning[part].arguments(device)
        try:
            with texts_kept(pipe):
                latents = pipe(**told, **arguments, generator=generators, output_type=output, return_dict=False)[0]
        except RuntimeError as error:
            given = next((x.dtype for x in told.values() if isinstance(x, Tensor) and x.is_floating_point()), own)
            if own == given:
                raise
            raise UserError(
                f"the denoiser is {own}, but the prompts' embeds are {given}; bring all parts of the pipeline to one "
                "dtype, such as pipe.to(torch.bfloat16)"
            ) from error
        yield part, torch.as_tensor(latents)


@contextmanager
def counted_calls(subject: Subject) -> Iterator[CallCounter]:
    """A :class:`CallCounter` on the pipeline's denoiser."""
    counter = CallCounter(subject.pipe, subject.family.time)
    with seen_calls(subject, counter):
        yield counter


@contextmanager
def seen_calls(subject: Subject, see: Callable[..., Any], hear: Callable[..., Any] | None = None) -> Iterator[None]:
    """``see(denoiser, args, kwargs)`` before each call of a denoiser, ``hear(denoiser, args, answer)`` after it."""
    models = subject.components.values()
    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in models]
    handles += [m.register_forward_hook(hear) for m in models] if hear is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
