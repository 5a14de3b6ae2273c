"""Pruned weights of single units at several shares, solved together where they read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.models.wiring import WiredSite, Wiring
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.solve import LayerResult, SolveOptions, solve_groups, solve_layers
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

    def apply(self, edits: Edits, wiring: Wiring) -> None:
        """Write the weights into the denoiser; ``edits.undo()`` takes them back."""
        for name, (weight, bias_shift) in self.layers.items():
            edits.set_weight(wiring.layer(name), weight)
            edits.shift_bias(wiring.layer(name), bias_shift)


class Solver:
    """Makes candidates; the solves of one site are done in one go and kept until :meth:`forget`."""

    def __init__(self, wiring: Wiring, statistics: Statistics, options: SolveOptions) -> None:
        self.wiring = wiring
        self.statistics = statistics
        self.options = options
        self.groups = {groups.name: groups for groups in wiring.groups}
        self._sites: dict[tuple[str, tuple[Pattern, ...]], dict[tuple[str, Pattern], LayerResult]] = {}

    def candidates(self, members: Sequence[str], patterns: Sequence[Pattern]) -> list[Candidate]:
        """The unit of these members under each pattern."""
        parts = [
            self._module(name, patterns) if name in self.groups else self._layer(name, patterns) for name in members
        ]
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
        solved = self._site(self.wiring.site_of[name], patterns)
        found = [solved[name, pattern] for pattern in patterns]
        return [Candidate({name: (result.weight, result.bias_shift)}, _error(result)) for result in found]

    def _site(self, site: WiredSite, patterns: Sequence[Pattern]) -> dict[tuple[str, Pattern], LayerResult]:
        """All layers of a site under all patterns, on one factor."""
        key = (site.name, tuple(patterns))
        if key not in self._sites:
            pairs = [(layer, pattern) for layer in site.layers for pattern in patterns]
            device = self.wiring.weight(site.name).device
            results = solve_layers(
                self.wiring,
                [layer for layer, _ in pairs],
                [pattern for _, pattern in pairs],
                self.statistics.site(site.name, device),
                self.options,
            )
            self._sites[key] = dict(zip(pairs, results, strict=True))
        return self._sites[key]

    def _module(self, name: str, patterns: Sequence[Pattern]) -> list[Candidate]:
        groups = self.groups[name]
        device = self.wiring.weight(groups.consumers[0]).device
        statistics = {
            layer: self.statistics.site(self.wiring.site_of[layer].name, device) for layer in groups.consumers
        }
        found = []
        for pattern in patterns:
            assert isinstance(pattern, Structured)
            kept, results = solve_groups(self.wiring, groups, pattern, statistics, self.options)
            channels = kept.repeat_interleave(groups.size)
            layers = {}
            for layer, result in results.items():
                # Without its columns in the consumers a head or neuron has no effect, whatever its producers give.
                weight = torch.zeros_like(self.wiring.weight(layer), dtype=torch.float32)
                weight[:, channels] = result.weight
                layers[layer] = (weight, result.bias_shift)
            errors = [_error(result) for result in results.values()]
            found.append(Candidate(layers, sum(errors) / len(errors)))
        return found


def _error(result: LayerResult) -> float:
    assert result.error is not None  # a scan always has statistics
    return result.error
