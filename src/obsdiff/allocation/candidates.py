"""Pruned weights of single units at several shares, solved together where they read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.models.graph import Graph, Group, Site
from obsdiff.obs.observers import Observer
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.layers import LayerResult, SolveOptions
from obsdiff.pruning.plan import kept_units
from obsdiff.pruning.solve import kept_columns, solve_groups, solve_layers
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.surgery import Edits
from obsdiff.pruning.vectors import Vector, basis_of, rank_result, vector_of


@dataclass(frozen=True)
class Candidate:
    """One unit under one pattern, every other layer dense.

    Attributes:
        layers: What changes, by layer, in dense shapes: the weight and what the bias takes up.
        error: Mean over these layers of their own relative output error.
    """

    layers: dict[str, tuple[Tensor, Tensor | None]]
    error: float

    def apply(self, edits: Edits, graph: Graph) -> None:
        """Write the weights into the denoiser; ``edits.undo()`` takes them back."""
        for name, (weight, bias_shift) in self.layers.items():
            edits.set_weight(graph.layer(name), weight)
            edits.shift_bias(graph.layer(name), bias_shift)


class Solver:
    """Makes candidates; the solves of one site are done in one go and kept until :meth:`forget`."""

    def __init__(self, graph: Graph, statistics: Statistics, options: SolveOptions) -> None:
        self.graph = graph
        self.statistics = statistics
        self.options = options
        self._sites: dict[tuple[str, int, tuple[Pattern, ...]], dict[tuple[str, Pattern], LayerResult]] = {}

    def candidates(self, members: Sequence[str], patterns: Sequence[Pattern]) -> list[Candidate]:
        """The unit of these members under each pattern."""
        group = self.graph.group_of.get(members[0])
        if isinstance(patterns[0], Structured) and group is not None and group.basis is not None:
            parts = [self._ranks(self.graph.group_of[name], patterns) for name in members]  # type: ignore[arg-type]  # all structured
        elif isinstance(patterns[0], Structured):  # a group may be called as a layer
            bundles = self.graph.bundles(members)
            parts = [
                [self.bundle({group.name: pattern for group in bundle}) for pattern in patterns]  # type: ignore[misc]  # all structured
                for bundle in bundles
            ]
        else:
            parts = [self._layer(name, patterns) for name in members]
        return [
            Candidate(
                {layer: change for part in same for layer, change in part.layers.items()},
                sum(part.error for part in same) / len(same),
            )
            for same in zip(*parts, strict=True)
        ]

    def forget(self) -> None:
        """Let the kept solves go."""
        self._sites.clear()

    def _layer(self, name: str, patterns: Sequence[Pattern]) -> list[Candidate]:
        solved = self._site(self.graph.site_of[name], self.graph.layers[name], patterns)
        found = [solved[name, pattern] for pattern in patterns]
        return [Candidate({name: (result.weight, result.bias_shift)}, _error(result)) for result in found]

    def _site(self, site: Site, stage: int, patterns: Sequence[Pattern]) -> dict[tuple[str, Pattern], LayerResult]:
        """All layers of a stage that read a site, under all patterns, on one factor."""
        key = (site.name, stage, tuple(patterns))
        if key not in self._sites:
            # the stage's own layers: a site that is read in all stages is solved stage by stage
            here = [layer for layer in site.layers if self.graph.layers[layer] == stage]
            pairs = [(layer, pattern) for layer in here for pattern in patterns]
            device = self.graph.weight(site.name).device
            results = solve_layers(
                self.graph,
                [layer for layer, _ in pairs],
                [pattern for _, pattern in pairs],
                self.statistics.site(site.name, device),
                self.options,
                self.statistics.slopes,
            )
            self._sites[key] = dict(zip(pairs, results, strict=True))
        return self._sites[key]

    def _statistics_of(self, layer: str) -> Observer:
        return self.statistics.site(self.graph.site_of[layer].name, self.graph.weight(layer).device)

    def _ranks(self, group: Group, patterns: Sequence[Structured]) -> list[Candidate]:
        """The layers that read a group's vector or tokens, under each pattern."""
        vector = vector_of(self.graph, group, self._statistics_of(group.layers[0]))
        return [self._rank(group, kept_units(group, pattern), vector) for pattern in patterns]

    def _rank(self, group: Group, rank: int, vector: Vector) -> Candidate:
        """The layers that read a vector, on so many of its directions."""
        _, results = rank_result(self.graph, group, rank, vector)
        basis = basis_of(group, results)
        changes = {layer: (result.weight @ basis, result.bias_shift) for layer, result in results.items()}
        return Candidate(changes, sum(map(_error, results.values())) / len(results))

    def bundle(self, patterns: Mapping[str, Structured]) -> Candidate:
        """Groups that share layers, each under its pattern; or one on a basis."""
        first = self.graph.group_of[next(iter(patterns))]
        if first.basis is not None:
            [found] = self._ranks(first, list(patterns.values()))
            return found
        layers = dict.fromkeys(s.layer for name in patterns for s in self.graph.group_of[name].consumers)
        statistics = {layer: self._statistics_of(layer) for layer in layers}
        passes = self.statistics.slopes, self.statistics.openness
        kept, results = solve_groups(self.graph, patterns, statistics, self.options, *passes)
        changes = {}
        for layer, result in results.items():
            # Without its columns in the consumers a unit has no effect, whatever its producers give.
            weight = torch.zeros_like(self.graph.weight(layer), dtype=torch.float32)
            weight[:, kept_columns(self.graph, layer, kept)] = result.weight
            changes[layer] = (weight, result.bias_shift)
        return Candidate(changes, sum(map(_error, results.values())) / len(results))


def _error(result: LayerResult) -> float:
    assert result.error is not None  # a scan always has statistics
    return result.error
