"""Calls of a denoiser made again, with what stages have answered put in their places.

So going through a model stage by stage costs two passes of it, whatever its depth. Nothing of its wiring is rebuilt:
what lies between the stages runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.denoisers import device_of, parts_of
from obsdiff.models.nested import copied_to, each_tensor, tensors_in
from obsdiff.spill import Spill, Spilled


@dataclass
class MadeCall:
    """A call as it was made, and what its stages have answered so far.

    Attributes:
        model: The denoiser, and
        prefix: of its stages' names: "" for a single one.
        arguments: By name.
        answers: By stage, on the host, or where they are in the file of ``spill``; of those that nothing will read any
            more, shapes alone (on the meta device).
        spill: Where answers wait; None: in memory.
    """

    model: nn.Module
    prefix: str
    arguments: dict[str, Any]
    answers: dict[str, Any] = field(default_factory=dict)
    spill: Spill | None = None

    def passes(self, stages: Collection[str]) -> bool:
        """Whether any of the stages is its denoiser's."""
        return any(stage.startswith(self.prefix) for stage in stages)

    def keep(self, stage: str, answer: Any) -> None:
        """Take what a stage has answered; who made it may go on writing into it."""
        self.answers[stage] = copied_to(answer, "cpu") if self.spill is None else each_tensor(answer, self.spill.put)

    def answered(self, stage: str, device: torch.device) -> Any:
        """What a stage has answered, on a device, to do with as one likes; of what was let go zeros, not to be written
        into."""

        def placed(kept: Tensor | Spilled) -> Tensor:
            if isinstance(kept, Spilled):
                assert self.spill is not None
                return self.spill.take(kept, device)
            if kept.is_meta:
                return torch.zeros((), dtype=kept.dtype, device=device).expand(kept.shape)
            return kept.to(device, copy=True)

        return each_tensor(self.answers[stage], placed, Tensor | Spilled)

    def forget(self, stages: Sequence[str], passing: Collection[str]) -> None:
        """Let answers go that only the stage behind them reads, where that has answered.

        Args:
            stages: In the order of execution.
            passing: From :func:`passing_stages`.
        """
        for before, after in pairwise(stages):
            if before in passing and before in self.answers and after in self.answers:
                self.answers[before] = each_tensor(self.answers[before], self._shape, Tensor | Spilled)

    def _shape(self, kept: Tensor | Spilled) -> Tensor:
        """Shape and dtype alone."""
        if isinstance(kept, Tensor):
            return kept.to("meta")
        assert self.spill is not None
        self.spill.release(kept)
        return kept.like


class Reached(Exception):
    """Raised by a hook: what was asked for has been seen, and nothing behind it has to run."""


class Replay:
    """Makes calls again; see :func:`answering`."""

    def __init__(self, stages: Sequence[str], passing: Collection[str]) -> None:
        self._stages, self._passing = stages, passing
        self._call: MadeCall | None = None

    def run(self, call: MadeCall) -> Any:
        """The denoiser's answer, or None if a hook has seen enough."""
        self._call = call
        try:
            return call.model(**copied_to(call.arguments, device_of(call.model)))
        except Reached:
            return None
        finally:
            self._call = None

    def answer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a stage's forward: what it has answered; or its answer, which is kept."""
        call = self._call
        assert call is not None
        if name not in call.answers:
            found = forward(*args, **kwargs)
            call.keep(name, found)
            if self._passing:
                call.forget(self._stages, self._passing)
            return found
        return call.answered(name, device_of(call.model))


@contextmanager
def answering(denoiser: nn.Module, stages: Sequence[str], passing: Collection[str] = ()) -> Iterator[Replay]:
    """Inside, the stages called so answer in replayed calls what they have answered there before; answers of those in
    ``passing`` are let go as in :meth:`MadeCall.forget`, as soon as they can be."""
    replay = Replay(stages, passing)
    modules: dict[str, Any] = {name: denoiser.get_submodule(name) for name in stages}
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = partial(replay.answer, name, module.forward)
        yield replay
    finally:
        for name, module in modules.items():
            if before[name] is None:
                del module.forward
            else:
                module.forward = before[name]


@contextmanager
def stopping(stage: nn.Module, *, before: bool = False) -> Iterator[None]:
    """Inside, replayed calls end when a stage has run, or when it is about to."""

    def stop(*_: object) -> None:
        raise Reached

    handle = stage.register_forward_pre_hook(stop) if before else stage.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def passing_stages(
    denoiser: nn.Module, stages: Sequence[str], chains: Collection[str], calls: Sequence[MadeCall]
) -> frozenset[str]:
    """Stages whose answers are read by the next one alone, and so need not be held once that has answered: of lists
    that run one after the other, those that may have answered anything without a change in what the denoiser makes of
    the answer of the last. All behind the list runs for that: a UNet reads answers of its way down on its way up.

    Args:
        denoiser: The model, or both.
        stages: In the order of execution.
        chains: Names of lists in which each stage reads of the others only the one before it
            (:class:`obsdiff.models.tracing.Trace`).
        calls: One of each denoiser is tried.
    """
    found: set[str] = set()
    for prefix, model in parts_of(denoiser).items():
        call = next((call for call in calls if call.model is model), None)
        lists: dict[str, list[str]] = {}
        for name in stages:
            lists.setdefault(name.rpartition(".")[0], []).append(name)
        tried = [names for of, names in lists.items() if of in chains and of.startswith(prefix) and len(names) > 1]
        if call is None or not tried:
            continue
        passing = {name for names in tried for name in names[:-1]}  # until it is found out
        with answering(denoiser, stages, passing) as replay:
            made: MadeCall | None = None
            for names in tried:
                if made is None:
                    made = replace(call, answers={}, spill=None)
                    wanted = list(tensors_in(replay.run(made)))
                done = stages[: stages.index(names[-1]) + 1]
                again = replace(made, answers={name: a for name, a in made.answers.items() if name in done})
                if not all(map(torch.equal, tensors_in(replay.run(again)), wanted)):
                    passing.difference_update(names)
                    made = None  # their answers are needed to try the lists behind them
        found |= passing
    return frozenset(found)
