"""A whole prune run: sample the dense pipeline, prune it, sample it again, measure, and write everything at once."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.allocation.announce import announce
from obsdiff.allocation.fitting import Planned, plan_loaded
from obsdiff.allocation.planning import check_options, check_products
from obsdiff.allocation.request import check_offload
from obsdiff.allocation.stage import (
    Folders,
    calibration_prompts,
    keeps_solves,
    prepare,
    prune_stage,
)
from obsdiff.errors import UserError
from obsdiff.evaluation.evaluate import Images, evaluation_of
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.intervals import finite_images
from obsdiff.evaluation.prompts import evaluation_prompts
from obsdiff.evaluation.references import sample_shared
from obsdiff.evaluation.suite import Suite, load_suite
from obsdiff.export.heatmap import draw_ratios
from obsdiff.export.memory_report import short_plan
from obsdiff.export.places import check_places, finite, pipeline_bytes, write_or_rescue
from obsdiff.export.report import draw_samples, render_markdown, steps_taken
from obsdiff.files import check_space, write_json, write_text
from obsdiff.memory import peak_memory_bytes, within_memory
from obsdiff.models.denoisers import device_of
from obsdiff.models.graph import Graph
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.offload import is_offloaded, shelf_of
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.pattern import Depth
from obsdiff.paths import unfinished_solves, unfinished_stages
from obsdiff.pruning.finished import remove_finished
from obsdiff.pruning.folder import write_pipeline
from obsdiff.pruning.manifest import FILE
from obsdiff.pruning.memory_plan import meanwhile_bytes
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.solved import remove_solved
from obsdiff.pruning.statistics import INDEX
from obsdiff.ranks import rank, wait_for_all, world_size
from obsdiff.versions import versions

SHOWN = 8  # pairs in samples.png
STAGES = ("calibrate", "forward_only", "allocate", "solve", "reconstruct")


@dataclass(frozen=True)
class Samples:
    """Images of the evaluation, (n, c, h, w) in [0, 1]."""

    dense: Tensor
    pruned: Tensor
    prompts: list[str]
    seeds: list[int]
    suite: Suite


def prune_run(pipe: Any, options: PruneOptions, quiet: bool = False) -> dict[str, Any]:
    """Do it, and leave the artifacts in ``options.output``; several processes share the work, the first one writes.

    Args:
        pipe: The dense pipeline that ``options.pipeline`` names; pruned in place.
        options: What is asked for.
        quiet: Say nothing about progress.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: The request cannot be met; nothing was written then.
    """
    started = time.perf_counter()
    quiet = quiet or rank() > 0
    statistics, sensitivity = (None if p is None else Path(p) for p in (options.statistics, options.sensitivity))
    stages, solves = unfinished_stages(options.output), unfinished_solves(options.output)
    check_places(options)
    check_options(options, statistics, sensitivity)
    subject, plan = prepare(pipe, options, options.prune_again)
    check_offload(options)
    if options.weights_on_disk and shelf_of(subject.denoiser) is None:
        raise UserError('weights_on_disk is of a pipeline whose weights rest there; call obsdiff.offload(pipe, "cpu", '
                        "folder) before")  # fmt: skip
    check_products(options, statistics, device_of(subject.denoiser))
    keeps = keeps_solves(options, statistics)
    meanwhile = _kept_meanwhile(subject, plan, keeps)
    check_space(Path(options.output), pipeline_bytes(pipe) + meanwhile)
    prompts = calibration_prompts(pipe, options)
    evaluated = evaluation_prompts(pipe, options.evaluation, options.calibration)
    seeds = list(range(options.evaluation.seed, options.evaluation.seed + len(evaluated)))
    reused = statistics is not None and (statistics / INDEX).exists()
    if not quiet:
        announce(subject, plan, options, len(prompts), statistics)
        if evaluated:
            print(f"evaluation: {len(evaluated)} images each by the dense and the pruned pipeline", file=sys.stderr)
        print(f"the result will lie in {options.output}", file=sys.stderr)
    flops_dense = denoiser_flops(subject, call_arguments(pipe))
    if not quiet or options.calibration.calls_on_disk:
        planned = _plan(subject, options, flops_dense)
        if isinstance(planned, Planned):
            check_space(Path(options.output), pipeline_bytes(pipe) + meanwhile + planned.memory.batches.on_disk)
        if not quiet:
            print(planned if isinstance(planned, str) else short_plan(planned), file=sys.stderr)
    suite = load_suite(info_of(pipe).alignment, options.evaluation, pipe._execution_device) if evaluated else Suite({})

    def draw(allow_nonfinite: bool) -> Tensor | None:
        if not evaluated:
            return None

        def in_batches(size: int) -> Tensor:
            return sample_shared(pipe, evaluated, seeds, size, quiet, allow_nonfinite)

        return within_memory(in_batches, options.evaluation.batch_size, "drawing", "--dtype bfloat16 takes less")

    dense = draw(allow_nonfinite=False)
    done = prune_stage(
        subject,
        options,
        prompts,
        Folders(statistics, sensitivity, stages, solves, solves.parent),
        prune_again=options.prune_again,
        quiet=quiet,
    )
    subject = subject_of(pipe)  # stages may be gone
    pruned = draw(allow_nonfinite=True)  # what was pruned is not lost because it cannot be measured
    if pruned is not None and not bool(finite_images(pruned).all()) and rank() == 0:
        warnings.warn("images of the pruned pipeline are not finite; the report has no figures of them", stacklevel=2)
    images = None if dense is None or pruned is None else Samples(dense, pruned, evaluated, seeds, suite)
    report = _report(subject, done, options, len(prompts), reused, flops_dense, images)
    report["time_s"]["total"] = time.perf_counter() - started
    report["peak_memory_bytes"] = peak_memory_bytes(pipe._execution_device)
    if rank() == 0:
        write_or_rescue(
            Path(options.output),
            FILE,
            options.overwrite,
            lambda folder: _write(pipe, folder, done, subject.graph, report, images),
            _kept(statistics, sensitivity),
        )
        remove_finished(stages)
        remove_solved(solves)
    wait_for_all()
    return report


def _kept_meanwhile(subject: Subject, plan: Plan, keeps: bool) -> int:
    """Bytes that come to the disk before the output is written."""
    weights, resting = map(subject.graph.weight, plan.layers(subject.graph)), shelf_of(subject.denoiser) is not None
    return sum(sum(meanwhile_bytes(w.numel(), w.element_size(), keeps, resting, world_size())) for w in weights)


def _plan(subject: Subject, options: PruneOptions, flops: int) -> Planned | str:
    """What the run will take; or for people, why nothing says."""
    try:
        return plan_loaded(subject, options, flops)
    except Exception as error:  # whatever a model does to counting its call: a run needs no plan
        return f"memory is not planned: {' '.join(str(error).split())[:200]}"


def _kept(statistics: Path | None, sensitivity: Path | None) -> str:
    """For people: what a run that could not be written can be repeated from."""
    places = [f"{what} in {place}" for what, place in (("calibration", statistics), ("scan", sensitivity)) if place]
    if not places:
        return "nothing is kept, since neither --statistics nor --sensitivity named a folder"
    return f"kept are the {' and the '.join(places)}, from which the same command goes on"


def _write(
    pipe: Any, folder: Path, done: PruneReport, graph: Graph, report: dict[str, Any], images: Samples | None
) -> None:
    """The artifacts of a run."""
    write_pipeline(pipe, folder, done)
    write_json(folder / "report.json", finite(report))
    write_text(folder / "report.md", render_markdown(report))
    if done.plan.rule != "uniform":
        title = f"{report['pipeline']}, {report['method']}, {done.plan.budget}"
        draw_ratios(folder / "ratios.png", graph, done.sparsity_per_layer, title)
    if images is not None:
        title = f"{report['pipeline']}, {report['pattern']}, {report['method']}"
        rows = {"dense": images.dense, "pruned": images.pruned}
        draw_samples(folder / "samples.png", rows, images.prompts[:SHOWN], images.seeds[:SHOWN], title)


def _requested(done: PruneReport) -> float:
    """The sparsity that was asked for; of budgets in something else, what the plan came to; of stages alone, what they
    hold."""
    kind, _, share = (done.plan.budget or "").partition(":")
    if kind == "parameters":
        return 1 - float(share)
    if isinstance(done.plan.pattern, Depth):
        return done.sparsity
    return float(share) if kind == "sparsity" else done.plan.pattern.sparsity


def _report(
    subject: Subject,
    done: PruneReport,
    options: PruneOptions,
    num_prompts: int,
    reused: bool,
    flops_dense: int,
    images: Samples | None,
) -> dict[str, Any]:
    info, settings, measured = info_of(subject.pipe), options.calibration, done.fingerprint
    report: dict[str, Any] = {
        "pipeline": info.source,
        "method": done.method,
        "pattern": str(done.pattern),
        "rule": done.plan.rule,
        "budget": done.plan.budget,
        "refit": done.refit,
        "seed": done.seed,
        "device": str(subject.pipe._execution_device),
        "offload": is_offloaded(subject.denoiser),
        "weights_on_disk": shelf_of(subject.denoiser) is not None,
        "versions": versions(),
        "calibration": None
        if measured is None
        else {
            "prompts": num_prompts,
            "steps": measured["steps"],
            "guidance_scale": measured["guidance_scale"],
            "packages": done.packages,
            "streamed": done.streamed,
            "tokens": settings.tokens,
            "padding": settings.padding,
            "weighting": measured["weighting"],
            "precision": measured.get("precision", "float32"),
            "damping": settings.damping,
            "reused": reused,
        },
        "allocation": done.allocation,
        "notes": done.notes,
        "dead": done.dead,
        "ranks": done.ranks,
        "reconstruction": done.reconstruction,
        "depth": done.depth,
        "sparsity": {
            "requested": _requested(done),
            "achieved": done.sparsity,
            "per_layer": done.sparsity_per_layer,
        },
        "parameters": done.parameters,
        "flops": {"dense": flops_dense, "pruned": denoiser_flops(subject, call_arguments(subject.pipe))},
        "refit_steps": steps_taken(done.refit_steps),
        "layer_error": {"mean": done.mean_layer_error, "per_layer": done.layer_error},
        "time_s": {key: done.time_s.get(key, 0.0) for key in STAGES},
        "evaluation": None,
    }
    if images is not None:
        drawn = {name: Images(made, made[:0]) for name, made in (("dense", images.dense), ("pruned", images.pruned))}
        report["evaluation"] = evaluation_of(images.suite, images.prompts, images.seeds, drawn)
    return report
