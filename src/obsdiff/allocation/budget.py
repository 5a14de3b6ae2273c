"""Budgets, and what each option of each unit costs under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit, removed
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops, shrunk_flops
from obsdiff.models.graph import Graph, Group, shapes_with, units_parameters
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.plan import kept_units


@dataclass(frozen=True)
class Costs:
    """Additive costs.

    Attributes:
        fixed: What the rest of the denoiser costs.
        options: Per unit the cost of each option.
        dense: Cost of the whole, nothing pruned.
        limit: What the units may cost together, ``fixed`` taken off.
    """

    fixed: float
    options: list[list[float]]
    dense: float
    limit: float


def costs_of(pipe: Any, graph: Graph, units: Sequence[Unit], budget: Budget, call: Mapping[str, Any]) -> Costs:
    """Cost tables under a budget in sparsity, parameters or FLOPs.

    Raises:
        UserError: The budget says nothing about these patterns.
    """
    structured = isinstance(units[0].options[0], Structured)
    if budget.kind == "flops":
        return _flop_costs(pipe, graph, units, budget, call)
    members = [member for unit in units for member in unit.members]
    if structured:
        total = sum(parameter.numel() for parameter in graph.denoiser.parameters())
        cost = _per_member(lambda name, pattern: group_parameters(graph, graph.group_of[name], pattern))
        planned = sum(group_parameters(graph, graph.group_of[name], Structured(0, 0)) for name in members)
        stays = 1 - budget.share if budget.kind == "sparsity" else budget.share
        return costs_from(units, cost, total - planned, total, stays)
    sizes = {name: graph.weight(name).numel() for name in members}
    planned = sum(sizes.values())
    cost = _per_member(lambda name, pattern: sizes[name] - round(removed(pattern) * sizes[name]))
    if budget.kind == "sparsity":
        return costs_from(units, cost, 0, planned, 1 - budget.share)
    total = sum(parameter.numel() for parameter in graph.denoiser.parameters())
    return costs_from(units, cost, total - planned, total, budget.share)


def costs_from(
    units: Sequence[Unit], cost: Callable[[Unit, Pattern], float], fixed: float, dense: float, stays: float
) -> Costs:
    """Tables of what ``cost`` says, under a budget of which the share ``stays`` of ``dense`` may stay."""
    options = [[cost(unit, option) for option in unit.options] for unit in units]
    limit = stays * dense - fixed
    return Costs(fixed, options, dense, limit + 1e-9 * dense)  # the share is a decimal: let rounding not cost a weight


def _per_member(cost: Callable[[str, Any], float]) -> Callable[[Unit, Pattern], float]:
    return lambda unit, pattern: float(sum(cost(name, pattern) for name in unit.members))


def group_parameters(graph: Graph, group: Group, pattern: Structured) -> int:
    """Parameters of the units of a group that stay under ``pattern``."""
    return kept_units(group, pattern) * units_parameters(graph, group)


def _flop_costs(pipe: Any, graph: Graph, units: Sequence[Unit], budget: Budget, call: Mapping[str, Any]) -> Costs:
    """FLOPs are affine in each module's width: two counts per module give its slope."""
    if not isinstance(units[0].options[0], Structured):
        raise UserError("a budget in FLOPs needs a structured pattern: dense kernels do not skip zeros")
    dense = denoiser_flops(pipe, call)
    groups, per_unit = graph.group_of, {}
    for unit in units:
        for name in unit.members:
            count = groups[name].count
            fewer = shrunk_flops(pipe, call, shapes_with(graph, {name: count // 2}))
            per_unit[name] = (dense - fewer) / (count - count // 2)
    cost = _per_member(lambda name, pattern: per_unit[name] * kept_units(groups[name], pattern))
    planned = sum(per_unit[name] * groups[name].count for unit in units for name in unit.members)
    return costs_from(units, cost, dense - planned, dense, budget.share)
