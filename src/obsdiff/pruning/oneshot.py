"""One-shot pruning: the plain function behind ``prune.py`` and behind the setup of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from obsdiff.criteria import METHODS, find_method
from obsdiff.errors import UserError
from obsdiff.models.content import model_hash
from obsdiff.models.denoisers import parts_of, shrunk_of
from obsdiff.models.graph import Graph, Group, Site
from obsdiff.models.info import info_of
from obsdiff.models.subject import subject_of
from obsdiff.numbers import check_number, check_seed, check_whole
from obsdiff.obs.linalg import DAMPING
from obsdiff.obs.observers import Observer
from obsdiff.obs.pattern import RANK, Depth, Pattern, Structured, parse_request
from obsdiff.obs.structured import FUSIONS
from obsdiff.progress import track
from obsdiff.pruning.defaults import departures, pattern_by
from obsdiff.pruning.layers import LayerResult, SolveOptions, emptied, portable
from obsdiff.pruning.plan import Plan, kept_units, make_plan, packages_of, remarks
from obsdiff.pruning.planfile import fitted_plan
from obsdiff.pruning.report import PruneReport, count_parameters
from obsdiff.pruning.shorten import prune_shorter
from obsdiff.pruning.solve import solve_groups, solve_site
from obsdiff.pruning.statistics import Statistics, check_measured_on, check_serves
from obsdiff.pruning.surgery import (
    Edits,
    become_shrunk,
    cut,
    project,
    shrunk_config,
    undone_on_error,
    zero_share,
)
from obsdiff.ranks import solved_in_turn

ZEROED = 0.01  # more exact zeros in a layer than this were put there
Calibrate = Callable[[set[str]], Statistics]
Read = Callable[[str, torch.device], Observer]


def prune(
    pipe: Any,
    pattern: str | Pattern | Plan,
    *,
    method: str = "obs",
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
    quiet: bool = True,
) -> PruneReport:
    """Prune a pipeline's denoiser in place.

    Args:
        pipe: A diffusers pipeline of a supported family, or its :class:`~obsdiff.models.subject.Subject`. If anything
            fails, no weight has changed.
        pattern: Such as "unstructured:0.5", "2:4", "structured:0.3", a pattern object, or a plan that gives each layer
            its own (:func:`obsdiff.allocate`, :func:`obsdiff.pruning.planfile.read_plan`). Stages go by a plan that
            names them, which :func:`obsdiff.allocate` makes of "depth:2".
        method: One of :data:`obsdiff.criteria.METHODS`.
        statistics: From :func:`obsdiff.calibrate`; or a function that calibrates the sites it is given, called once
            per package. Methods that look at weights alone (magnitude, l1, random) need none; with it their layer
            errors are reported. Those that go by gradients (taylor, diff-pruning) or gates (ecodiff) need a calibration
            made for them.
        refit: Least squares on what is kept; None takes the method's default (on for obs and admm).
        include, exclude, spare_blocks: See :func:`obsdiff.pruning.plan.make_plan`.
        packages: Calibration passes; later layers are calibrated with earlier ones pruned (OBS-Diff §4.2). Needs a
            function as ``statistics``. None takes the method's default (4 for obs-diff) with a function, else 1.
        seed: For methods that draw.
        damping: Dampening relative to mean diag(H).
        fusion: "reciprocal_rank" (as published) or "relative_error", for heads of joint attention.
        prune_again: Allow a pipeline that is pruned already.
        quiet: No progress bar.

    Returns:
        What was done; hand it to :func:`obsdiff.save_pipeline`.

    Raises:
        UserError: The request cannot be met.
    """
    started = time.perf_counter()
    given = pattern if isinstance(pattern, Plan) else None
    if given is not None and given.removed:
        layered = None if isinstance(given.pattern, Depth) else replace(given, removed=())
        rest: Any = partial(
            prune, method=method, statistics=statistics, refit=refit, packages=packages, seed=seed, damping=damping
        )
        rest = partial(rest, fusion=fusion, prune_again=prune_again, quiet=quiet)
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
    options = SolveOptions(method, refit, seed, damping, fusion)
    if packages is None:
        packages = find_method(method).packages if callable(statistics) else 1
    _check(pattern, options, statistics, packages)
    if given is not None and (include or exclude or spare_blocks is not None):
        raise UserError("a plan names its layers; leave out include, exclude and spare_blocks")
    subject = subject_of(pipe)
    graph = subject.graph
    if given is None:
        pattern = pattern_by(method, pattern)
        plan = make_plan(graph, pattern, include, exclude, spare_blocks)
    else:
        plan = fitted_plan(given, graph)
    subject.check(plan.layers(graph))
    if not prune_again:
        refuse_pruned(graph, info_of(subject.pipe).manifest)
    if isinstance(statistics, Statistics):
        check_measured_on(statistics, graph.denoiser)
        check_serves(statistics, needed(pattern, options), f"method {method}")
    report = PruneReport(pattern, method, options.refits, seed, plan, packages=packages)
    report.parameters["dense"] = sum(p.numel() for p in graph.denoiser.parameters())
    with undone_on_error() as edits:
        job = _Job(edits, graph, plan, options, report, quiet)
        for package in packages_of(graph, plan, packages):
            found = statistics(set(package)) if callable(statistics) else statistics
            # statistics made for this prune are let go site by site as they are used
            read = None if found is None or not found.inputs else found.take if callable(statistics) else found.site
            if report.model is None:  # the first package: still dense
                report.model = model_hash(graph.denoiser) if found is None else found.fingerprint["model"]
            if found is not None:
                check_serves(found, needed(pattern, options), f"method {method}")
                if report.fingerprint is None:  # the first one's: of the dense model
                    report.fingerprint = found.described()
                _add(report.time_s, found.time_s)
            solve_started = time.perf_counter()
            if plan.structured:
                _shrink_modules(job, package, read, found)
            else:
                _mask_sites(job, package, read, None if found is None else found.slopes)
            _add(report.time_s, {"solve": time.perf_counter() - solve_started})
        if plan.structured:
            report.shrunk = shrunk_config(graph, plan.entries)
            become_shrunk(edits, graph.denoiser, report.shrunk)
        count_parameters(graph.denoiser, report)
    report.notes = [*remarks(graph, plan), *departures(method, report.fingerprint, packages)]
    if report.fingerprint is not None and not report.layer_error:
        what = "only the diagonal of H was" if found is not None and found.inputs else "no layer inputs were"
        report.notes.append(f"{what} measured, so there are no layer errors")
    report.time_s["total"] = time.perf_counter() - started
    return report


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


def check_solving(pattern: Pattern, options: SolveOptions, packages: int = 1) -> None:
    """Refuse what no statistics can make possible.

    Raises:
        UserError: The method cannot do it, or an option is out of range.
    """
    method = find_method(options.method)
    if isinstance(pattern, Structured) and pattern.kinds != (RANK,) and method.structured is None:
        *some, last = (name for name, other in METHODS.items() if other.structured is not None)
        others = f"{', '.join(some)} or {last}"
        raise UserError(f"method {options.method} cannot prune heads and neurons; use {others} with {pattern}")
    if not isinstance(pattern, Structured) and method.solve is None:
        raise UserError(
            f"method {options.method} removes whole heads, neurons and channels, no single weights; use it with "
            f"structured:RATIO, or another method with {pattern}"
        )
    if options.fusion not in FUSIONS:
        raise UserError(f"unknown fusion {options.fusion!r}; choose one of {', '.join(FUSIONS)}")
    check_number("calibration.damping", options.damping, 0.0)
    check_whole("calibration.packages", packages, 1)
    check_seed("seed", options.seed)


def _check(pattern: Pattern, options: SolveOptions, statistics: Statistics | Calibrate | None, packages: int) -> None:
    check_solving(pattern, options, packages)
    if not (statistics is None or isinstance(statistics, Statistics) or callable(statistics)):
        raise UserError(
            f"statistics are a {type(statistics).__name__}; give what obsdiff.calibrate returns (it opens a store too)"
        )
    if packages > 1 and not callable(statistics):
        raise UserError("several packages calibrate with earlier layers pruned; stored statistics cannot serve them")
    if statistics is None and needed(pattern, options):
        what = f"method {options.method}{' with refit' if options.refits else ''}" if options.needs else "a rank"
        raise UserError(f"{what} needs statistics; calibrate")


def needed(pattern: Pattern, options: SolveOptions) -> frozenset[str]:
    """What of a calibration; ranks go by whole covariances, whatever the method."""
    if not isinstance(pattern, Structured) or pattern.rank is None:
        return options.needs
    return frozenset({"gram"}) | (options.needs if pattern.kinds != (RANK,) else set())


def _add(times: dict[str, float], more: Mapping[str, float]) -> None:
    for key, value in more.items():
        times[key] = times.get(key, 0.0) + value


@dataclass(frozen=True)
class _Job:
    """What solving a package needs to know and where it leaves its results."""

    edits: Edits
    graph: Graph
    plan: Plan
    options: SolveOptions
    report: PruneReport
    quiet: bool


def _mask_sites(job: _Job, package: list[str], read: Read | None, slopes: Mapping[str, Tensor] | None) -> None:
    """Solve the sites of a package and write the pruned weights."""
    graph, entries, report = job.graph, job.plan.entries, job.report
    chosen = [site for site in graph.sites if site.name in package]

    def solve(site: Site) -> dict[str, LayerResult]:
        layers = [layer for layer in site.layers if layer in entries]
        found = None if read is None else read(site.name, graph.weight(layers[0]).device)
        return portable(solve_site(graph, layers, [entries[layer] for layer in layers], found, job.options, slopes))

    for _, results in track(solved_in_turn(chosen, solve), len(chosen), "solving", job.quiet):
        for name, solved in results.items():
            assert solved.mask is not None
            result = emptied(solved) if name in job.plan.dead else solved
            assert result.mask is not None
            bias = graph.layer(name).bias if name in job.plan.dead else None
            job.edits.set_weight(
                graph.layer(name), result.weight, torch.zeros_like(bias) if isinstance(bias, Tensor) else None
            )
            job.edits.shift_bias(graph.layer(name), result.bias_shift)
            report.masks[name] = result.mask.cpu()
            report.sparsity_per_layer[name] = 1 - float(result.mask.sum()) / result.mask.numel()
            if result.error is not None:
                report.layer_error[name] = result.error
            if result.refit_steps is not None:
                report.refit_steps[name] = result.refit_steps


def _whole(group: Group, pattern: Pattern) -> bool:
    """Whether a group on a basis keeps all directions, so that it needs none."""
    return group.basis is not None and isinstance(pattern, Structured) and kept_units(group, pattern) == group.count


def _shrink_modules(job: _Job, package: list[str], read: Read | None, measured: Statistics | None) -> None:
    """Choose the units that stay of a package's groups and cut the others out."""
    graph, entries, report = job.graph, job.plan.entries, job.report
    slopes = dict(measured.slopes or {}) if measured is not None else {}
    gates = None if measured is None else measured.openness
    changed = [name for name, pattern in entries.items() if not _whole(graph.group_of[name], pattern)]
    chosen = [
        bundle for bundle in graph.bundles(changed) if graph.site_of[bundle[0].consumers[0].layer].name in package
    ]

    def solve(bundle: list[Group]) -> tuple[dict[str, Tensor], dict[str, LayerResult]]:
        patterns = {group.name: entries[group.name] for group in bundle}
        consumers = dict.fromkeys(s.layer for group in bundle for s in group.consumers)
        found = None
        if read is not None:
            sites = {graph.site_of[layer].name: graph.weight(layer).device for layer in consumers}
            known = {site: read(site, device) for site, device in sites.items()}  # each once: it is let go
            found = {layer: known[graph.site_of[layer].name] for layer in consumers}
        kept, results = solve_groups(graph, patterns, found, job.options, slopes or None, gates)  # type: ignore[arg-type]  # all structured
        return {name: units.cpu() for name, units in kept.items()}, portable(results)

    for _, (kept, results) in track(solved_in_turn(chosen, solve), len(chosen), "solving", job.quiet):
        for group in (graph.group_of[name] for name in kept):
            if group.basis is not None:
                basis = results[group.layers[0]].basis
                assert basis is not None
                project(job.edits, graph, group, basis)
                for layer in set(group.layers) & slopes.keys():
                    slopes[layer] = slopes[layer] @ basis.to(slopes[layer]).T  # dL/dW' where the layer is W' E x
        cut(job.edits, graph, kept, {name: (result.weight, result.bias_shift) for name, result in results.items()})
        report.masks |= kept
        report.sparsity_per_layer |= {name: 1 - float(units.sum()) / len(units) for name, units in kept.items()}
        report.layer_error |= {name: result.error for name, result in results.items() if result.error is not None}
