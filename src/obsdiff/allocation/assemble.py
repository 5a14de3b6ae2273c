"""From one pattern per unit to a plan that meets its budget to the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obsdiff.allocation.budget import Costs
from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit, removed
from obsdiff.models.graph import Graph
from obsdiff.obs.pattern import Pattern, Structured, Unstructured
from obsdiff.pruning.plan import Plan, kept_units


def unit_sizes(graph: Graph, units: Sequence[Unit]) -> list[int]:
    """Weights of each unit's layers."""
    return [sum(graph.weight(name).numel() for name in unit.members) for unit in units]


def settle(graph: Graph, units: Sequence[Unit], patterns: Sequence[Pattern], limit: float) -> list[Pattern]:
    """Move a few weights so that what unstructured layers keep is the limit to the weight, within floors and ceilings.

    Only units of one member are moved, the largest first; the others keep their ratios.
    """
    sizes = unit_sizes(graph, units)
    ratios = [removed(pattern) for pattern in patterns]
    gone = [
        sum(round(ratio * graph.weight(name).numel()) for name in unit.members)
        for unit, ratio in zip(units, ratios, strict=True)
    ]
    spare = math.floor(limit) - sum(size - count for size, count in zip(sizes, gone, strict=True))
    for i in sorted(range(len(units)), key=lambda i: -sizes[i]):
        if spare == 0:
            break
        if len(units[i].members) == 1:
            least = math.ceil(removed(units[i].options[0]) * sizes[i] - 1e-6)
            most = math.floor(removed(units[i].options[-1]) * sizes[i] + 1e-6)
            moved = min(max(gone[i] - spare, least), most)
            spare -= gone[i] - moved
            gone[i] = moved
            ratios[i] = moved / sizes[i]
    return [Unstructured(float(f"{ratio:.10g}")) for ratio in ratios]


def table_cost(units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs) -> float:
    """What options cost by the table."""
    triples = zip(units, patterns, costs.options, strict=True)
    return sum(of_unit[unit.options.index(pattern)] for unit, pattern, of_unit in triples)


def achieved_share(
    graph: Graph, units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs, budget: Budget
) -> float:
    """The budget's figure that the patterns come to."""
    if all(isinstance(pattern, Unstructured) for pattern in patterns):  # settled ratios stand in no table
        kept = float(
            sum(
                graph.weight(name).numel() - round(removed(pattern) * graph.weight(name).numel())
                for unit, pattern in zip(units, patterns, strict=True)
                for name in unit.members
            )
        )
    else:
        kept = table_cost(units, patterns, costs)
    share = (kept + costs.fixed) / costs.dense
    return 1 - share if budget.kind == "sparsity" else share


def plan_of(
    graph: Graph, base: Plan, units: Sequence[Unit], patterns: Sequence[Pattern], rule: str, budget: Budget
) -> Plan:
    """The plan, in the order of a forward pass, under the overall pattern that the patterns come to."""
    chosen = {name: pattern for unit, pattern in zip(units, patterns, strict=True) for name in unit.members}
    entries = {name: chosen[name] for name in base.entries}
    overall = base.pattern
    if isinstance(overall, Unstructured):
        sizes = {name: graph.weight(name).numel() for name in entries}
        gone = sum(round(removed(pattern) * sizes[name]) for name, pattern in entries.items())
        overall = Unstructured(round(gone / sum(sizes.values()), 6))
    elif isinstance(overall, Structured):
        shares = {kind: _share_gone(graph, entries, kind) for kind in ("heads", "ffn", "channels")}
        overall = Structured(**shares, multiple_of=overall.multiple_of)
    return Plan(overall, entries, rule, str(budget))


def _share_gone(graph: Graph, entries: dict[str, Pattern], kind: str) -> float:
    """Share of all units of a kind that structured entries remove."""
    kept = count = 0
    for groups in graph.groups:
        pattern = entries.get(groups.name)
        if groups.kind == kind and isinstance(pattern, Structured):
            kept += kept_units(groups, pattern)
            count += groups.count
    return round(1 - kept / count, 4) if count else 0.0
