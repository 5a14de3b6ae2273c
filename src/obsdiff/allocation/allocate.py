"""From statistics and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from obsdiff.allocation.assemble import kept_cost, plan_of, settle
from obsdiff.allocation.budget import Costs, Unmet, costs_of, table_cost, true_cost
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.curves import error_curve
from obsdiff.allocation.depth import choose_stages
from obsdiff.allocation.effort import passes_needed, triples_of
from obsdiff.allocation.joint import joint_errors
from obsdiff.allocation.knapsack import choose
from obsdiff.allocation.latency import latency_costs, meet_latency, timing_of
from obsdiff.allocation.owl import owl_offsets
from obsdiff.allocation.planning import check_options, depth_of, rule_of, solve_options
from obsdiff.allocation.probe import Probe, record_probe
from obsdiff.allocation.request import Budget, parse_budget
from obsdiff.allocation.scan import Sensitivity, scan
from obsdiff.allocation.targets import meet_with_offsets
from obsdiff.allocation.units import Unit, make_units, removed
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, check_prompts, encode_prompts
from obsdiff.models.graph import Graph, more_with
from obsdiff.models.offload import refuse_offloaded
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.pattern import Depth, Hybrid, Pattern, Structured, Unstructured, of_layers, parse_request
from obsdiff.pruning.fingerprint import Settings, conditioning_hash
from obsdiff.pruning.options import Limits, PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan, kept_units, make_plan, parts_of_hybrid, with_weights
from obsdiff.pruning.statistics import Statistics, check_measured_on, check_serves

Count = Callable[[Sequence[Pattern]], float]  # of what the whole denoiser costs with these patterns
CHECKS = 3  # passes of the probe that compare the plan and the uniform one with the dense outputs


@dataclass(frozen=True)
class Allocation:
    """A plan and how it came about.

    Attributes:
        plan: What to prune.
        record: For reports: rule, budget, what it came to (of latency with a 95 % interval), errors, and what the scan
            cost; JSON-able.
        sensitivity: The scan, of the measured rule.
    """

    plan: Plan
    record: dict[str, Any]
    sensitivity: Sensitivity | None = None

    @property
    def notes(self) -> list[str]:
        """For people: what was not done as it was asked for."""
        return [self.sensitivity.note] if self.sensitivity is not None and self.sensitivity.note else []

    @property
    def earlier_s(self) -> float:
        """Seconds that earlier runs spent on the scan that the store held."""
        return 0.0 if self.sensitivity is None else self.sensitivity.earlier_s


def allocate(
    pipe: Any,
    options: PruningOptions,
    statistics: Statistics | None,
    prompts: Sequence[str] | Conditioning,
    *,
    store: str | Path | None = None,
    whole: float | None = None,
    quiet: bool = True,
) -> Allocation:
    """Give each layer (structured: each attention and feed-forward module) its own pattern under one budget.

    Args:
        pipe: The dense pipeline, or its Subject; as before afterwards.
        options: What is asked for. Of ``pattern`` the kind is what layers get, at shares of their own; ``allocation``
            is "measured" (a sensitivity scan, then the least summed error), "owl" (2310.05175) or "uniform"; without a
            ``budget`` it is what the uniform plan costs (total sparsity; structured: parameters). The scan prunes with
            ``method`` and its options.
        statistics: Of a calibration of all layers; None for "depth:2" alone, which needs none.
        prompts: The calibration's prompts; the scan draws its triples from them.
        store: Folder to keep the scan in, and what was timed; what it holds of the same settings (and, of times, the
            same machine) is not measured again.
        whole: What a budget in parameters, bytes or FLOPs is a share of, where stages went before; None: of this
            denoiser.
        quiet: No progress bar.

    Raises:
        UserError: The request cannot be met.
    """
    check_options(options)
    if (depth := depth_of(options)) is not None:
        return _stages(subject_of(pipe, prompts), depth, options, prompts, quiet)
    if options.plan is not None:
        raise UserError(f"the plan {options.plan} has a pattern for each layer; leave it out to allocate")
    check_prompts(prompts)
    subject, rule, folder = subject_of(pipe, prompts), rule_of(options), None if store is None else Path(store)
    refuse_offloaded(subject.denoiser, "an allocation")
    graph = subject.graph
    budget, base, weights = _asked(graph, options)
    subject.check([*base.layers(graph), *([] if weights is None else weights.layers(graph))])

    def completed(patterns: Sequence[Pattern], rule: str) -> Plan:
        cut = plan_of(graph, base, units, patterns, rule, budget)
        return cut if weights is None else with_weights(graph, cut, weights)

    if statistics is None:
        raise UserError(f"allocating {options.pattern} needs statistics; calibrate")
    check_measured_on(statistics, graph.denoiser)
    check_serves(statistics, {"gram"} if rule == "measured" else {"diagonal"}, f"the {rule} allocation")
    settings = settings_of(statistics, options.calibration.batch_size)
    units = make_units(graph, base, options.limits)
    timing = timing_of(subject.pipe, graph, settings.call, folder) if budget.kind == "latency" else None
    if timing is None:
        costs = costs_of(subject, units, budget, settings.call, whole)
    else:
        costs = latency_costs(graph, units, budget, timing)
    count: Count | None = None
    if isinstance(base.pattern, Structured) and timing is None:
        count = partial(true_cost, subject, units, budget=budget, call=settings.call)
    _check_feasible(units, costs, budget, count)
    scanned = None
    if rule == "measured":
        scanned = _scanned(subject, base, options, statistics, prompts, settings, folder, quiet)
        errors = [_curve(unit, scanned.sensitivity) for unit in units]
        solve: Callable[[float], list[Pattern]] = partial(_least, units, errors, costs)
    else:
        offsets = owl_offsets(graph, units, statistics) if rule == "owl" else [0.0] * len(units)
        solve = partial(meet_with_offsets, units, offsets, costs)
    record: dict[str, Any] = {"rule": rule, "budget": str(budget)}
    limit = costs.limit
    if timing is None:
        if count is not None:
            patterns, limit, cost = _within(solve, units, costs, count)
        else:
            patterns = solve(limit)
            if isinstance(base.pattern, Unstructured):
                patterns = settle(graph, units, patterns, limit)
            cost = kept_cost(graph, units, patterns, costs) + costs.fixed
        share = cost / costs.dense
        record["achieved"] = 1 - share if budget.kind == "sparsity" else share
    else:
        patterns, (share, *interval) = meet_latency(graph, units, budget, costs, timing, solve, quiet)
        record |= {"achieved": share, "achieved_interval": interval}
        limit = table_cost(units, patterns, costs) + 1e-9 * costs.dense  # compared at what the choice costs
    plan = completed(patterns, rule)
    if scanned is None:
        return Allocation(plan, record)
    sensitivity, probe = scanned.sensitivity, scanned.probe
    alike: Callable[[float], list[Pattern]] = partial(meet_with_offsets, units, [0.0] * len(units), costs)
    even = completed(alike(limit) if count is None else _within(alike, units, costs, count)[0], "uniform")
    found, bound = choose(errors, costs.options, limit), choose(errors, costs.options, max(limit, costs.limit)).bound
    joint, uniform = joint_errors(Solver(graph, statistics, solve_options(options)), [plan, even], probe)
    record |= {
        "predicted_error": found.error,
        "error_bound": bound,
        "joint_error": joint,
        "uniform_joint_error": uniform,
        "scan": {
            **sensitivity.cost,
            "by": sensitivity.way,
            "note": sensitivity.note,
            "triples": sensitivity.triples,
            "bare_passes": scanned.bare_passes,
            "denoiser_calls": probe.recorded + round(len(probe) * (sensitivity.cost["passes"] + CHECKS)),
        },
    }
    return Allocation(plan, record, sensitivity)


def _stages(
    subject: Subject, depth: Depth, options: PruningOptions, prompts: Sequence[str] | Conditioning, quiet: bool
) -> Allocation:
    """The plan that removes the stages that cost least."""
    if depth.then is not None or depth.amount is None:
        if depth.amount is None:
            raise UserError(f"{depth}: how many stages go is chosen as it prunes (obsdiff prune); give a number here")
        raise UserError(
            f"{depth}: allocate {replace(depth, then=None)}, prune by its plan, and allocate {depth.then} on the "
            "pipeline that is left"
        )
    choice = choose_stages(subject, depth, options, prompts, quiet)
    return Allocation(Plan(depth, {}, removed=choice.stages), choice.to_json())


def _asked(graph: Graph, options: PruningOptions) -> tuple[Budget, Plan, Plan | None]:
    """The budget; the uniform plan of what is allocated; and that of the single weights that go afterwards, as if all
    units stayed. The measured rule spares no stage unless told to."""
    pattern, spared = of_layers(parse_request(options.pattern)), options.spare_blocks
    assert pattern is not None  # depth alone is answered before
    chosen = options.include, options.exclude
    if options.budget is None:
        budget = default_budget(graph, make_plan(graph, pattern, *chosen, spared))
    else:
        budget = parse_budget(options.budget)
    if isinstance(pattern, Unstructured) and budget.kind == "sparsity":
        pattern = Unstructured(budget.share)
    if rule_of(options) == "measured" and spared is None:
        spared = []
    if isinstance(pattern, Hybrid):
        return budget, *parts_of_hybrid(graph, pattern, *chosen, spared)
    return budget, make_plan(graph, pattern, *chosen, spared), None


@dataclass(frozen=True)
class _Scanned:
    """A scan, the calls that it was measured on, and its cost in bare passes over the calibration set."""

    sensitivity: Sensitivity
    probe: Probe
    bare_passes: float


def _scanned(
    subject: Subject,
    base: Plan,
    options: PruningOptions,
    statistics: Statistics,
    prompts: Sequence[str] | Conditioning,
    settings: Settings,
    store: Path | None,
    quiet: bool,
) -> _Scanned:
    """Scan all units without their limits, so that a store serves all."""
    units = make_units(subject.graph, base, Limits(share=options.limits.share))
    probe, bare = probe_for(subject, units, prompts, settings, options.scan)
    sensitivity = scan(
        Solver(subject.graph, statistics, solve_options(options)),
        units,
        probe,
        conditioning_hash(subject.pipe, prompts),
        levels=options.scan.levels,
        by=options.scan.by,
        store=store,
        quiet=quiet,
    )
    return _Scanned(sensitivity, probe, bare)


def _within(
    solve: Callable[[float], list[Pattern]],
    units: Sequence[Unit],
    costs: Costs,
    count: Count,
) -> tuple[list[Pattern], float, float]:
    """Patterns that truly cost no more than may stay; the limit by the tables that gave them; and what they cost."""
    limit = costs.limit
    while True:  # what the tables have twice is most where the options are cheapest, which fit
        patterns = solve(limit)
        cost = count(patterns)
        if (over := cost - costs.fixed - costs.limit) <= 0:
            return patterns, limit, cost
        limit = table_cost(units, patterns, costs) - over


def _least(units: Sequence[Unit], errors: Sequence[Sequence[float]], costs: Costs, limit: float) -> list[Pattern]:
    """The patterns of the least summed error within the limit."""
    picked = choose(errors, costs.options, limit).picked
    return [unit.options[i] for unit, i in zip(units, picked, strict=True)]


def _curve(unit: Unit, sensitivity: Sensitivity) -> list[float]:
    """The unit's error at each of its options."""
    shares = [removed(option) for option in unit.options]
    return error_curve(sensitivity.solved[unit.name], sensitivity.errors(unit.name), shares)


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
    kept = {group.name: kept_units(group, uniform.modules[group.name]) for group in uniform.groups(graph)}
    return Budget("parameters", (total + more_with(graph, kept)) / total)


def _check_feasible(units: Sequence[Unit], costs: Costs, budget: Budget, count: Count | None) -> None:
    cheapest = [unit.options[of_unit.index(min(of_unit))] for unit, of_unit in zip(units, costs.options, strict=True)]
    least = table_cost(units, cheapest, costs) + costs.fixed if count is None else count(cheapest)
    if least - costs.fixed > costs.limit:
        share = least / costs.dense
        best = f"sparsity:{math.floor((1 - share) * 1e4) / 1e4:g}" if budget.kind == "sparsity" else f"{share:.2%}"
        raise Unmet(
            f"budget {budget} cannot be met: with these layers, floors and ceilings the least is {best}; "
            "loosen the budget or the ceilings, or spare fewer layers and blocks"
        )


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
    passes = passes_needed(subject.graph, units, scanning.levels, scanning.by, len(probe))
    return probe, passes * len(probe) / calls
