"""Which plan pruning options ask for: a file's, the uniform one, or one allocated under a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from obsdiff.allocation.effort import passes_needed, triples_of
from obsdiff.allocation.request import check_values
from obsdiff.allocation.units import make_units
from obsdiff.criteria import find_method
from obsdiff.errors import UserError
from obsdiff.models.graph import Graph
from obsdiff.obs.observers import PASSES
from obsdiff.obs.pattern import NM, Depth, Hybrid, Request, of_layers, of_units, parse_request
from obsdiff.obs.precision import check_precision
from obsdiff.pruning.defaults import pattern_by
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.oneshot import check_solving, needed
from obsdiff.pruning.options import Limits, PruneOptions, PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan, make_plan, parted
from obsdiff.pruning.planfile import parse_plan, read_plan
from obsdiff.pruning.statistics import INDEX


def rule_of(options: PruningOptions) -> str:
    """The allocation rule; the default is the method's own, which asks for one calibration of the dense model.

    N:M stays uniform by default: kernels that use it are made for one N, and a mixture holds others. So does a rank
    that is given.
    """
    if options.allocation is not None:
        return options.allocation
    if options.plan is not None or options.calibration.streamed or (options.calibration.packages or 1) > 1:
        return "uniform"
    request = parse_request(options.pattern)
    pattern, units = of_layers(request), of_units(request)
    if pattern is None:
        return "uniform"
    ranks = units is not None and not units.cuts and options.budget is None
    if ranks or isinstance(pattern, NM):
        return "uniform"
    return find_method(options.method).allocation


def solve_options(options: PruningOptions) -> SolveOptions:
    """How layers are solved."""
    return SolveOptions(
        options.method,
        options.refit,
        options.seed,
        options.calibration.damping,
        options.fusion,
        options.compared_columns,
        options.refit_steps,
    )


def allocates(options: PruningOptions) -> bool:
    """Whether statistics and a budget decide, not the pattern alone."""
    return rule_of(options) != "uniform" or options.budget is not None


def packages_for(options: PruningOptions, statistics: Path | None) -> int:
    """Calibration passes: as asked, else the method's own where it can be calibrated anew, else one."""
    if options.calibration.packages is not None:
        return options.calibration.packages
    once = options.calibration.streamed or calibrates_once(options, statistics)
    return 1 if once else find_method(options.method).packages


def calibrates_once(options: PruningOptions, statistics: Path | None) -> bool:
    """Whether one calibration of the dense model serves all: it is kept, an allocation goes by it, or a hybrid does."""
    return statistics is not None or allocates(options) or isinstance(of_layers(pattern_of(options)), Hybrid)


def pattern_of(options: PruningOptions) -> Request:
    """The pattern that is asked for, or that of the plan file."""
    return parse_request(options.pattern) if options.plan is None else parse_plan(options.plan)[0].pattern


def depth_of(options: PruningOptions) -> Depth | None:
    """How many stages go, where that is asked for by number."""
    request = None if options.plan is not None else parse_request(options.pattern)
    return request if isinstance(request, Depth) else None


def needs_for(options: PruningOptions, statistics: Path | None) -> frozenset[str]:
    """What a calibration measures: what the method needs; of layer inputs all there is where they are kept, for every
    other method too, or where an allocation goes by them."""
    kept = statistics is not None and not (statistics / INDEX).exists()
    pattern = of_layers(pattern_of(options))
    if pattern is None:
        return frozenset()
    own = needed(pattern, solve_options(options))
    found = frozenset({"gram"}) | (own & PASSES) if kept or allocates(options) else own
    precision = options.calibration.precision
    return found | {precision} if precision is not None and ("gram" in found or statistics is not None) else found


def check_options(options: PruningOptions, statistics: Path | None = None, sensitivity: Path | None = None) -> None:
    """Refuse what needs no pipeline to refuse: contradictions, unknown names, unreadable files.

    Args:
        options: What is asked for.
        statistics, sensitivity: Folders to keep calibration and scan in, if the user named any.

    Raises:
        UserError: The request cannot be met.
    """
    check_values(options)
    pattern = of_layers(pattern_of(options))
    packages, streamed = packages_for(options, statistics), options.calibration.streamed
    if streamed and options.calibration.packages is not None:
        raise UserError("a streamed calibration goes stage by stage; leave out --calibration.packages")
    if options.calibration.calls_on_disk and not streamed:
        raise UserError(
            "--calibration.calls_on_disk is of a streamed calibration's calls; leave it out, or add "
            "--calibration.streamed true"
        )
    unmeasured = pattern is not None and not needs_for(options, statistics)
    if unmeasured and packages > 1:
        raise UserError(
            f"method {options.method} measures nothing, so there are no passes; use --calibration.packages 1"
        )
    if unmeasured and streamed:
        offload = isinstance(options, PruneOptions) and options.offload  # which goes by stages all the same
        told = (("streamed", not offload), ("calls_on_disk", options.calibration.calls_on_disk))
        if unused := " and ".join(f"--calibration.{name}" for name, wrong in told if wrong):
            raise UserError(f"method {options.method} measures nothing, so there are no calls; leave out {unused}")
    if pattern is None and (statistics is not None or sensitivity is not None):
        name = "statistics" if statistics is not None else "sensitivity"
        raise UserError(f"{pattern_of(options)} alone keeps no {name}; leave out --{name}, or add a pattern")
    if pattern is not None:
        check_solving(pattern, solve_options(options), packages, streamed)
    rule = rule_of(options)
    precision = options.calibration.precision
    if precision not in (None, "float32") and statistics is None and "gram" not in needs_for(options, None):
        what = pattern_of(options) if pattern is None else options.method
        raise UserError(f"--calibration.precision {precision} is of whole Hessians, and {what} asks for none")
    if (packages > 1 or streamed) and statistics is not None:
        what = "a streamed calibration measures" if streamed else "several packages calibrate"
        other = "leave out --calibration.streamed" if streamed else "use --calibration.packages 1"
        raise UserError(
            f"{what} with earlier layers pruned, which a statistics folder cannot hold; "
            f"leave out --statistics or {other}"
        )
    if options.plan is not None:
        chosen = options.include or options.exclude or options.spare_blocks is not None
        if options.allocation is not None or options.budget is not None or options.limits != Limits() or chosen:
            raise UserError(
                "a plan names its layers and their patterns; leave out allocation, budget, limits, include, exclude "
                "and spare_blocks, or the plan"
            )
    if (packages > 1 or streamed) and allocates(options):
        other = "leave out --calibration.streamed" if streamed else "use --calibration.packages 1"
        raise UserError(f"an allocation goes by one calibration of the dense model; {other}, or give its plan.yaml")
    scanned = replace(options.scan, triples=None) if depth_of(options) is not None else options.scan
    if rule != "measured" and (scanned != ScanOptions() or sensitivity is not None):
        raise UserError("sensitivity and scan options belong to --allocation measured")
    if options.limits != Limits() and not allocates(options):
        raise UserError("floors, ceilings and shared values need --allocation measured or owl, or a --budget")


def check_products(options: PruningOptions, statistics: Path | None, device: torch.device) -> None:
    """Refuse a calibration in a precision that the device does not have; what is kept is read anywhere.

    Raises:
        UserError: Naming those that it has.
    """
    if statistics is None or not (statistics / INDEX).exists():
        check_precision(needs_for(options, statistics), device)


def first_plan(graph: Graph, options: PruningOptions) -> Plan:
    """The plan before anything is measured: the file's, or the uniform one.

    Raises:
        UserError: The plan does not fit the denoiser.
    """
    if options.plan is not None:
        return read_plan(options.plan, graph)
    request = parse_request(options.pattern)
    pattern = of_layers(request)
    if pattern is None:
        return Plan(request, {})
    spared: Any = options.spare_blocks
    if not allocates(options):  # otherwise the shares decide, and widths come in steps that are fast
        pattern = pattern_by(options.method, pattern)
    elif rule_of(options) == "measured" and spared is None:
        spared = ()
    return make_plan(graph, pattern, options.include, options.exclude, spared)


def describe_scan(graph: Graph, plan: Plan, options: PruningOptions, prompts: int, steps: int) -> str:
    """For people: what a sensitivity scan is about to run, unless its folder holds it already."""
    units = make_units(graph, parted(plan)[0], Limits(share=options.limits.share))
    triples = triples_of(graph, units, options.scan, prompts * steps)
    passes = passes_needed(graph, units, options.scan.levels, options.scan.by, triples) * triples / (prompts * steps)
    return (
        f"sensitivity scan: {len(units)} layers or groups on {triples} recorded calls, {passes:.1f} times the denoiser "
        "calls of a calibration pass"
    )
