"""A whole prune run: sample the dense pipeline, prune it, sample it again, measure, and write everything at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.criteria import find_method
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.measures import digit_frechet, digit_hits, fidelity
from obsdiff.evaluation.sampling import cycle_prompts, sample
from obsdiff.export.heatmap import draw_ratios
from obsdiff.export.planning import PlanRequest, allocated_plan, check_plan_request, describe_scan, first_plan
from obsdiff.export.report import draw_samples, render_markdown
from obsdiff.files import whole_folder, write_json, write_text
from obsdiff.memory import peak_memory_bytes
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.wiring import Wiring, denoiser_of, wire
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.linalg import DAMPING
from obsdiff.obs.pattern import Pattern
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.folder import check_output, write_pipeline
from obsdiff.pruning.oneshot import PruneReport, prune, refuse_pruned
from obsdiff.pruning.plan import Plan, describe, packages_of
from obsdiff.pruning.planfile import kinds_of
from obsdiff.pruning.solve import SolveOptions
from obsdiff.pruning.statistics import INDEX, Statistics, open_statistics
from obsdiff.versions import versions

SHOWN = 8  # pairs in samples.png


@dataclass(frozen=True)
class Request:
    """What a prune run is asked for; see :func:`obsdiff.prune` and :func:`obsdiff.calibrate` for the fields."""

    pattern: str
    method: str
    output: Path
    calibration_prompts: Sequence[str]
    evaluation_prompts: Sequence[str]
    num_images: int = 64
    evaluation_seed: int = 1_000
    evaluation_batch_size: int = 32
    refit: bool | None = None
    seed: int = 0
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    spare_blocks: Sequence[int] | None = None
    fusion: str = "reciprocal_rank"
    store: Path | None = None
    overwrite: bool = False
    prune_again: bool = False
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4
    packages: int = 1
    tokens: int | None = None
    weighting: str | None = None
    damping: float = DAMPING
    planning: PlanRequest = field(default_factory=PlanRequest)
    quiet: bool = False


@dataclass(frozen=True)
class Images:
    """Samples of the evaluation, (n, c, h, w) in [0, 1]."""

    dense: Tensor
    pruned: Tensor
    prompts: list[str]
    seeds: list[int]


def prune_run(pipe: Any, request: Request) -> dict[str, Any]:
    """Do it, and leave the artifacts in ``request.output``.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: The request cannot be met; nothing was written then.
    """
    started = time.perf_counter()
    check_output(request.output, request.overwrite)
    planning, method = request.planning, find_method(request.method)
    check_plan_request(planning, request.include, request.exclude, request.spare_blocks)
    if request.packages > 1 and request.store is not None:
        raise UserError(
            "several packages calibrate with earlier layers pruned, which a statistics folder cannot hold; "
            "leave out --statistics or use --calibration.packages 1"
        )
    if request.packages > 1 and planning.allocates:
        raise UserError("an allocation goes by one calibration of the dense model; use --calibration.packages 1")
    wiring = wire(denoiser_of(pipe))
    plan = first_plan(wiring, planning, request.pattern, request.include, request.exclude, request.spare_blocks)
    if not request.prune_again:
        refuse_pruned(wiring)
    weighting = request.weighting or _stored_weighting(request.store) or method.weighting
    call = call_arguments(pipe, num_inference_steps=request.steps, guidance_scale=request.guidance_scale)
    refits = method.refit if request.refit is None else request.refit
    measured = method.needs_statistics or refits or request.store is not None or planning.allocates
    _announce(pipe, wiring, plan, request, call, measured)
    flops_dense = denoiser_flops(pipe, call)
    prompts = cycle_prompts(request.evaluation_prompts, request.num_images)
    seeds = list(range(request.evaluation_seed, request.evaluation_seed + request.num_images))
    dense = _sample(pipe, prompts, seeds, request) if prompts else None

    def measure(sites: set[str]) -> Statistics:
        return calibrate(
            pipe,
            request.calibration_prompts,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            weighting=weighting,
            tokens=request.tokens,
            batch_size=request.batch_size,
            seed=request.seed,
            store=request.store,
            sites=None if request.store is not None or planning.allocates else sites,  # a store serves every pattern
            quiet=request.quiet,
        )

    reused = request.store is not None and (request.store / INDEX).exists()
    statistics: Any = measure if measured else None
    if planning.allocates or (request.store is not None and request.packages == 1):
        statistics = measure(set())
    allocation = None
    if planning.allocates:
        begun = time.perf_counter()
        plan, allocation = allocated_plan(
            pipe,
            planning,
            request.pattern,
            statistics,
            request.calibration_prompts,
            SolveOptions(request.method, request.refit, request.seed, request.damping, request.fusion),
            include=request.include,
            exclude=request.exclude,
            spare_blocks=request.spare_blocks,
            batch_size=request.batch_size,
            quiet=request.quiet,
        )
        allocation["time_s"] = time.perf_counter() - begun
    done = prune(
        pipe,
        plan,
        method=request.method,
        statistics=statistics,
        refit=request.refit,
        packages=request.packages,
        seed=request.seed,
        damping=request.damping,
        fusion=request.fusion,
        prune_again=request.prune_again,
        quiet=request.quiet,
    )
    images = None if dense is None else Images(dense, _sample(pipe, prompts, seeds, request), prompts, seeds)
    report = _report(pipe, done, request, call, weighting if measured else None, reused, flops_dense, images)
    report["allocation"] = allocation
    report["time_s"]["total"] = time.perf_counter() - started
    report["peak_memory_bytes"] = peak_memory_bytes(pipe.device)
    with whole_folder(request.output, replace=request.overwrite) as folder:
        write_pipeline(pipe, folder, done)
        write_json(folder / "report.json", report)
        write_text(folder / "report.md", render_markdown(report))
        if done.plan.rule != "uniform":
            draw_ratios(
                folder / "ratios.png", wiring, done.plan, f"{report['pipeline']}, {request.method}, {done.plan.budget}"
            )
        if images is not None:
            title = f"{report['pipeline']}, {report['pattern']}, {report['method']}"
            shown = min(SHOWN, len(prompts))
            rows = {"dense": images.dense, "pruned": images.pruned}
            draw_samples(folder / "samples.png", rows, prompts[:shown], seeds[:shown], title)
    return report


def _stored_weighting(store: Path | None) -> str | None:
    """The weighting of a finished store, which serves every method."""
    if store is None or not (store / INDEX).exists():
        return None
    return str(open_statistics(store).fingerprint.get("weighting"))


def _sample(pipe: Any, prompts: list[str], seeds: list[int], request: Request) -> Tensor:
    return sample(pipe, prompts, seeds, batch_size=request.evaluation_batch_size, quiet=request.quiet)


def _announce(pipe: Any, wiring: Wiring, plan: Plan, request: Request, call: dict[str, Any], measured: bool) -> None:
    """Say what is about to happen: layers, passes, memory."""
    if request.quiet:
        return
    sites = plan.sites(wiring)
    chosen = [site for site in wiring.sites if site.name in sites or request.store is not None]
    numbers = [weight_matrices(wiring.layer(site.name)).shape for site in chosen]
    hessians = sum(4 * groups * columns**2 for groups, _, columns in numbers)
    planning = request.planning
    what = describe(plan.pattern)
    if planning.allocates:
        what = f"{planning.rule} allocation, budget {planning.budget or f'as uniform {plan.pattern}'}"
    elif planning.file is not None:
        what = f"plan {planning.file}, {kinds_of(plan)}"
    print(
        f"{info_of(pipe).source}: {what}; {len(plan.entries)} "
        f"{'modules' if plan.structured else 'layers'}, {len(sites)} distinct inputs, method {request.method}",
        file=sys.stderr,
    )
    if measured:
        passes = len(packages_of(wiring, plan, request.packages))
        print(
            f"calibration: {len(request.calibration_prompts)} prompts x {call.get('num_inference_steps')} steps, "
            f"guidance {call.get('guidance_scale')}, {passes} pass{'es' if passes > 1 else ''}; "
            f"Hessians take {hessians / passes / 2**20:,.0f} MiB",
            file=sys.stderr,
        )
    if planning.rule == "measured":
        steps = int(call.get("num_inference_steps") or 1)
        print(describe_scan(wiring, plan, planning, len(request.calibration_prompts), steps), file=sys.stderr)


def _requested(plan: Plan) -> float:
    """The sparsity that was asked for; of budgets in something else, what the plan came to."""
    kind, _, share = (plan.budget or "").partition(":")
    return float(share) if kind == "sparsity" else plan.pattern.sparsity


def _report(
    pipe: Any,
    done: PruneReport,
    request: Request,
    call: dict[str, Any],
    weighting: str | None,
    reused: bool,
    flops_dense: int,
    images: Images | None,
) -> dict[str, Any]:
    pattern: Pattern = done.pattern
    info = info_of(pipe)
    report: dict[str, Any] = {
        "pipeline": info.source,
        "method": done.method,
        "pattern": str(pattern),
        "rule": done.plan.rule,
        "budget": done.plan.budget,
        "refit": done.refit,
        "seed": done.seed,
        "device": str(pipe.device),
        "versions": versions(),
        "calibration": None
        if weighting is None
        else {
            "prompts": len(request.calibration_prompts),
            "steps": call.get("num_inference_steps"),
            "guidance_scale": call.get("guidance_scale"),
            "packages": done.packages,
            "tokens": request.tokens,
            "weighting": weighting,
            "damping": request.damping,
            "reused": reused,
        },
        "sparsity": {
            "requested": _requested(done.plan),
            "achieved": done.sparsity,
            "per_layer": done.sparsity_per_layer,
        },
        "parameters": done.parameters,
        "flops": {"dense": flops_dense, "pruned": denoiser_flops(pipe, call)},
        "layer_error": {"mean": done.mean_layer_error, "per_layer": done.layer_error},
        "time_s": {key: done.time_s.get(key, 0.0) for key in ("calibrate", "forward_only", "solve")},
        "fidelity": None,
        "alignment": None,
        "frechet": None,
    }
    if images is not None:
        sampled = {"n": len(images.prompts), "seed": request.evaluation_seed}
        report["fidelity"] = {**fidelity(images.dense, images.pruned), **sampled}
        if info.alignment == "digits":
            hits = {
                name: float(digit_hits(pictures, images.prompts).mean())
                for name, pictures in (("dense", images.dense), ("pruned", images.pruned))
            }
            report["alignment"] = {"measure": "embedded digit classifier", **hits, **sampled}
            if len(images.prompts) > 1:
                report["frechet"] = {
                    "features": "embedded digit classifier, 64 features, against 360 held-out scans",
                    "dense": digit_frechet(images.dense),
                    "pruned": digit_frechet(images.pruned),
                    **sampled,
                }
    return report
