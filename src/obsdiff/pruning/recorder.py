"""What a denoiser is given and answers while its pipeline runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.calling import paths_of, split_call, stacked
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.rows import NEGATIVE, CallRows
from obsdiff.models.subject import Subject


class Recorder:
    """What the denoiser is given as the pipeline runs, and what it answers, call by call.

    Attributes:
        seen: Of the batch that runs: latents (rows, ...) on the CPU, the time it was told, and the number of the
            denoiser, of each call.
        heard: The answers (rows, ...) on the CPU to each call: "" of the prompts themselves, "negative_" of the others.
        common: What it is told in all rows.
        rows_each: Rows per prompt in each call.
    """

    def __init__(self, subject: Subject, conditioning: Conditioning) -> None:
        self.family = subject.family
        self.seen: list[tuple[Tensor, Tensor, int]] = []
        self.heard: list[dict[str, Tensor]] = []
        self.common: dict[str, Any] = {}
        self.rows_each = 1
        self._told: list[dict[str, Tensor]] = []
        self._paths = paths_of(subject.pipe, conditioning)
        self._rows = CallRows(subject.pipe, subject.family, conditioning)
        self._numbers = {id(model): number for number, model in enumerate(subject.components.values())}

    def begin(self, part: slice) -> None:
        """A new batch of prompts comes."""
        self.seen.clear()
        self.heard.clear()
        self._rows.begin(part)

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called."""
        rows, family = self._rows, self.family
        given = rows.look(model, args, kwargs)
        if rows.repeated:  # the negative prompt's own call, or skip-layer guidance: the same latents again
            if len(self.seen) == 1 and family.guidance == "calls":
                negative, _ = split_call(rows, given, self._paths)
                self._told[-1] |= {NEGATIVE + name: tensor for name, tensor in negative.items()}
            return
        if not self.seen:
            found, self.common = split_call(rows, given, self._paths)
            self._told.append(found)
            self.rows_each = rows.each
        time = torch.as_tensor(given[family.time])
        sample = given[family.sample]
        own = torch.stack(sample[rows.own]) if family.listed else sample[rows.own]
        one = time[:1] if time.dim() > 1 else time.reshape(-1)[:1]  # a time for each token, or for each row
        self.seen.append((own.cpu(), one.float().cpu(), self._numbers[id(model)]))

    def hear(self, model: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        """The denoiser has answered the call that was seen last."""
        rows, found = self._rows, answer[0]
        if isinstance(found, list):
            found = torch.stack(found)
        if rows.repeated:
            if self.family.guidance == "calls":
                self.heard[-1].setdefault(NEGATIVE, _kept(found))
            return
        self.heard.append({"": _kept(found[rows.own])})
        if rows.each == 2:
            self.heard[-1][NEGATIVE] = _kept(found[rows.negative])

    def embeds(self) -> dict[str, Tensor]:
        """What the denoiser is told of every prompt so far, by its own argument (prompts, ...)."""
        return {name: stacked([part[name] for part in self._told]) for name in self._told[0]}


def _kept(answer: Tensor) -> Tensor:
    """A copy: the pipeline may write into its own."""
    return answer.detach().to("cpu", copy=True)
