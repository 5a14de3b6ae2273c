"""Pruned weights of single units at several shares, solved together where they read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.models.graph import Graph, Site
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.solve import LayerResult, SolveOptions, kept_columns, solve_groups, solve_layers
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.surgery import Edits


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
        if isinstance(patterns[0], Structured):  # a group may be called as a layer
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
            )
            self._sites[key] = dict(zip(pairs, results, strict=True))
        return self._sites[key]

    def bundle(self, patterns: Mapping[str, Structured]) -> Candidate:
        """Groups that share layers, each under its pattern."""
        layers = dict.fromkeys(s.layer for name in patterns for s in self.graph.group_of[name].consumers)
        statistics = {
            layer: self.statistics.site(self.graph.site_of[layer].name, self.graph.weight(layer).device)
            for layer in layers
        }
        kept, results = solve_groups(self.graph, patterns, statistics, self.options)
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
