"""The denoiser from one stage on: what the stages in front of it answer is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obsdiff.allocation.probe import BATCH_ROWS, Probe, power
from obsdiff.models.graph import Graph
from obsdiff.models.modes import eval_mode
from obsdiff.models.replay import MadeCall, answering, passing_stages, stopping


class Restart:
    """Output errors of a changed denoiser on a probe, without repeating the stages in front of the change.

    What those have answered is kept and put in their places: of stages that run one after the other only the latest
    answer, of others all. Where a stage runs more than once in a call, every call is whole.
    """

    def __init__(self, graph: Graph, probe: Probe, rows: int = BATCH_ROWS) -> None:
        self.graph = graph
        self.probe = probe
        batches = list(probe.batches(rows))
        # of two denoisers, the one that is asked
        self._calls = [MadeCall(graph.layer(name), f"{name}." if name else "", given) for name, given, _ in batches]
        self.weights = [weights for _, _, weights in batches]
        self.first = 0
        self._passing: frozenset[str] | None = None
        self.stages_run = 0  # runs of a block on the whole probe, for the cost
        with torch.no_grad():
            self.dense = [output for output, _ in self.outputs()]
        self.power = power(self.dense, self.weights)

    @torch.no_grad()
    def advance(self, stage: int) -> None:
        """From now on all changes are in ``stage`` or behind it. The denoiser must be dense now."""
        if self.graph.repeats or stage == self.first:
            return
        assert stage > self.first
        denoiser, stages = self.graph.denoiser, self.graph.stages
        with eval_mode(denoiser):
            if self._passing is None:
                self._passing = passing_stages(denoiser, stages, self.graph.chains, self._calls)
            with answering(denoiser, stages[:stage]) as replay, stopping(self.graph.layer(stages[stage]), before=True):
                for call in self._calls:
                    if call.passes(stages[self.first : stage]):
                        replay.run(call)
                        call.forget(stages, self._passing)
        self.stages_run += stage - self.first
        self.first = stage

    @torch.no_grad()
    def error(self) -> float:
        """``Σ α_t ‖now − dense‖² / Σ α_t ‖dense‖²`` of the guided output of the denoiser as it is now."""
        differences = (now - dense for (now, _), dense in zip(self.outputs(), self.dense, strict=True))
        error = power(differences, self.weights) / self.power
        return error if error == error else float("inf")  # NaN: the change broke the model

    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Guided outputs (triples, ...) of the denoiser as it is now and weights (triples,), both float64, by batch."""
        self.stages_run += len(self.graph.stages) - self.first
        denoiser = self.graph.denoiser
        with eval_mode(denoiser), answering(denoiser, self.graph.stages[: self.first]) as replay:
            for call, weights in zip(self._calls, self.weights, strict=True):
                yield self.probe.guided(replay.run(call)[0], len(weights)), weights
