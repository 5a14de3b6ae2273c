"""One-shot pruning: the plain function behind ``prune.py`` and behind the setup of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from obsdiff.criteria import METHODS, find_method
from obsdiff.errors import UserError
from obsdiff.models.content import model_hash
from obsdiff.models.denoisers import parts_of, shrunk_of
from obsdiff.models.graph import Graph
from obsdiff.models.info import info_of
from obsdiff.models.offload import bring, is_offloaded, refuse_offloaded, shelf_of
from obsdiff.models.subject import subject_of
from obsdiff.numbers import check_number, check_seed, check_whole
from obsdiff.obs.linalg import DAMPING
from obsdiff.obs.observers import PASSES
from obsdiff.obs.pattern import Depth, Hybrid, Pattern, Unstructured, of_units, parse_request
from obsdiff.obs.structured import FUSIONS
from obsdiff.pruning.apply import Job, apply_package
from obsdiff.pruning.defaults import departures, pattern_by
from obsdiff.pruning.describe import remarks
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.masks import Masks
from obsdiff.pruning.options import check_compared
from obsdiff.pruning.plan import Plan, make_plan, packages_of, stage_packages
from obsdiff.pruning.planfile import fitted_plan
from obsdiff.pruning.report import PruneReport, count_parameters
from obsdiff.pruning.shorten import prune_shorter
from obsdiff.pruning.solved import Solved, check_solved
from obsdiff.pruning.statistics import Statistics, check_measured_on, check_serves
from obsdiff.pruning.stream import Stream
from obsdiff.pruning.surgery import become_shrunk, shrunk_config, undone_on_error, zero_share
from obsdiff.spill import Spill

ZEROED = 0.01  # more exact zeros in a layer than this were put there
Calibrate = Callable[[set[str]], Statistics]


def prune(
    pipe: Any,
    pattern: str | Pattern | Hybrid | Plan,
    *,
    method: str | SolveOptions = "obs",
    statistics: Statistics | Calibrate | None = None,
    refit: bool | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    spare_blocks: Sequence[int] | None = None,
    packages: int | None = None,
    seed: int = 0,
    damping: float = DAMPING,
    fusion: str = "reciprocal_rank",
    prune_again: bool = False,
    solved: Path | None = None,
    quiet: bool = True,
) -> PruneReport:
    """Prune a pipeline's denoiser in place.

    Args:
        pipe: A diffusers pipeline of a supported family, or its :class:`~obsdiff.models.subject.Subject`. If anything
            fails, no weight has changed.
        pattern: Such as "unstructured:0.5", "2:4", "structured:0.3", a pattern object, or a plan that gives each layer
            its own (:func:`obsdiff.allocate`, :func:`obsdiff.pruning.planfile.read_plan`). Stages go by a plan that
            names them, which :func:`obsdiff.allocate` makes of "depth:2".
        method: One of :data:`obsdiff.criteria.METHODS`, or :class:`obsdiff.SolveOptions`, which say refit, seed,
            damping and fusion too, and what has no argument here.
        statistics: From :func:`obsdiff.calibrate`; or a function that calibrates the sites it is given, called once
            per package; or from :func:`obsdiff.stream`, which goes through the denoiser stage by stage. Methods that
            look at weights alone (magnitude, l1, random) need none; with it their layer errors are reported. Those that
            go by gradients (taylor, diff-pruning) or gates (ecodiff) need a calibration made for them.
        refit: Least squares on what is kept; None takes the method's default (on for obs and admm).
        include, exclude, spare_blocks: See :func:`obsdiff.pruning.plan.make_plan`.
        packages: Calibration passes; later layers are calibrated with earlier ones pruned (OBS-Diff §4.2). Needs a
            function as ``statistics``. None takes the method's default (4 for obs-diff) with a function, else 1.
        seed: For methods that draw.
        damping: Dampening relative to mean diag(H).
        fusion: "reciprocal_rank" (as published) or "relative_error", for heads of joint attention.
        prune_again: Allow a pipeline that is pruned already.
        solved: Folder to keep solved layers in, so that the same prune goes on from there if it is cut off; needs
            statistics that are measured already, or a stream. Its owner removes it
            (:func:`obsdiff.pruning.solved.remove_solved`). Dense weights that are replaced wait on the same disk (or
            stay on the one they rest on), in a file without a name; if anything fails they are put back. The report's
            masks lie in another such file, for as long as it is there.
        quiet: No progress bar.

    Returns:
        What was done; hand it to :func:`obsdiff.save_pipeline`.

    Raises:
        UserError: The request cannot be met.
    """
    started = time.perf_counter()
    options = method if isinstance(method, SolveOptions) else SolveOptions(method, refit, seed, damping, fusion)
    if options is method and (refit, seed, damping, fusion) != (None, 0, DAMPING, SolveOptions.fusion):
        raise UserError("refit, seed, damping and fusion are in the options; leave them out beside these")
    given = pattern if isinstance(pattern, Plan) else None
    if given is not None and given.removed:
        layered = None if isinstance(given.pattern, Depth) else replace(given, removed=())
        rest: Any = partial(
            prune, method=options, statistics=statistics, packages=packages, prune_again=prune_again, solved=solved
        )
        rest = partial(rest, quiet=quiet)
        if include or exclude or spare_blocks is not None:
            raise UserError("a plan names its layers; leave out include, exclude and spare_blocks")
        subject = subject_of(pipe)
        if not prune_again:
            refuse_pruned(subject.graph, info_of(subject.pipe).manifest)
        return prune_shorter(subject, given, None if layered is None else lambda shorter: rest(shorter, layered))
    asked = pattern.pattern if isinstance(pattern, Plan) else parse_request(pattern)
    if isinstance(asked, Depth):
        raise UserError(
            f"{asked}: which stages go is measured on the pipeline's calls; give the plan that obsdiff.allocate makes"
        )
    pattern = asked
    streamed = isinstance(statistics, Stream)
    if packages is None:
        anew = callable(statistics) and not streamed and not isinstance(pattern, Hybrid)
        packages = find_method(options.method).packages if anew else 1
    elif streamed:
        raise UserError("a stream goes stage by stage; leave out packages")
    _check(pattern, options, statistics, packages)
    if given is not None and (include or exclude or spare_blocks is not None):
        raise UserError("a plan names its layers; leave out include, exclude and spare_blocks")
    subject = subject_of(pipe)
    graph = subject.graph
    if given is None:
        pattern = pattern_by(options.method, pattern)
        plan = make_plan(graph, pattern, include, exclude, spare_blocks)
    else:
        plan = fitted_plan(given, graph)
    subject.check(plan.layers(graph))
    if isinstance(statistics, Stream) and not statistics.runs(subject):
        raise UserError("the stream is of another pipeline; make one of this one")
    if not prune_again:
        refuse_pruned(graph, info_of(subject.pipe).manifest)
    if isinstance(statistics, Statistics):
        refuse_offloaded(graph.denoiser, "a solve from statistics of all layers")
        check_measured_on(statistics, graph.denoiser)
        check_serves(statistics, needed(pattern, options), f"method {options.method}")
    kept = None if solved is None else _kept(solved, graph, plan, options, statistics)
    masks = Masks(spill=None if solved is None else Spill(solved.parent))  # it outlives the folder
    report = PruneReport(
        pattern, options.method, options.refits, options.seed, plan, masks, packages=packages, streamed=streamed
    )
    report.parameters["dense"] = sum(p.numel() for p in graph.denoiser.parameters())
    by_stage = streamed or is_offloaded(graph.denoiser)
    passes = stage_packages(graph, plan) if by_stage else packages_of(graph, plan, packages)
    if isinstance(statistics, Stream):
        report.model, report.fingerprint = statistics.fingerprint["model"], statistics.fingerprint
        if kept is None or not all(map(kept.holds, passes)):
            statistics.record()  # before anything is pruned
    seen = streamed
    with undone_on_error(solved, is_offloaded(graph.denoiser), shelf_of(graph.denoiser)) as edits:
        job = Job(edits, graph, plan, options, report, quiet, kept)
        for package in passes:
            there = kept is not None and streamed and kept.holds(package)
            found = None if there else statistics(set(package)) if callable(statistics) else statistics
            if report.model is None:  # the first package: still dense
                report.model = model_hash(graph.denoiser) if found is None else found.fingerprint["model"]
            if found is not None:
                check_serves(found, needed(pattern, options), f"method {options.method}")
                if report.fingerprint is None:  # the first one's: of the dense model
                    report.fingerprint = found.described()
                _add(report.time_s, found.time_s)
            seen = seen or (found is not None and found.inputs)
            solve_started = time.perf_counter()
            bring(graph.layer(graph.stages[max(graph.site_of[name].stage for name in package)]))
            apply_package(job, package, found, once=callable(statistics))
            _add(report.time_s, {"solve": time.perf_counter() - solve_started})
            found = None
        if plan.structured:
            report.shrunk = shrunk_config(graph, plan.modules)
            become_shrunk(edits, graph.denoiser, report.shrunk)
        count_parameters(graph.denoiser, report)
    report.notes = [*remarks(graph, plan), *departures(options.method, report.fingerprint, len(passes))]
    if kept is not None and len(kept):
        report.notes.append(f"{len(kept)} of its solves were taken over from a run that was cut off")
    if report.fingerprint is not None and not report.layer_error:
        what = "only the diagonal of H was" if seen else "no layer inputs were"
        report.notes.append(f"{what} measured, so there are no layer errors")
    report.time_s["total"] = time.perf_counter() - started
    return report


def _kept(
    folder: Path, graph: Graph, plan: Plan, options: SolveOptions, statistics: Statistics | Calibrate | None
) -> Solved:
    if not isinstance(statistics, Statistics | Stream):
        raise UserError("layers are kept as they are solved only where statistics are measured already, or streamed")
    measured = statistics.fingerprint if isinstance(statistics, Stream) else statistics.described()
    check_solved(folder)
    return Solved(folder, graph, plan, options, measured, isinstance(statistics, Stream))


def refuse_pruned(graph: Graph, manifest: Mapping[str, Any] | None = None) -> None:
    """Refuse a denoiser that is pruned already: shrunk, without some of its stages, or with a share of exact zeros that
    training never leaves.

    Args:
        graph: What it is.
        manifest: Of the run that it came out of, if it came out of one.

    Raises:
        UserError: It is.
    """
    hint = "pass --prune_again true to prune it further"
    if depth := (manifest or {}).get("depth"):
        gone = len(depth["removed"])
        raise UserError(f"this pipeline is pruned already ({gone} of {depth['of']} stages are removed); {hint}")
    for model in parts_of(graph.denoiser).values():
        if shrunk_of(model) is not None:
            raise UserError(f"this pipeline is pruned already (its {type(model).__name__} is shrunk); {hint}")
    for layer, share in zeroed_layers(graph).items():
        raise UserError(f"this pipeline is pruned already ({share:.0%} of {layer} is zero); {hint}")


def zeroed_layers(graph: Graph) -> dict[str, float]:
    """Prunable layers with a share of exact zeros that training never leaves, and that share."""
    shares = {layer: zero_share(graph.weight(layer)) for layer in graph.layers}
    return {layer: share for layer, share in shares.items() if share > ZEROED}


def check_solving(pattern: Pattern | Hybrid, options: SolveOptions, packages: int = 1, streamed: bool = False) -> None:
    """Refuse what no statistics can make possible.

    Raises:
        UserError: The method cannot do it, or an option is out of range.
    """
    method = find_method(options.method)
    units = of_units(pattern)
    if units is not None and units.cuts and method.structured is None:
        *some, last = (name for name, other in METHODS.items() if other.structured is not None)
        others = f"{', '.join(some)} or {last}"
        raise UserError(f"method {options.method} cannot prune heads and neurons; use {others} with {pattern}")
    if pattern != units and method.solve is None:
        raise UserError(
            f"method {options.method} removes whole heads, neurons and channels, no single weights; use it with "
            f"structured:RATIO, or another method with {pattern}"
        )
    if isinstance(pattern, Hybrid) and (packages > 1 or streamed):
        instead = "leave out --calibration.streamed" if streamed else "use --calibration.packages 1"
        raise UserError(f"{pattern} goes by one calibration of the dense model; {instead}")
    if streamed and units is not None and units.directions:
        raise UserError(f"{pattern}: ranks are checked on the dense model's inputs; leave out --calibration.streamed")
    if streamed and (own := method.needs & PASSES):
        what = ", ".join(sorted(own))
        raise UserError(
            f"method {options.method} goes by {what} of the whole denoiser; leave out --calibration.streamed"
        )
    if options.refit_steps is not None and not (options.refits and pattern != units):
        why = f"of {pattern} what stays is solved for in closed form" if options.refits else "there is no refit"
        raise UserError(f"refit_steps is for the refit of single weights, and {why}; leave it out")
    if options.compared is not None:
        check_compared(options.method, options.compared)
        if not isinstance(pattern.then if isinstance(pattern, Hybrid) else pattern, Unstructured):
            raise UserError(f"compared_columns is for single weights by ratio; leave it out with {pattern}")
    if options.fusion not in FUSIONS:
        raise UserError(f"unknown fusion {options.fusion!r}; choose one of {', '.join(FUSIONS)}")
    check_number("calibration.damping", options.damping, 0.0)
    check_whole("calibration.packages", packages, 1)
    check_seed("seed", options.seed)


def _check(
    pattern: Pattern | Hybrid, options: SolveOptions, statistics: Statistics | Calibrate | None, packages: int
) -> None:
    check_solving(pattern, options, packages, isinstance(statistics, Stream))
    if not (statistics is None or isinstance(statistics, Statistics) or callable(statistics)):
        raise UserError(
            f"statistics are a {type(statistics).__name__}; give what obsdiff.calibrate returns (it opens a store too)"
        )
    if packages > 1 and not callable(statistics):
        raise UserError("several packages calibrate with earlier layers pruned; stored statistics cannot serve them")
    if statistics is None and needed(pattern, options):
        what = f"method {options.method}{' with refit' if options.refits else ''}" if options.needs else "a rank"
        raise UserError(f"{what} needs statistics; calibrate")


def needed(pattern: Pattern | Hybrid, options: SolveOptions) -> frozenset[str]:
    """What of a calibration; ranks go by whole covariances, whatever the method."""
    units = of_units(pattern)
    if units is None or not units.directions:
        return options.needs
    alone = not units.cuts and pattern == units  # then the method has no part in it
    return frozenset({"gram"}) | (set() if alone else options.needs)


def _add(times: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        times[key] = times.get(key, 0.0) + value
