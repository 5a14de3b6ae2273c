"""Budgets, and what each option of each unit costs under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit, removed
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops, shrunk_flops
from obsdiff.models.wiring import WiredGroups, Wiring
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.plan import kept_groups


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


def costs_of(pipe: Any, wiring: Wiring, units: Sequence[Unit], budget: Budget, call: Mapping[str, Any]) -> Costs:
    """Cost tables under a budget in sparsity, parameters or FLOPs.

    Raises:
        UserError: The budget says nothing about these patterns.
    """
    structured = isinstance(units[0].options[0], Structured)
    if budget.kind == "flops":
        return _flop_costs(pipe, wiring, units, budget, call)
    members = [member for unit in units for member in unit.members]
    if structured:
        total = sum(parameter.numel() for parameter in wiring.denoiser.parameters())
        modules = {groups.name: groups for groups in wiring.groups}
        cost = _per_member(lambda name, pattern: module_parameters(wiring, modules[name], pattern))
        planned = sum(module_parameters(wiring, modules[name], Structured(0, 0)) for name in members)
        stays = 1 - budget.share if budget.kind == "sparsity" else budget.share
        return _costs(units, cost, total - planned, total, stays)
    sizes = {name: wiring.weight(name).numel() for name in members}
    planned = sum(sizes.values())
    cost = _per_member(lambda name, pattern: sizes[name] - round(removed(pattern) * sizes[name]))
    if budget.kind == "sparsity":
        return _costs(units, cost, 0, planned, 1 - budget.share)
    total = sum(parameter.numel() for parameter in wiring.denoiser.parameters())
    return _costs(units, cost, total - planned, total, budget.share)


def _costs(
    units: Sequence[Unit], cost: Callable[[Unit, Pattern], float], fixed: float, dense: float, stays: float
) -> Costs:
    options = [[cost(unit, option) for option in unit.options] for unit in units]
    limit = stays * dense - fixed
    return Costs(fixed, options, dense, limit + 1e-9 * dense)  # the share is a decimal: let rounding not cost a weight


def _per_member(cost: Callable[[str, Any], float]) -> Callable[[Unit, Pattern], float]:
    return lambda unit, pattern: float(sum(cost(name, pattern) for name in unit.members))


def module_parameters(wiring: Wiring, groups: WiredGroups, pattern: Structured) -> int:
    """Parameters of the layers that a module's heads or neurons run through, what they keep under ``pattern``."""
    channels = kept_groups(groups, pattern) * groups.size
    count = 0
    for name in groups.producers:
        layer = wiring.layer(name)
        count += groups.slabs * channels * (wiring.weight(name).shape[1] + (layer.bias is not None))
    for name in groups.consumers:
        rows = wiring.weight(name).shape[0]
        count += rows * channels + (rows if wiring.layer(name).bias is not None else 0)
    return count


def _flop_costs(pipe: Any, wiring: Wiring, units: Sequence[Unit], budget: Budget, call: Mapping[str, Any]) -> Costs:
    """FLOPs are affine in each module's width: two counts per module give its slope."""
    if not isinstance(units[0].options[0], Structured):
        raise UserError("a budget in FLOPs needs a structured pattern: dense kernels do not skip zeros")
    dense = denoiser_flops(pipe, call)
    modules = {groups.name: groups for groups in wiring.groups}
    per_group = {}
    for unit in units:
        for name in unit.members:
            groups = modules[name]
            fewer = shrunk_flops(pipe, call, shapes_with(wiring, {name: groups.count // 2}))
            per_group[name] = (dense - fewer) / (groups.count - groups.count // 2)
    cost = _per_member(lambda name, pattern: per_group[name] * kept_groups(modules[name], pattern))
    planned = sum(per_group[name] * modules[name].count for unit in units for name in unit.members)
    return _costs(units, cost, dense - planned, dense, budget.share)


def shapes_with(wiring: Wiring, kept: Mapping[str, int]) -> dict[str, Any]:
    """The ``shrunk`` config of a denoiser whose modules keep so many heads or neurons."""
    from obsdiff.pruning.surgery import head_attributes

    layers: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for groups in wiring.groups:
        if groups.name in kept:
            channels = kept[groups.name] * groups.size
            for name in groups.producers:
                layers[name] = [groups.slabs * channels, wiring.weight(name).shape[1]]
            for name in groups.consumers:
                layers[name] = [wiring.weight(name).shape[0], channels]
            if groups.kind == "heads":
                attributes[groups.name] = head_attributes(kept[groups.name], groups.size)
    return {"layers": layers, "attributes": attributes}
