"""From statistics and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obsdiff.allocation.budget import Budget, Costs, costs_of, module_parameters, parse_budget
from obsdiff.allocation.curves import error_curve
from obsdiff.allocation.joint import joint_errors
from obsdiff.allocation.knapsack import Infeasible, choose
from obsdiff.allocation.latency import Clock, latency_costs, meet_on_the_clock, time_calls
from obsdiff.allocation.owl import owl_offsets
from obsdiff.allocation.probe import Probe, record_probe
from obsdiff.allocation.scan import Sensitivity, passes_needed, scan
from obsdiff.allocation.targets import meet_with_offsets
from obsdiff.allocation.units import Limits, Unit, make_units, removed
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.wiring import Wiring, denoiser_of, wire
from obsdiff.obs.pattern import NM, Pattern, Structured, Unstructured, parse_pattern
from obsdiff.pruning.calibrate import Settings, prompts_hash
from obsdiff.pruning.plan import Plan, kept_groups, make_plan
from obsdiff.pruning.solve import SolveOptions
from obsdiff.pruning.statistics import Statistics

RULES = ("uniform", "measured", "owl")
TRIPLES = 160
MOST_PASSES = 12.0  # cost of a scan that chooses its own number of triples, in bare passes over the calibration set


@dataclass(frozen=True)
class ScanOptions:
    """How sensitivity is measured.

    Attributes:
        levels: Shares removed at which the denoiser runs; None: 0.5, 0.8 and 0.95 (structured: 0.25, 0.5 and 0.75).
        triples: (latent, step, prompt) triples to measure on; None: 160, or fewer, so that the scan does not run the
            denoiser on more than 12 times what a calibration pass does (at least 4).
        store: Folder to keep the scan in; one of the same settings is used or continued instead of measured again.
    """

    levels: Sequence[float] | None = None
    triples: int | None = None
    store: Path | None = None


@dataclass(frozen=True)
class Allocation:
    """A plan and how it came about.

    Attributes:
        plan: What to prune.
        record: For reports: rule, budget, costs, errors and what the scan cost; JSON-able.
        sensitivity: The scan, of the measured rule.
    """

    plan: Plan
    record: dict[str, Any]
    sensitivity: Sensitivity | None = None


def allocate(
    pipe: Any,
    pattern: str | Pattern,
    statistics: Statistics,
    prompts: Sequence[str] | Conditioning,
    *,
    rule: str = "measured",
    budget: str | Budget | None = None,
    method: str = "obs",
    options: SolveOptions | None = None,
    scanning: ScanOptions | None = None,
    limits: Limits | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
    batch_size: int = 4,
    clock: Clock = time_calls,
    quiet: bool = True,
) -> Allocation:
    """Give each layer (structured: each attention and feed-forward module) its own pattern under one budget.

    Args:
        pipe: The dense pipeline; as before afterwards.
        pattern: Its kind is what layers get, at shares of their own.
        statistics: Of a calibration of all layers.
        prompts: The calibration's prompts; the scan draws its triples from them.
        rule: "measured" (a sensitivity scan, then the least summed error), "owl" (2310.05175) or "uniform".
        budget: Such as "sparsity:0.5", "parameters:0.7", "flops:0.7", "latency:0.7"; None: what the uniform plan of
            ``pattern`` costs (total sparsity; structured: parameters).
        method: How layers are pruned; the scan prunes them so.
        options: Refit, seed, damping and fusion, in place of ``method``'s defaults.
        scanning: See :class:`ScanOptions`.
        limits: Floors, ceilings and shared values, see :class:`obsdiff.allocation.units.Limits`.
        include, exclude, spare_blocks: See :func:`obsdiff.pruning.plan.make_plan`; the measured rule spares no block
            unless told to.
        batch_size: Prompts per pipeline call.
        clock: Times calls, for budgets in latency.
        quiet: No progress bar.

    Raises:
        UserError: The request cannot be met.
    """
    pattern = parse_pattern(pattern)
    options = options or SolveOptions(method)
    scanning, limits = scanning or ScanOptions(), limits or Limits()
    check_request(rule, scanning)
    wiring = wire(denoiser_of(pipe))
    uniform = make_plan(wiring, pattern, include, exclude, spare_blocks)
    spared = () if rule == "measured" and spare_blocks is None else spare_blocks
    base = make_plan(wiring, pattern, include, exclude, spared)
    budget = _budget(wiring, uniform, budget)
    settings = settings_of(statistics, batch_size)
    units = make_units(wiring, base, limits)
    if budget.kind == "latency":
        costs = latency_costs(pipe, wiring, units, budget, settings.call, clock)
    else:
        costs = costs_of(pipe, wiring, units, budget, settings.call)
    _check_feasible(units, costs, budget)
    record: dict[str, Any] = {"rule": rule, "budget": str(budget)}
    if rule == "measured":
        free = make_units(wiring, base, Limits(share=limits.share))
        probe, cost = _probe(pipe, wiring, free, prompts, settings, scanning)
        sensitivity = scan(
            wiring,
            free,
            statistics,
            options,
            probe,
            prompts_hash(prompts),
            levels=scanning.levels,
            store=scanning.store,
            quiet=quiet,
        )
        errors = [_curve(unit, sensitivity) for unit in units]

        def solve(limit: float) -> list[Pattern]:
            found = choose(errors, costs.options, limit)
            record["predicted_error"], record["error_bound"] = found.error, found.bound
            return [unit.options[i] for unit, i in zip(units, found.picked, strict=True)]
    else:
        offsets = owl_offsets(wiring, units, statistics) if rule == "owl" else [0.0] * len(units)

        def solve(limit: float) -> list[Pattern]:
            return meet_with_offsets(units, offsets, replace(costs, limit=limit))

    used = costs.limit
    if budget.kind == "latency":
        patterns, share = _on_the_clock(pipe, wiring, budget, settings, units, costs, solve, clock)
        record["achieved"] = share
        used = _cost(units, patterns, costs)
    else:
        patterns = solve(costs.limit)
        if isinstance(pattern, Unstructured):
            patterns = settle(units, patterns, _sizes(wiring, units), costs.limit)
        record["achieved"] = _achieved(wiring, units, patterns, costs, budget)
    plan = _plan(wiring, base, units, patterns, rule, budget)
    if rule == "measured":
        # for comparison: the same layers under the same budget, all at one share
        even = meet_with_offsets(units, [0.0] * len(units), replace(costs, limit=used))
        plans = [plan, _plan(wiring, base, units, even, "uniform", budget)]
        joint = joint_errors(wiring, plans, statistics, options, probe)
        record["joint_error"], record["uniform_joint_error"] = joint
        record["scan"] = {**sensitivity.cost, "triples": sensitivity.triples, "bare_passes": cost}
    return Allocation(plan, record, sensitivity if rule == "measured" else None)


def check_request(rule: str, scanning: ScanOptions) -> None:
    """Refuse what can be refused without a pipeline.

    Raises:
        UserError: An unknown rule, or impossible scan options.
    """
    if rule not in RULES:
        raise UserError(f"unknown allocation {rule!r}; choose one of {', '.join(RULES)}")
    if scanning.triples is not None and scanning.triples < 1:
        raise UserError(f"scan.triples is {scanning.triples}; it must be at least 1")
    for level in scanning.levels or ():
        if not 0 < level < 1:
            raise UserError(f"scan.levels holds {level:g}; levels are shares removed, above 0 and below 1")
    if scanning.levels is not None and not scanning.levels:
        raise UserError("scan.levels is empty; give at least one share, or leave it out")


def settings_of(statistics: Statistics, batch_size: int) -> Settings:
    """The settings under which statistics were measured."""
    found = statistics.fingerprint
    call = dict(zip(("height", "width", "max_sequence_length"), found["size"], strict=True))
    call |= {"num_inference_steps": found["steps"], "guidance_scale": found["guidance_scale"]}
    call = {key: value for key, value in call.items() if value is not None}
    return Settings(call, int(found["seed"]), str(found["weighting"]), batch_size=batch_size)


def _budget(wiring: Wiring, uniform: Plan, budget: str | Budget | None) -> Budget:
    if budget is not None:
        return parse_budget(budget) if isinstance(budget, str) else budget
    if not uniform.structured:
        return Budget("sparsity", uniform.pattern.sparsity)
    total = sum(parameter.numel() for parameter in wiring.denoiser.parameters())
    gone = 0
    for groups in wiring.groups:
        if groups.name in uniform.entries:
            pattern = uniform.entries[groups.name]
            assert isinstance(pattern, Structured)
            gone += module_parameters(wiring, groups, Structured(0, 0)) - module_parameters(wiring, groups, pattern)
    return Budget("parameters", (total - gone) / total)


def _check_feasible(units: Sequence[Unit], costs: Costs, budget: Budget) -> None:
    try:
        choose([[0.0] * len(of_unit) for of_unit in costs.options], costs.options, costs.limit)
    except Infeasible as error:
        share = (error.least + costs.fixed) / costs.dense
        best = f"sparsity:{math.floor((1 - share) * 1e4) / 1e4:g}" if budget.kind == "sparsity" else f"{share:.2%}"
        raise UserError(
            f"budget {budget} cannot be met: with these layers, floors and ceilings the least is {best}; "
            "loosen the budget or the ceilings, or spare fewer layers and blocks"
        ) from None


def _probe(
    pipe: Any,
    wiring: Wiring,
    units: Sequence[Unit],
    prompts: Sequence[str] | Conditioning,
    settings: Settings,
    scanning: ScanOptions,
) -> tuple[Probe, float]:
    """The probe, and how many bare passes over the calibration set a scan on it takes."""
    steps = int(settings.call.get("num_inference_steps") or 1)
    runs = passes_needed(wiring, units, scanning.levels)
    triples = scanning.triples
    if triples is None:
        triples = max(4, min(TRIPLES, int(MOST_PASSES * len(prompts) * steps / runs)))
    conditioning = prompts if isinstance(prompts, Conditioning) else encode_prompts(pipe, prompts, settings.call)
    probe = record_probe(pipe, conditioning, settings, triples)
    return probe, runs * len(probe) / (len(prompts) * steps)


def _curve(unit: Unit, sensitivity: Sensitivity) -> list[float]:
    """The unit's error at each of its options."""
    shares = [removed(option) for option in unit.options]
    return error_curve(sensitivity.solved[unit.name], sensitivity.measured[unit.name], shares)


def _on_the_clock(
    pipe: Any,
    wiring: Wiring,
    budget: Budget,
    settings: Settings,
    units: Sequence[Unit],
    costs: Costs,
    solve: Any,
    clock: Clock,
) -> tuple[list[Pattern], float]:
    """Patterns that meet a latency budget on the clock."""
    modules = {groups.name: groups for groups in wiring.groups}
    least = sum(min(of_unit) for of_unit in costs.options)
    found: list[list[Pattern]] = []
    widths: list[dict[str, int]] = []

    def kept(limit: float) -> dict[str, int]:
        found.append(solve(max(limit, least)))
        widths.append(
            {
                name: kept_groups(modules[name], pattern)
                for unit, pattern in zip(units, found[-1], strict=True)
                for name in unit.members
                if isinstance(pattern, Structured)
            }
        )
        return widths[-1]

    best, share = meet_on_the_clock(pipe, wiring, budget, settings.call, kept, costs.limit, clock)
    return found[widths.index(best)], share


def _sizes(wiring: Wiring, units: Sequence[Unit]) -> list[int]:
    return [sum(wiring.weight(name).numel() for name in unit.members) for unit in units]


def settle(units: Sequence[Unit], patterns: Sequence[Pattern], sizes: Sequence[int], limit: float) -> list[Pattern]:
    """Move a few weights so that what the layers keep is the limit to the weight, within floors and ceilings.

    Only units of one member are moved, the largest first; the others keep their ratios.
    """
    ratios = [removed(pattern) for pattern in patterns]
    gone = [round(ratio * size) for ratio, size in zip(ratios, sizes, strict=True)]
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


def _cost(units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs) -> float:
    """What options cost by the table."""
    triples = zip(units, patterns, costs.options, strict=True)
    return sum(of_unit[unit.options.index(pattern)] for unit, pattern, of_unit in triples)


def _achieved(
    wiring: Wiring, units: Sequence[Unit], patterns: Sequence[Pattern], costs: Costs, budget: Budget
) -> float:
    """The budget's figure that the plan comes to."""
    if isinstance(patterns[0], Unstructured) and not any(isinstance(pattern, NM) for pattern in patterns):
        pairs = zip(patterns, _sizes(wiring, units), strict=True)
        kept = float(sum(size - round(removed(pattern) * size) for pattern, size in pairs))
    else:
        kept = _cost(units, patterns, costs)
    share = (kept + costs.fixed) / costs.dense
    return 1 - share if budget.kind == "sparsity" else share


def _plan(
    wiring: Wiring, base: Plan, units: Sequence[Unit], patterns: Sequence[Pattern], rule: str, budget: Budget
) -> Plan:
    """In the order of a forward pass, under the overall pattern."""
    chosen = {name: pattern for unit, pattern in zip(units, patterns, strict=True) for name in unit.members}
    entries = {name: chosen[name] for name in base.entries}
    overall = base.pattern
    if isinstance(overall, Unstructured):
        sizes = {name: wiring.weight(name).numel() for name in entries}
        gone = sum(round(removed(pattern) * sizes[name]) for name, pattern in entries.items())
        overall = Unstructured(round(gone / sum(sizes.values()), 6))
    elif isinstance(overall, Structured):
        shares = {}
        for kind in ("heads", "ffn"):
            found = [groups for groups in wiring.groups if groups.name in entries and groups.kind == kind]
            kept = sum(kept_groups(groups, _structured(entries[groups.name])) for groups in found)
            shares[kind] = round(1 - kept / max(1, sum(groups.count for groups in found)), 4) if found else 0.0
        overall = Structured(shares["heads"], shares["ffn"], overall.multiple_of)
    return Plan(overall, entries, rule, str(budget))


def _structured(pattern: Pattern) -> Structured:
    assert isinstance(pattern, Structured)
    return pattern
