"""Budgets, and what each option of each unit costs under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit, removed
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops, shrunk_flops
from obsdiff.models.graph import Size, group_parameters, more_with, shapes_with, stored_bytes, units_parameters
from obsdiff.models.subject import Subject
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


class Unmet(UserError):
    """A budget that the cheapest options exceed."""


def dense_cost(subject: Subject, kind: str, call: Mapping[str, Any]) -> int:
    """What a denoiser costs as it is: its FLOPs, its bytes as stored, or for other kinds its parameters."""
    if kind == "flops":
        return denoiser_flops(subject, call)
    if kind == "bytes":
        return sum(map(stored_bytes, subject.denoiser.state_dict().values()))
    return sum(parameter.numel() for parameter in subject.denoiser.parameters())


def costs_of(
    subject: Subject, units: Sequence[Unit], budget: Budget, call: Mapping[str, Any], whole: float | None = None
) -> Costs:
    """Cost tables under a budget in sparsity, parameters, bytes or FLOPs.

    Args:
        subject: The pipeline as it is.
        units: What there is to choose.
        budget: What may stay.
        call: Of which FLOPs are counted.
        whole: What the budget's share is of; None: of the denoiser as it is.
    """
    graph = subject.graph
    members = [member for unit in units for member in unit.members]
    total = dense_cost(subject, budget.kind, call)
    stays = 1 - budget.share if budget.kind == "sparsity" else budget.share
    if not isinstance(units[0].options[0], Structured):
        sizes = {name: graph.weight(name).numel() for name in members}
        planned = sum(sizes.values())
        dense = planned if budget.kind == "sparsity" else total

        def kept(name: str, pattern: Pattern) -> float:
            return sizes[name] - round(removed(pattern) * sizes[name])

        return costs_from(units, kept, dense - planned, dense, stays)
    groups = {name: graph.group_of[name] for name in members}
    if budget.kind == "flops":  # affine in each module's width: two counts per module give its slope

        def flops(name: str, kept: int) -> int:
            return shrunk_flops(subject, call, shapes_with(graph, {name: kept}))

        per_unit, every = {}, {}
        for name, group in groups.items():
            if group.count == 1:  # a single head cannot go, so it belongs to what is fixed
                per_unit[name] = every[name] = 0.0
                continue
            half = group.count // 2
            fewer = flops(name, half)
            per_unit[name] = (total - fewer) / (group.count - half)
            if group.basis is not None:  # the whole has none, so that its two counts are below
                per_unit[name] = (fewer - flops(name, half // 2)) / (half - half // 2)
            every[name] = total - fewer + per_unit[name] * half
    else:
        size: Size = stored_bytes if budget.kind == "bytes" else Tensor.numel
        per_unit = {name: float(units_parameters(graph, group, size=size)) for name, group in groups.items()}
        every = {name: float(group_parameters(graph, group, group.count, size)) for name, group in groups.items()}

    def cost(name: str, pattern: Pattern) -> float:
        kept = kept_units(groups[name], pattern)  # type: ignore[arg-type]  # all structured
        return every[name] if kept == groups[name].count else per_unit[name] * kept

    return costs_from(units, cost, total - sum(every.values()), whole or total, stays)


def costs_from(
    units: Sequence[Unit], cost: Callable[[str, Any], float], fixed: float, dense: float, stays: float
) -> Costs:
    """Tables of what ``cost`` says of a member under a pattern, where the share ``stays`` of ``dense`` may stay."""
    options = [[float(sum(cost(name, option) for name in unit.members)) for option in unit.options] for unit in units]
    limit = stays * dense - fixed
    return Costs(fixed, options, dense, limit + 1e-9 * dense)  # the share is a decimal: let rounding not cost a weight


def true_cost(
    subject: Subject, units: Sequence[Unit], patterns: Sequence[Pattern], budget: Budget, call: Mapping[str, Any]
) -> float:
    """What the denoiser costs with these structured patterns: more than by the tables where rows and columns of one
    layer go (heads of its queries, and directions that it reads), of which each table has the whole."""
    graph = subject.graph
    chosen = {name: pattern for unit, pattern in zip(units, patterns, strict=True) for name in unit.members}
    kept = {name: kept_units(graph.group_of[name], pattern) for name, pattern in chosen.items()}  # type: ignore[arg-type]  # all structured
    if budget.kind == "flops":
        return shrunk_flops(subject, call, shapes_with(graph, kept))
    size: Size = stored_bytes if budget.kind == "bytes" else Tensor.numel
    return dense_cost(subject, budget.kind, call) + more_with(graph, kept, size)


def table_cost(units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs) -> float:
    """What options cost by the table."""
    triples = zip(units, patterns, costs.options, strict=True)
    return sum(of_unit[unit.options.index(pattern)] for unit, pattern, of_unit in triples)
