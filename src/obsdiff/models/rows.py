"""Which rows of a denoiser call belong to which prompt: checked against what the call is told, never assumed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.families import find_family
from obsdiff.models.wiring import denoiser_of

NEGATIVE = "negative_"


class CallRows:
    """The rows of each denoiser call of a pipeline: one per prompt, or with guidance the negative prompts' first.

    Attributes:
        each: Rows per prompt of the latest call, 1 or 2.
        repeated: Whether the latest call was given the same latents at the same time as the one before: an extra call
            within a step, such as that of skip-layer guidance.
    """

    def __init__(self, pipe: Any, conditioning: Conditioning) -> None:
        self.kind = type(pipe).__name__
        self.conditioning = conditioning
        self.denoiser = denoiser_of(pipe)
        self.family = find_family(self.denoiser)
        self.each, self.repeated = 1, False
        self._part = slice(0)
        self._latest: tuple[Tensor, Tensor] | None = None
        self._told: dict[tuple[str, int], Tensor] = {}

    def begin(self, part: slice) -> None:
        """The prompts ``part`` come next."""
        self._part, self._latest = part, None
        self._told.clear()

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of a call, and give its arguments by name.

        Raises:
            UserError: Its rows are neither the prompts nor the negative prompts and the prompts.
        """
        given = arguments_of(self.denoiser, args, kwargs)
        sample, time = given[self.family.sample], given[self.family.time]
        prompts = self._part.stop - self._part.start
        self.each, left = divmod(len(sample), prompts)
        if left or self.each not in (1, 2):
            raise UserError(
                f"{self.kind} calls its denoiser with {len(sample)} rows for {prompts} prompts; known are one row per "
                f"prompt, or two (negative prompt, prompt). {self._advice()}"
            )
        for argument, name in self.family.conditions:
            expected, told = self._expected(name, given[argument]), given[argument]
            if expected is None or expected.shape != told.shape or not torch.equal(expected, told):
                raise UserError(
                    f"{self.kind} calls its denoiser with rows that are not "
                    f"{'the prompts' if self.each == 1 else 'the negative prompts, then the prompts'} ({argument} "
                    f"is not made of {name}). {self._advice()}"
                )
        now = sample.detach(), torch.as_tensor(time).detach()
        self.repeated = self._latest is not None and all(map(_equal, now, self._latest, [prompts] * 2))
        self._latest = now
        return given

    def _expected(self, name: str, like: Tensor) -> Tensor | None:
        """What the rows of a call must be told, kept for the calls that follow; None if the embeds are not there."""
        key = (name, self.each)
        if key not in self._told:
            embeds = self.conditioning.embeds
            parts = [embeds[key][self._part] for key in (NEGATIVE + name, name)[-self.each :] if key in embeds]
            if len(parts) < self.each:
                return None
            self._told[key] = torch.cat(parts).to(like)
        return self._told[key]

    def _advice(self) -> str:
        return "Measure with the family's plain pipeline, made of the same parts (its from_pipe(pipe))"


def _equal(now: Tensor, before: Tensor, prompts: int) -> bool:
    """Whether the prompts' own rows, which come last, are the same."""
    a, b = (tensor[-prompts:] if tensor.dim() else tensor for tensor in (now, before))
    return torch.equal(a, b)


def arguments_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the denoiser's signature."""
    if not args:
        return dict(kwargs)
    return dict(inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments)
