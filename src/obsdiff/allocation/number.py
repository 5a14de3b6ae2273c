"""How many stages go under a budget: none, one, two, ..., each number completed by what its layers have to lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from obsdiff.allocation.allocate import Allocation
from obsdiff.allocation.budget import Unmet, dense_cost
from obsdiff.allocation.depth import probe_of, removals, still_spared
from obsdiff.allocation.planning import solve_options
from obsdiff.allocation.request import parse_budget
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.scan import BROKEN
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.info import call_arguments
from obsdiff.models.offload import shelf_of
from obsdiff.models.subject import Subject
from obsdiff.obs.pattern import Depth
from obsdiff.pruning.apply import Job, apply_package
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.shorten import shorten, stages_to_remove
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.surgery import Edits

Allocate = Callable[[Subject, PruningOptions, int, float], tuple[Allocation, Statistics]]


@dataclass(frozen=True)
class Trial:
    """So many stages gone, and the layers of what is left pruned to the budget.

    Attributes:
        plan: Stages and layers; no layers where the stages alone meet the budget.
        error: Of the guided output against the whole dense denoiser's, all of it applied; infinite where the budget
            cannot be met.
        record: How the layers' plan came about.
        denoiser_calls: That it took, calibration and scan.
    """

    plan: Plan
    error: float
    record: dict[str, Any]
    denoiser_calls: int


def choose_number(
    subject: Subject,
    depth: Depth,
    options: PruningOptions,
    prompts: Sequence[str] | Conditioning,
    allocate: Allocate,
    quiet: bool = True,
) -> tuple[Trial, dict[str, Any]]:
    """Complete no removal, one, two, ... by an allocation of what is left, and keep the number of least error.

    Errors of removed stages and of what is pruned inside the others do not add up, so no table of single errors can
    weigh one against the other: every number is applied whole and measured, on calls of the whole pipeline. The search
    ends where one more stage made it worse, or where the stages alone meet the budget.

    Args:
        subject: The pipeline, whole; as before afterwards.
        depth: The number, or None in its place: any.
        options: What is asked for, a budget among it.
        prompts: The calibration's.
        allocate: Calibrates and allocates a shorter pipeline, given what is asked for of it, how many stages went, and
            what the whole denoiser costs.
        quiet: No progress bars.

    Returns:
        The best trial, and for the report all of them.

    Raises:
        UserError: The budget cannot be met with any number.
    """
    assert options.budget is not None
    budget, given = parse_budget(options.budget), options.calibration
    call = call_arguments(subject.pipe, num_inference_steps=given.steps, guidance_scale=given.guidance_scale)
    steps = len(prompts) * int(call.get("num_inference_steps") or 1)
    whole = dense_cost(subject, budget.kind, call)
    most = stages_to_remove(subject, depth, options.spare_blocks)
    probe = probe_of(subject, depth, options, prompts)
    restart = Restart(subject.graph, probe)
    runs, trials, alone = 1, list[Trial](), dict[str, float]()

    def tried(removed: tuple[str, ...], error: float) -> Trial | None:
        edits = Edits(shelf=shelf_of(subject.denoiser))
        try:
            shorter = shorten(edits, subject, removed) if removed else subject
            if removed and dense_cost(shorter, budget.kind, call) <= budget.share * whole:
                return Trial(Plan(Depth(len(removed)), {}, "measured", str(budget), removed=removed), error, {}, 0)
            if depth.then is None:
                return None
            own = replace(options, pattern=str(depth.then), spare_blocks=still_spared(subject, removed, options))
            try:
                found, statistics = allocate(shorter, own, len(removed), whole)
            except Unmet:
                return Trial(Plan(depth, {}, removed=removed), math.inf, {}, 0)
            solving = solve_options(own)
            report = PruneReport(found.plan.pattern, own.method, solving.refits, own.seed, found.plan)
            job = Job(edits, shorter.graph, found.plan, solving, report, quiet=True)
            apply_package(job, found.plan.sites(shorter.graph), statistics)
            calls = steps + found.record.get("scan", {}).get("denoiser_calls", 0)
            error = min(restart.error(), BROKEN)
            return Trial(replace(found.plan, removed=removed), error, found.record, calls)
        finally:
            edits.undo()

    ahead, removed, error = removals(subject, restart, options.spare_blocks, quiet), tuple[str, ...](), 0.0
    for number in range(most + 1):
        if number > 0:
            step = next(ahead, None)
            if step is None:
                break
            runs += len(step.measured)
            alone = alone or step.measured
            removed, error = (*removed, step.stage), step.measured[step.stage]
        if depth.amount is not None and number < most:
            continue
        if (trial := tried(removed, error)) is None:
            continue
        trials.append(trial)
        worse = len(trials) > 1 and trial.error > trials[-2].error
        if worse or (not trial.plan.entries and math.isfinite(trial.error)):
            break
    best = min(trials, key=lambda trial: trial.error, default=None)
    if best is None or not math.isfinite(best.error):
        raise UserError(
            f"budget {budget} cannot be met with up to {len(removed)} stages removed; loosen the budget or the "
            "ceilings, or spare fewer layers and blocks"
        )
    others = sum(trial.denoiser_calls for trial in trials) - best.record.get("scan", {}).get("denoiser_calls", 0)
    return best, {
        "tried": [
            {"removed": list(t.plan.removed), "error": t.error if math.isfinite(t.error) else None} for t in trials
        ],
        "alone": alone,
        "triples": len(probe),
        "denoiser_calls": probe.recorded + (runs + len(trials)) * len(probe) + others,
    }


def number_note(stages: dict[str, Any], of: int) -> str:
    """For people: what was tried, and what came of it."""
    texts = [
        f"{len(trial['removed'])} {'cannot meet it' if trial['error'] is None else format(trial['error'], '.3g')}"
        for trial in stages["tried"]
    ]
    return f"stages removed of {of}, and the output error with the rest pruned to the budget: {', '.join(texts)}"
