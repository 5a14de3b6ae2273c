"""The denoiser from one stage on, on hidden states that were computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.allocation.probe import BATCH_ROWS, Probe, power
from obsdiff.models.graph import Graph
from obsdiff.models.modes import eval_mode


class _Given(nn.Module):
    """Stands where a stage was and returns what it would; whoever reaches into the stage still finds its parts."""

    def __init__(self, stage: nn.Module, values: list[Any]) -> None:
        super().__init__()
        self.hidden: list[Any] = [stage, values]  # in a list, so that its parts are not registered twice

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.hidden[0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.hidden[1][0]


class Restart:
    """Output errors of a changed denoiser on a probe, without repeating the stages in front of the change.

    Where the stages are a chain (:attr:`obsdiff.models.graph.Graph.chain`), the outputs of the stage in front of
    ``first`` are kept, one set at a time: memory for one hidden state per probe row. Elsewhere every call is whole.
    """

    def __init__(self, graph: Graph, probe: Probe, rows: int = BATCH_ROWS) -> None:
        self.graph = graph
        self.probe = probe
        self.chain = graph.chain
        batches = list(probe.batches(rows))
        self.names = [name for name, _, _ in batches]  # of two denoisers, the one that is asked
        self.arguments = [arguments for _, arguments, _ in batches]
        self.weights = [weights for _, _, weights in batches]
        self.first = 0
        self._given: list[Any] = []
        self.stages_run = 0  # runs of a block on the whole probe, for the cost
        with torch.no_grad():
            self.dense = [output for output, _ in self.outputs()]
        self.power = power(self.dense, self.weights)

    def advance(self, stage: int) -> None:
        """From now on all changes are in ``stage`` or behind it. The denoiser must be dense now."""
        if not self.chain or stage == self.first:
            return
        assert stage > self.first
        last = self.graph.layer(self.graph.stages[stage - 1])
        seen: list[Any] = []
        handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with torch.no_grad():
                for _ in self.outputs():
                    pass
        finally:
            handle.remove()
        self._given, self.first = seen, stage

    @torch.no_grad()
    def error(self) -> float:
        """``Σ α_t ‖now − dense‖² / Σ α_t ‖dense‖²`` of the guided output of the denoiser as it is now."""
        differences = (now - dense for (now, _), dense in zip(self.outputs(), self.dense, strict=True))
        error = power(differences, self.weights) / self.power
        return error if error == error else float("inf")  # NaN: the change broke the model

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Guided outputs (triples, ...) of the denoiser as it is now and weights (triples,), both float64, by batch."""
        self.stages_run += len(self.graph.stages) - self.first
        with self._shortened() as given:
            for i, arguments in enumerate(self.arguments):
                given[:] = [self._given[i] if self._given else None]
                model = self.graph.layer(self.names[i])
                yield self.probe.guided(model(**arguments)[0], len(self.weights[i])), self.weights[i]

    @contextmanager
    def _shortened(self) -> Iterator[list[Any]]:
        """The denoiser with the stages in front of ``first`` replaced by what the list gives; as before afterwards."""
        given: list[Any] = [None]
        replaced = []
        for name in self.graph.stages[: self.first]:
            owner, _, child = name.rpartition(".")
            parent = self.graph.layer(owner)
            replaced.append((parent, child, getattr(parent, child)))
            setattr(parent, child, _Given(getattr(parent, child), given))
        try:
            with eval_mode(self.graph.denoiser):
                yield given
        finally:
            for parent, child, stage in replaced:
                setattr(parent, child, stage)
