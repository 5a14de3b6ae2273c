"""From one pattern per unit to a plan that meets its budget to the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from obsdiff.allocation.budget import Costs, table_cost
from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit, removed
from obsdiff.models.graph import Graph
from obsdiff.obs.pattern import KINDS, Pattern, Structured, Unstructured
from obsdiff.pruning.plan import Plan, kept_units


def settle(graph: Graph, units: Sequence[Unit], patterns: Sequence[Pattern], limit: float) -> list[Pattern]:
    """Move a few weights so that what unstructured layers keep is the limit to the weight, within floors and ceilings.

    Only units of one member are moved, the largest first; the others keep their ratios.
    """
    ratios = [removed(pattern) for pattern in patterns]
    sizes = [[graph.weight(name).numel() for name in unit.members] for unit in units]
    gone = [[round(ratio * size) for size in of_unit] for ratio, of_unit in zip(ratios, sizes, strict=True)]
    spare = math.floor(limit) - sum(map(sum, sizes)) + sum(map(sum, gone))
    for i in sorted((i for i, unit in enumerate(units) if len(unit.members) == 1), key=lambda i: -sizes[i][0]):
        if spare == 0:
            break
        options, [size], [before] = units[i].options, sizes[i], gone[i]
        least = math.ceil(removed(options[0]) * size - 1e-6)
        most = math.floor(removed(options[-1]) * size + 1e-6)
        moved = min(max(before - spare, least), most)
        spare -= before - moved
        ratios[i] = moved / size
    return [Unstructured(float(f"{ratio:.10g}")) for ratio in ratios]


def kept_cost(graph: Graph, units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs) -> float:
    """What patterns of single weights leave of the units."""
    if all(isinstance(pattern, Unstructured) for pattern in patterns):  # settled ratios stand in no table
        weights, gone = _counted(graph, _entries(units, patterns))
        return float(weights - gone)
    return table_cost(units, patterns, costs)


def plan_of(
    graph: Graph, base: Plan, units: Sequence[Unit], patterns: Sequence[Pattern], rule: str, budget: Budget
) -> Plan:
    """The plan, in the order of a forward pass, under the overall pattern that the patterns come to."""
    chosen = _entries(units, patterns)
    entries = {name: chosen[name] for name in base.entries}
    overall = base.pattern
    if isinstance(overall, Unstructured):
        weights, gone = _counted(graph, entries)
        overall = Unstructured(round(gone / weights, 6))
    elif isinstance(overall, Structured):
        shares: Any = {kind: _share_gone(graph, entries, kind) for kind in KINDS}
        lost = {kind: _share_gone(graph, entries, kind) for kind in overall.directions}
        kept: Any = {kind: round(1 - share, 4) for kind, share in lost.items() if share > 0}
        overall = Structured(**shares, multiple_of=overall.multiple_of, **kept)
    return Plan(overall, entries, rule, str(budget))


def _entries(units: Sequence[Unit], patterns: Sequence[Pattern]) -> dict[str, Pattern]:
    return {name: pattern for unit, pattern in zip(units, patterns, strict=True) for name in unit.members}


def _counted(graph: Graph, entries: Mapping[str, Pattern]) -> tuple[int, int]:
    """Weights of layers, and how many of them go."""
    sizes = {name: graph.weight(name).numel() for name in entries}
    return sum(sizes.values()), sum(round(removed(pattern) * sizes[name]) for name, pattern in entries.items())


def _share_gone(graph: Graph, entries: Mapping[str, Pattern], kind: str) -> float:
    """Share of all units of a kind that structured entries remove."""
    kept = count = 0
    for groups in graph.groups:
        pattern = entries.get(groups.name)
        if groups.kind == kind and isinstance(pattern, Structured):
            kept += kept_units(groups, pattern)
            count += groups.count
    return round(1 - kept / count, 4) if count else 0.0
