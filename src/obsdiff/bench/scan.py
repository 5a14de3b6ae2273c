"""What a sensitivity scan costs over a calibration, and whether its errors add up."""

from __future__ import annotations

import time
from typing import Any

import torch

from obsdiff.allocation.allocate import default_budget, probe_for, settings_of
from obsdiff.allocation.budget import costs_of
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.scan import scan
from obsdiff.allocation.units import make_units
from obsdiff.bench.additivity import check_additivity
from obsdiff.bench.presets import Workload
from obsdiff.bench.workloads import forward_only
from obsdiff.criteria import find_method
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.fingerprint import conditioning_hash
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.options import Limits, ScanOptions
from obsdiff.pruning.plan import make_plan
from obsdiff.versions import versions


def bench_scan(
    name: str,
    pipe: Any,
    conditioning: Conditioning,
    work: Workload,
    pattern: str,
    method: str,
    scanning: ScanOptions,
    plans: int,
) -> dict[str, Any]:
    """Time a calibration pass and a scan, then compare predicted and measured errors of random plans.

    Args:
        name: Of the preset or pipeline.
        pipe, conditioning, work: What to run (:mod:`obsdiff.bench.workloads`).
        pattern, method: How layers are pruned.
        scanning: How the scan measures.
        plans: Random plans to compare.

    Returns:
        ``forward_only_s, calibrate_s, scan_s, ratio`` (scan / calibrate), ``triples, bare_passes``,
        ``rank_correlation`` over ``plans`` random plans at the budget of ``pattern`` and its 95 % interval (None for
        fewer than two), the ``predicted`` and ``joint`` error of each, and what else the figures depend on.
    """
    forward_s = forward_only(pipe, conditioning, work)
    started = time.perf_counter()
    statistics = calibrate(
        pipe,
        conditioning,
        steps=work.steps,
        guidance_scale=work.guidance_scale,
        batch_size=work.batch_size,
        needs=find_method(method).needs | {"gram"},
    )
    calibrate_s = time.perf_counter() - started
    subject = subject_of(pipe, conditioning)
    graph = subject.graph
    base = make_plan(graph, parse_pattern(pattern), spare_blocks=())
    units = make_units(graph, base, Limits())
    solver = Solver(graph, statistics, SolveOptions(method))
    settings = settings_of(statistics, work.batch_size)
    started = time.perf_counter()
    probe, bare = probe_for(subject, units, conditioning, settings, scanning)
    told = conditioning_hash(pipe, conditioning)
    found = scan(solver, units, probe, told, levels=scanning.levels, by=scanning.by)
    scan_s = time.perf_counter() - started
    costs = costs_of(subject, units, default_budget(graph, base), settings.call)
    added = check_additivity(solver, base, units, costs, found, probe, plans)
    correlation, interval = added.rank_correlation if plans > 1 else (None, None)
    return {
        "forward_only_s": round(forward_s, 3),
        "calibrate_s": round(calibrate_s, 3),
        "scan_s": round(scan_s, 3),
        "ratio": round(scan_s / calibrate_s, 3),
        "by": found.way,
        "triples": len(probe),
        "bare_passes": round(bare, 3),
        "plans": plans,
        "predicted": added.predicted,
        "joint": added.joint,
        "rank_correlation": correlation,
        "rank_correlation_interval": interval,
        "units": len(units),
        "preset": name,
        "pattern": pattern,
        "method": method,
        "num_prompts": work.num_prompts,
        "steps": work.steps,
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "dtype": work.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
