"""The one-shot stage as options ask for it: calibrate, allocate, prune. Prune runs and recoveries share it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obsdiff.allocation.allocate import Allocation, allocate
from obsdiff.allocation.depth import prune_depth
from obsdiff.allocation.number import choose_number, number_note
from obsdiff.allocation.planning import (
    allocates,
    check_options,
    check_products,
    depth_of,
    first_plan,
    needs_for,
    packages_for,
    solve_options,
)
from obsdiff.allocation.rank_check import checked_ranks, rank_notes
from obsdiff.allocation.reconstruction import before_reconstruction, reconstruct_stages
from obsdiff.criteria import find_method
from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import in_known_words
from obsdiff.memory import within_memory
from obsdiff.models.conditioning import Conditioning, encode_prompts, told_nothing
from obsdiff.models.denoisers import device_of
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.observers import PASSES
from obsdiff.obs.pattern import Depth
from obsdiff.obs.timesteps import MEASURED
from obsdiff.pruning.alphas import calls_for, named_weighting
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.dead import fate_of_dead, without_dead
from obsdiff.pruning.oneshot import prune, refuse_pruned
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.planfile import fitted_plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.shorten import prune_shorter, stages_to_remove
from obsdiff.pruning.statistics import INDEX, Statistics, open_statistics
from obsdiff.pruning.stream import Stream, check_repeats, stream

LESS = (
    "--calibration.streamed true holds the Hessians of one stage, --calibration.calls_on_disk true its answers on the "
    "disk, --dtype bfloat16 half the weights, and on a cpu --weights_on_disk true one block of them"
)


def calibration_prompts(pipe: Any, options: PruningOptions) -> list[str]:
    """The prompts that the options name, else the pipeline's own; empty ones for a pipeline that is told nothing.

    Raises:
        UserError: There are none, or the pipeline takes none.
    """
    calibration = options.calibration
    if told_nothing(pipe, calibration.prompts):
        return [""] * calibration.num_prompts
    source = calibration.prompts or info_of(pipe).prompts.get("calibration")
    if source is None:
        raise UserError("give calibration.prompts: a file, a dataset (owner/name), or an embedded set")
    prompts = load_prompts(source, calibration.column, calibration.num_prompts, options.seed)
    return in_known_words(prompts, info_of(pipe).alignment)


def prepare(pipe: Any, options: PruningOptions, prune_again: bool = False) -> tuple[Subject, Plan]:
    """The pipeline resolved, and the plan before anything is measured.

    Raises:
        UserError: The plan does not fit, a layer would not be pruned truly, the pipeline is pruned already, or it is
            not gone through stage by stage.
    """
    subject = subject_of(pipe)
    if options.calibration.streamed:
        check_repeats(subject)
    if (depth := depth_of(options)) is not None:
        stages_to_remove(subject, depth, options.spare_blocks)
    plan = first_plan(subject.graph, options)
    if options.dead == "remove" and not plan.removed:  # otherwise its layers are of what will be left
        plan = without_dead(subject.graph, plan, subject.dead, options.exclude)
    subject.check(plan.layers(subject.graph))
    if not prune_again:
        refuse_pruned(subject.graph, info_of(subject.pipe).manifest)
    return subject, plan


def measures(options: PruningOptions, statistics: Path | None) -> bool:
    """Whether the stage calibrates: the method needs it, or a folder was named to keep it in."""
    return bool(needs_for(options, statistics)) or statistics is not None or allocates(options)


def needs_prompts(options: PruningOptions, statistics: Path | None) -> bool:
    """Whether the stage runs the pipeline: to calibrate, to choose stages, or to train them."""
    return measures(options, statistics) or depth_of(options) is not None or options.reconstruction.asked


def keeps_solves(options: PruningOptions, statistics: Path | None) -> bool:
    """Whether layers are kept as they are solved: what they are solved from is there still when a run begins again."""
    return statistics is not None or (options.calibration.streamed and measures(options, statistics))


@dataclass(frozen=True)
class Folders:
    """Where parts of a prune are kept, or found, so that others need not do them again; None: nowhere.

    Attributes:
        statistics, sensitivity: Calibration and scan.
        reconstruction: Stages that a reconstruction has finished.
        solved: Solved layers, where their statistics are kept or streamed; replaced dense weights and masks wait
            on that disk, too.
        calls: On whose disk answers to the calls of a streamed calibration wait, if that is asked for.
    """

    statistics: Path | None = None
    sensitivity: Path | None = None
    reconstruction: Path | None = None
    solved: Path | None = None
    calls: Path | None = None


def prune_stage(
    pipe: Any,
    options: PruningOptions,
    prompts: Sequence[str],
    folders: Folders = Folders(),
    *,
    prune_again: bool = False,
    quiet: bool = True,
) -> PruneReport:
    """Prune a pipeline in place as the options ask; on all processes alike where there are several.

    Args:
        pipe: The dense pipeline, or its Subject. If anything fails, no weight has changed (of a reconstruction that
            fails, the pruned weights are left).
        options: What is asked for.
        prompts: For the calibration.
        folders: To keep parts of it in, or to find them.
        prune_again: Allow a pipeline that is pruned already.
        quiet: No progress bars.

    Returns:
        What was done; its ``allocation`` and ``time_s["allocate"]`` say how an allocated plan came about.

    Raises:
        UserError: The request cannot be met.
    """
    check_options(options, folders.statistics, folders.sensitivity)
    if options.calibration.calls_on_disk and folders.calls is None:
        raise UserError("calibration.calls_on_disk needs a folder for them, and none is given")
    if not keeps_solves(options, folders.statistics):
        folders = replace(folders, solved=None)
    way = _Way(folders, prune_again, quiet)

    def in_batches(size: int) -> PruneReport:
        smaller = replace(options, calibration=replace(options.calibration, batch_size=size))
        return _stage(pipe, smaller, prompts, way)

    return within_memory(in_batches, options.calibration.batch_size, "pruning", LESS)


def _stage(pipe: Any, options: PruningOptions, prompts: Sequence[str], way: _Way) -> PruneReport:
    subject, plan = prepare(pipe, options, way.prune_again)
    check_products(options, way.folders.statistics, device_of(subject.denoiser))
    options, weighing = _weighted(subject, options, prompts, way.folders.statistics)
    depth, quiet, reconstruction = depth_of(options), way.quiet, way.folders.reconstruction

    def layers(shorter: Subject, own: PruningOptions) -> PruneReport:
        if plan.removed:
            fitted = fitted_plan(replace(plan, removed=()), shorter.graph)
            if own.dead == "remove":
                fitted = without_dead(shorter.graph, fitted, shorter.dead, own.exclude)
            return _prune_layers(shorter, fitted, own, prompts, way)
        return _prune_layers(*prepare(shorter, own, prune_again=True), own, prompts, way)

    whole = before_reconstruction(subject, options, prompts, reconstruction) if options.reconstruction.asked else None
    if depth is not None and options.budget is not None:
        report = _prune_numbered(subject, depth, options, prompts, way)
    elif plan.removed or depth is not None:
        report = prune_depth(subject, plan, options, prompts, layers, quiet)
    else:
        report = _prune_layers(subject, plan, options, prompts, way)
    if whole is not None:
        reconstruct_stages(subject.pipe, report, options, whole, quiet)
    if weighing:
        report.weighing_calls = weighing
        report.notes.append(f"timestep weights were measured: {options.calibration.weighting}")
    return report


def _weighted(
    subject: Subject, options: PruningOptions, prompts: Sequence[str], statistics: Path | None
) -> tuple[PruningOptions, int]:
    """The options with the timestep weights that they ask to be measured, and the denoiser calls that took."""
    settings = options.calibration
    if settings.weighting != MEASURED or not needs_prompts(options, statistics):
        return options, 0
    call = call_arguments(subject.pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    found = named_weighting(subject, prompts, MEASURED, call, options.seed)
    return replace(options, calibration=replace(settings, weighting=found)), calls_for(len(found.split(",")))


@dataclass(frozen=True)
class _Way:
    """What of a stage is the same for the whole denoiser and a shorter one."""

    folders: Folders
    prune_again: bool
    quiet: bool

    def without(self, stages: int) -> _Way:
        """Beside the whole denoiser's folders those of what is left where so many stages went."""

        def beside(folder: Path | None) -> Path | None:
            return folder if folder is None or not stages else folder.with_name(f"{folder.name}-without-{stages}")

        there = self.folders
        moved = {name: beside(getattr(there, name)) for name in ("statistics", "sensitivity", "solved")}
        return replace(self, folders=replace(there, **moved))


def _prune_numbered(
    subject: Subject, depth: Depth, options: PruningOptions, prompts: Sequence[str], way: _Way
) -> PruneReport:
    """Choose under a budget how many stages go, then prune by the plan that came of it."""
    started = time.perf_counter()

    def allocated(shorter: Subject, own: PruningOptions, gone: int, whole: float) -> tuple[Allocation, Statistics]:
        at = way.without(gone)
        found = _calibrated(shorter, own, prompts, at, None)
        return allocate(shorter, own, found, prompts, store=at.folders.sensitivity, whole=whole, quiet=way.quiet), found

    best, stages = choose_number(subject, depth, options, prompts, allocated, way.quiet)
    plan, took = best.plan, time.perf_counter() - started
    given = replace(options.calibration, packages=1)
    own = replace(options, pattern=str(depth.then or depth), budget=None, allocation="uniform", calibration=given)

    def layers(shorter: Subject) -> PruneReport:
        fitted = replace(plan, removed=())
        if own.dead == "remove":
            fitted = without_dead(shorter.graph, fitted, shorter.dead, own.exclude)
        return _prune_layers(shorter, fitted, own, prompts, way.without(len(plan.removed)))

    if plan.removed:
        measured = {"alone": stages["alone"], "triples": stages["triples"]}
        report = prune_shorter(subject, plan, layers if plan.entries else None, measured)
    else:
        report = layers(subject)
    report.allocation = {"rule": plan.rule, "budget": options.budget, **best.record, "stages": stages}
    report.notes.append(number_note(stages, sum(stack.count for stack in subject.stacks)))
    report.time_s["allocate"] = report.time_s.get("allocate", 0.0) + took
    return report


def _calibrated(
    subject: Subject, options: PruningOptions, prompts: Sequence[str], way: _Way, sites: set[str] | None
) -> Statistics:
    """The statistics that the options ask for, at some sites (None: all). A folder keeps the inputs of all, since it
    serves every pattern and method; what it does not keep is measured for these alone."""
    settings, wanted = _settings(options, way.folders.statistics), needs_for(options, way.folders.statistics)
    told = _told(subject, options, prompts)

    def measure(sites: set[str] | None, store: Path | None, needs: Collection[str]) -> Statistics:
        return calibrate(subject, told, **settings, store=store, sites=sites, needs=needs, quiet=way.quiet)

    if way.folders.statistics is None:
        return measure(sites, None, wanted)
    found = measure(None, way.folders.statistics, wanted - PASSES)
    if not wanted & PASSES:
        return found
    own = measure(sites, None, wanted & PASSES)
    spent = {**found.time_s, "calibrate": found.time_s["calibrate"] + own.time_s["calibrate"]}
    return replace(found, gradients=own.gradients, gates=own.gates, time_s=spent)


def _told(subject: Subject, options: PruningOptions, prompts: Sequence[str]) -> Sequence[str] | Conditioning:
    """What the calibration tells the denoiser: the prompts, or what they are encoded to without their masks.

    Raises:
        UserError: Padding is to count where there is none, or where the denoiser does not look at it.
    """
    settings = options.calibration
    if not settings.padding:
        return prompts
    if subject.family.mask is not None:
        raise UserError(f"this {subject.family.denoiser} does not attend to padding; leave out --calibration.padding")
    call = call_arguments(subject.pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    told = encode_prompts(subject.pipe, prompts, call)
    if told.text_mask is None:
        raise UserError("nothing says what of these prompts is padding; leave out --calibration.padding")
    return replace(told, text_mask=None, negative_text_mask=None)


def _settings(options: PruningOptions, statistics: Path | None) -> dict[str, Any]:
    """Of a calibration, as the options ask for it."""
    settings = options.calibration
    named = {name: getattr(settings, name) for name in ("steps", "guidance_scale", "tokens", "batch_size")}
    return {**named, "weighting": weighting_of(options, statistics), "seed": options.seed}


def _prune_layers(
    subject: Subject, plan: Plan, options: PruningOptions, prompts: Sequence[str], way: _Way
) -> PruneReport:
    """Calibrate, allocate, prune what is there."""
    statistics, quiet = way.folders.statistics, way.quiet
    graph, dead = subject.graph, [] if options.dead == "ignore" else subject.dead

    def measure(sites: set[str] | None) -> Statistics:
        return _calibrated(subject, options, prompts, way, sites)

    found: Any = measure if measures(options, statistics) else None
    if found is not None and options.calibration.streamed:
        told, needs = _told(subject, options, prompts), needs_for(options, None)
        found = stream(subject, told, **_settings(options, None), needs=needs, quiet=quiet)
        if options.calibration.calls_on_disk:
            assert way.folders.calls is not None
            found.keep_on_disk(way.folders.calls)
    ranked = plan.structured and any(group.basis is not None for group in plan.groups(graph))
    if allocates(options) or statistics is not None or (ranked and packages_for(options, statistics) == 1):
        found = measure(plan.sites(graph))
    record, allocate_s, notes = None, 0.0, []
    if allocates(options):
        started = time.perf_counter()
        allocation = allocate(subject, options, found, prompts, store=way.folders.sensitivity, quiet=quiet)
        plan, record, notes = allocation.plan, allocation.record, allocation.notes
        allocate_s = allocation.earlier_s + time.perf_counter() - started
        if options.dead == "remove":
            plan = without_dead(graph, plan, dead, options.exclude)
    ranks = checked_ranks(subject, plan, found, options, prompts, quiet)
    report = prune(
        subject,
        plan,
        method=solve_options(options),
        statistics=found,
        packages=None if options.calibration.streamed else packages_for(options, statistics),
        prune_again=way.prune_again,
        solved=way.folders.solved if isinstance(found, Statistics | Stream) else None,
        quiet=quiet,
    )
    report.dead = fate_of_dead(graph, plan, dead) if options.dead == "remove" else dict.fromkeys(dead, "left")
    report.allocation, report.ranks = record, ranks
    report.notes += notes + rank_notes(ranks)
    report.time_s["allocate"] = allocate_s
    return report


def weighting_of(options: PruningOptions, statistics: Path | None) -> str:
    """Timestep weights: as asked, else those of a finished store (which serves every method), else the method's own."""
    stored = None
    if statistics is not None and (statistics / INDEX).exists():
        stored = str(open_statistics(statistics).fingerprint.get("weighting"))
    return options.calibration.weighting or stored or find_method(options.method).weighting
