"""From statistics and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obsdiff.allocation.assemble import achieved_share, plan_of, settle, table_cost
from obsdiff.allocation.budget import Costs, costs_of, group_parameters
from obsdiff.allocation.clock import Clock, Trial, new_process, time_calls
from obsdiff.allocation.curves import error_curve
from obsdiff.allocation.joint import joint_errors
from obsdiff.allocation.knapsack import Infeasible, choose
from obsdiff.allocation.latency import Share, latency_costs, meet_on_the_clock, shared_clock
from obsdiff.allocation.owl import owl_offsets
from obsdiff.allocation.probe import Probe, record_probe
from obsdiff.allocation.request import Budget, check_scan, parse_budget
from obsdiff.allocation.scan import Sensitivity, passes_needed, scan
from obsdiff.allocation.targets import meet_with_offsets
from obsdiff.allocation.times import Times, open_times
from obsdiff.allocation.units import Unit, make_units, removed
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, check_prompts, encode_prompts
from obsdiff.models.content import denoiser_hash
from obsdiff.models.graph import Graph
from obsdiff.models.subject import Subject, subject_of
from obsdiff.names import ALLOCATIONS
from obsdiff.numbers import check_whole
from obsdiff.obs.pattern import Pattern, Structured, Unstructured, parse_pattern
from obsdiff.pruning.fingerprint import Settings, conditioning_hash
from obsdiff.pruning.oneshot import check_solving
from obsdiff.pruning.options import Limits, ScanOptions
from obsdiff.pruning.plan import Plan, kept_units, make_plan
from obsdiff.pruning.solve import SolveOptions
from obsdiff.pruning.statistics import Statistics, check_measured_on, check_serves

TRIPLES = 160
CHECKS = 3  # passes of the probe that compare the plan and the uniform one with the dense outputs
MOST_PASSES = 12.0  # cost of a scan that chooses its own number of triples, in bare passes over the calibration set


@dataclass(frozen=True)
class Allocation:
    """A plan and how it came about.

    Attributes:
        plan: What to prune.
        record: For reports: rule, budget, what it came to (by the clock with a 95 % interval), errors, and what the
            scan cost; JSON-able.
        sensitivity: The scan, of the measured rule.
        earlier_s: Seconds that earlier runs spent on what ``store`` held.
    """

    plan: Plan
    record: dict[str, Any]
    sensitivity: Sensitivity | None = None
    earlier_s: float = 0.0


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
    store: str | Path | None = None,
    limits: Limits | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
    batch_size: int = 4,
    clock: Clock = time_calls,
    trial: Trial = new_process,
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
        scanning: See :class:`obsdiff.pruning.options.ScanOptions`.
        store: Folder to keep the scan in, and what the clock measured; what it holds of the same settings (and, of
            the clock, the same machine) is not measured again.
        limits: Floors, ceilings and shared values, see :class:`obsdiff.pruning.options.Limits`.
        include, exclude, spare_blocks: See :func:`obsdiff.pruning.plan.make_plan`; the measured rule spares no block
            unless told to.
        batch_size: Prompts per pipeline call.
        clock, trial: Time modules, and dense and shrunk denoisers, for budgets in latency.
        quiet: No progress bar.

    Raises:
        UserError: The request cannot be met.
    """
    pattern = parse_pattern(pattern)
    scanning, limits = scanning or ScanOptions(), limits or Limits()
    check_request(rule, scanning)
    check_solving(pattern, options or SolveOptions(method))
    check_prompts(prompts)
    check_whole("batch_size", batch_size, 1)
    subject = subject_of(pipe, prompts if isinstance(prompts, Conditioning) else None)
    graph = subject.graph
    if budget is None:
        budget = default_budget(graph, make_plan(graph, pattern, include, exclude, spare_blocks))
    elif isinstance(budget, str):
        budget = parse_budget(budget)
    if isinstance(pattern, Unstructured) and budget.kind == "sparsity":
        pattern = Unstructured(budget.share)
    spared = () if rule == "measured" and spare_blocks is None else spare_blocks
    base = make_plan(graph, pattern, include, exclude, spared)
    subject.check(base.layers(graph))
    check_measured_on(statistics, graph.denoiser)
    check_serves(statistics, {"gram"} if rule == "measured" else {"diagonal"}, f"the {rule} allocation")
    settings = settings_of(statistics, batch_size)
    units = make_units(graph, base, limits)
    keep = None if store is None else Path(store)
    depends_on = {
        "denoiser": denoiser_hash(pipe),
        "call": settings.call,
    }
    times = open_times(keep if budget.kind == "latency" else None, depends_on, graph.denoiser)
    if budget.kind == "latency":
        costs = latency_costs(pipe, graph, units, budget, settings.call, times, shared_clock(clock))
    else:
        costs = costs_of(pipe, graph, units, budget, settings.call)
    _check_feasible(units, costs, budget)
    job = _Job(subject, graph, base, rule, budget, units, costs, settings, times, trial, quiet)
    if rule == "measured":
        free = make_units(graph, base, Limits(share=limits.share))
        return _measured(job, free, statistics, prompts, options or SolveOptions(method), scanning, keep)
    offsets = owl_offsets(graph, units, statistics) if rule == "owl" else [0.0] * len(units)
    plan, achieved = _meet(job, lambda limit: meet_with_offsets(units, offsets, replace(costs, limit=limit)))
    return Allocation(plan, {"rule": rule, "budget": str(budget), **achieved}, earlier_s=times.earlier_s)


@dataclass(frozen=True)
class _Job:
    """What meeting a budget needs to know."""

    subject: Subject
    graph: Graph
    base: Plan
    rule: str
    budget: Budget
    units: Sequence[Unit]
    costs: Costs
    settings: Settings
    times: Times
    trial: Trial
    quiet: bool


def _measured(
    job: _Job,
    free: Sequence[Unit],
    statistics: Statistics,
    prompts: Sequence[str] | Conditioning,
    options: SolveOptions,
    scanning: ScanOptions,
    store: Path | None,
) -> Allocation:
    """Scan the ``free`` units (without limits: a store serves all), minimise the summed error, check the sum."""
    probe, bare = probe_for(job.subject, free, prompts, job.settings, scanning)
    sensitivity = scan(
        job.graph,
        free,
        statistics,
        options,
        probe,
        conditioning_hash(job.subject.pipe, prompts),
        levels=scanning.levels,
        store=store,
        quiet=job.quiet,
    )
    errors = [_curve(unit, sensitivity) for unit in job.units]
    bounds: dict[tuple[Pattern, ...], tuple[float, float]] = {}

    def solve(limit: float) -> list[Pattern]:
        found = choose(errors, job.costs.options, limit)
        patterns = [unit.options[i] for unit, i in zip(job.units, found.picked, strict=True)]
        bounds[tuple(patterns)] = found.error, found.bound
        return patterns

    plan, achieved = _meet(job, solve)
    members = [unit.members[0] for unit in job.units]
    chosen = tuple(plan.entries[name] for name in members)
    # settled ratios differ by a few weights from the chosen ones, whose errors these then are
    predicted, bound = bounds.get(chosen) or list(bounds.values())[-1]
    even = meet_with_offsets(job.units, [0.0] * len(job.units), replace(job.costs, limit=_used(job, chosen)))
    reference = plan_of(job.graph, job.base, job.units, even, "uniform", job.budget)
    joint, uniform = joint_errors(job.graph, [plan, reference], statistics, options, probe)
    record = {
        "rule": job.rule,
        "budget": str(job.budget),
        **achieved,
        "predicted_error": predicted,
        "error_bound": bound,
        "joint_error": joint,
        "uniform_joint_error": uniform,
        "scan": {
            **sensitivity.cost,
            "triples": sensitivity.triples,
            "bare_passes": bare,
            "denoiser_calls": probe.recorded + round(len(probe) * (sensitivity.cost["passes"] + CHECKS)),
        },
    }
    return Allocation(plan, record, sensitivity, sensitivity.earlier_s + job.times.earlier_s)


def _used(job: _Job, patterns: Sequence[Pattern]) -> float:
    """The limit for a comparison under the same budget; by the clock only the table's cost of a choice is known."""
    return table_cost(job.units, patterns, job.costs) if job.budget.kind == "latency" else job.costs.limit


def _meet(job: _Job, solve: Callable[[float], list[Pattern]]) -> tuple[Plan, dict[str, Any]]:
    """The plan that ``solve`` gives under the budget, and the budget's figure that it comes to, for the record."""
    if job.budget.kind == "latency":
        patterns, share = _on_the_clock(job, solve)
        achieved: dict[str, Any] = {
            "achieved": share.value,
            "achieved_interval": [share.low, share.high],
            "achieved_processes": share.processes,
        }
    else:
        patterns = solve(job.costs.limit)
        if isinstance(job.base.pattern, Unstructured):
            patterns = settle(job.graph, job.units, patterns, job.costs.limit)
        achieved = {"achieved": achieved_share(job.graph, job.units, patterns, job.costs, job.budget)}
    return plan_of(job.graph, job.base, job.units, patterns, job.rule, job.budget), achieved


def check_request(rule: str, scanning: ScanOptions) -> None:
    """Refuse what can be refused without a pipeline.

    Raises:
        UserError: An unknown rule, or impossible scan options.
    """
    if rule not in ALLOCATIONS:
        raise UserError(f"unknown allocation {rule!r}; choose one of {', '.join(ALLOCATIONS)}")
    check_scan(scanning)


def settings_of(statistics: Statistics, batch_size: int) -> Settings:
    """The settings under which statistics were measured."""
    found = statistics.fingerprint
    call = dict(zip(("height", "width", "max_sequence_length"), found["size"], strict=True))
    call |= {"num_inference_steps": found["steps"], "guidance_scale": found["guidance_scale"], **found["call"]}
    call = {key: value for key, value in call.items() if value is not None}
    return Settings(call, int(found["seed"]), str(found["weighting"]), batch_size=batch_size)


def default_budget(graph: Graph, uniform: Plan) -> Budget:
    """What a uniform plan comes to: total sparsity of its layers, or for structured plans parameters."""
    if not uniform.structured:
        return Budget("sparsity", uniform.pattern.sparsity)
    total = sum(parameter.numel() for parameter in graph.denoiser.parameters())
    gone = 0
    for group in uniform.groups(graph):
        pattern = uniform.entries[group.name]
        assert isinstance(pattern, Structured)
        gone += group_parameters(graph, group, Structured(0, 0)) - group_parameters(graph, group, pattern)
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


def probe_for(
    subject: Subject,
    units: Sequence[Unit],
    prompts: Sequence[str] | Conditioning,
    settings: Settings,
    scanning: ScanOptions,
) -> tuple[Probe, float]:
    """The probe, and how many bare passes over the calibration set a scan on it takes."""
    calls = len(prompts) * int(settings.call.get("num_inference_steps") or 1)
    triples, pipe = triples_of(subject.graph, units, scanning, calls), subject.pipe
    conditioning = prompts if isinstance(prompts, Conditioning) else encode_prompts(pipe, prompts, settings.call)
    probe = record_probe(subject, conditioning, settings, triples)
    return probe, passes_needed(subject.graph, units, scanning.levels) * len(probe) / calls


def triples_of(graph: Graph, units: Sequence[Unit], scanning: ScanOptions, calls: int) -> int:
    """Triples to record, where a calibration pass makes ``calls`` calls of the denoiser (prompts times steps)."""
    if scanning.triples is not None:
        return min(scanning.triples, calls)
    return max(4, min(TRIPLES, calls, int(MOST_PASSES * calls / passes_needed(graph, units, scanning.levels))))


def _curve(unit: Unit, sensitivity: Sensitivity) -> list[float]:
    """The unit's error at each of its options."""
    shares = [removed(option) for option in unit.options]
    return error_curve(sensitivity.solved[unit.name], sensitivity.measured[unit.name], shares)


def _on_the_clock(job: _Job, solve: Callable[[float], list[Pattern]]) -> tuple[list[Pattern], Share]:
    """Patterns that meet a latency budget on the clock."""
    least = sum(min(of_unit) for of_unit in job.costs.options)
    tried: list[tuple[dict[str, int], list[Pattern]]] = []

    def kept(limit: float) -> tuple[dict[str, int], float]:
        patterns = solve(max(limit, least))
        widths = {
            name: kept_units(job.graph.group_of[name], pattern)
            for unit, pattern in zip(job.units, patterns, strict=True)
            for name in unit.members
            if isinstance(pattern, Structured)
        }
        tried.append((widths, patterns))
        return widths, table_cost(job.units, patterns, job.costs)

    best, share = meet_on_the_clock(
        job.subject.pipe,
        job.graph,
        job.budget,
        job.settings.call,
        kept,
        job.costs.limit,
        job.times,
        job.trial,
        job.quiet,
    )
    return next(patterns for widths, patterns in tried if widths == best), share
