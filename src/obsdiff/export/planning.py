"""Which plan a prune run follows: a file's, the uniform one, or one allocated under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obsdiff.allocation.allocate import ScanOptions, allocate, check_request, triples_of
from obsdiff.allocation.budget import parse_budget
from obsdiff.allocation.scan import passes_needed
from obsdiff.allocation.units import Limits, make_units
from obsdiff.errors import UserError
from obsdiff.models.wiring import Wiring
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning.plan import Plan, make_plan
from obsdiff.pruning.planfile import parse_plan, read_plan
from obsdiff.pruning.solve import SolveOptions
from obsdiff.pruning.statistics import Statistics


@dataclass(frozen=True)
class PlanRequest:
    """How the plan of a run comes about; see :func:`obsdiff.allocate` for the fields.

    Attributes:
        file: A plan file; its patterns stand in place of the run's pattern.
        rule: "uniform", "measured" or "owl".
        budget: What may stay; None: what the run's pattern costs when it is uniform.
    """

    file: Path | None = None
    rule: str = "uniform"
    budget: str | None = None
    scanning: ScanOptions = field(default_factory=ScanOptions)
    limits: Limits = field(default_factory=Limits)

    @property
    def allocates(self) -> bool:
        """Whether statistics and a budget decide, not the pattern alone."""
        return self.rule != "uniform" or self.budget is not None


def check_plan_request(
    request: PlanRequest, include: Sequence[str], exclude: Sequence[str], spare_blocks: Sequence[int] | None
) -> None:
    """Refuse what needs no pipeline to refuse: contradictions, unknown names, unreadable files.

    Raises:
        UserError: The request cannot be met.
    """
    check_request(request.rule, request.scanning)
    if request.budget is not None:
        parse_budget(request.budget)
    if request.file is not None:
        parse_plan(request.file)
        if request.allocates or request.limits != Limits() or include or exclude or spare_blocks is not None:
            raise UserError(
                "a plan names its layers and their patterns; leave out allocation, budget, limits, include, exclude "
                "and spare_blocks, or the plan"
            )
    if request.rule != "measured" and request.scanning != ScanOptions():
        raise UserError("sensitivity and scan options belong to --allocation measured")
    if not request.allocates and request.limits != Limits():
        raise UserError("floors, ceilings and shared values need --allocation measured or owl, or a --budget")


def first_plan(
    wiring: Wiring,
    request: PlanRequest,
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
    spare_blocks: Sequence[int] | None,
) -> Plan:
    """The plan before anything is measured: the file's, or the uniform one.

    Raises:
        UserError: The plan does not fit the denoiser.
    """
    if request.file is not None:
        return read_plan(request.file, wiring)
    spared = () if request.rule == "measured" and spare_blocks is None else spare_blocks
    return make_plan(wiring, parse_pattern(pattern), include, exclude, spared)


def describe_scan(wiring: Wiring, plan: Plan, request: PlanRequest, prompts: int, steps: int) -> str:
    """For people: what a sensitivity scan is about to run, unless its folder holds it already."""
    units = make_units(wiring, plan, Limits(share=request.limits.share))
    triples = triples_of(wiring, units, request.scanning, prompts * steps)
    passes = passes_needed(wiring, units, request.scanning.levels) * triples / (prompts * steps)
    return (
        f"sensitivity scan: {len(units)} layers or groups on {triples} recorded calls, {passes:.1f} times the denoiser "
        "calls of a calibration pass"
    )


def allocated_plan(
    pipe: Any,
    request: PlanRequest,
    pattern: str,
    statistics: Statistics,
    prompts: Sequence[str],
    options: SolveOptions,
    **more: Any,
) -> tuple[Plan, dict[str, Any]]:
    """The plan that meets the budget, and how it came about."""
    found = allocate(
        pipe,
        pattern,
        statistics,
        prompts,
        rule=request.rule,
        budget=request.budget,
        options=options,
        scanning=request.scanning,
        limits=request.limits,
        **more,
    )
    return found.plan, found.record
