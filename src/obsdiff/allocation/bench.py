"""What a sensitivity scan costs over a calibration, and whether its errors add up."""

from __future__ import annotations

import time
from typing import Any

import torch

from obsdiff.allocation.additivity import check_additivity
from obsdiff.allocation.allocate import default_budget, probe_for, settings_of
from obsdiff.allocation.budget import costs_of
from obsdiff.allocation.scan import scan
from obsdiff.allocation.units import make_units
from obsdiff.evaluation.bench import Preset, build, forward_only
from obsdiff.models.wiring import wire
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning.calibrate import calibrate, prompts_hash
from obsdiff.pruning.options import Limits, ScanOptions
from obsdiff.pruning.plan import make_plan
from obsdiff.pruning.solve import SolveOptions
from obsdiff.versions import versions


def bench_scan(name: str, preset: Preset, pattern: str, method: str, triples: int | None, plans: int) -> dict[str, Any]:
    """Time a calibration pass and a scan, then compare predicted and measured errors of random plans.

    Returns:
        ``forward_only_s, calibrate_s, scan_s, ratio`` (scan / calibrate), ``triples, bare_passes``,
        ``rank_correlation`` over ``plans`` random plans at the budget of ``pattern`` (None for fewer than two), and
        what else the figures depend on.
    """
    pipe, conditioning = build(preset)
    forward_s = forward_only(pipe, conditioning, preset)
    started = time.perf_counter()
    statistics = calibrate(
        pipe,
        conditioning,
        steps=preset.steps,
        guidance_scale=preset.guidance_scale,
        batch_size=preset.batch_size,
    )
    calibrate_s = time.perf_counter() - started
    wiring = wire(pipe.transformer)
    base = make_plan(wiring, parse_pattern(pattern), spare_blocks=())
    units = make_units(wiring, base, Limits())
    options = SolveOptions(method)
    settings = settings_of(statistics, preset.batch_size)
    started = time.perf_counter()
    probe, bare = probe_for(pipe, wiring, units, conditioning, settings, ScanOptions(triples=triples))
    found = scan(wiring, units, statistics, options, probe, prompts_hash(conditioning))
    scan_s = time.perf_counter() - started
    costs = costs_of(pipe, wiring, units, default_budget(wiring, base), settings.call)
    added = check_additivity(wiring, base, units, costs, found, statistics, options, probe, plans)
    return {
        "forward_only_s": round(forward_s, 3),
        "calibrate_s": round(calibrate_s, 3),
        "scan_s": round(scan_s, 3),
        "ratio": round(scan_s / calibrate_s, 3),
        "triples": len(probe),
        "bare_passes": round(bare, 3),
        "plans": plans,
        "rank_correlation": added.rank_correlation if plans > 1 else None,
        "units": len(units),
        "preset": name,
        "pattern": pattern,
        "method": method,
        "num_prompts": preset.num_prompts,
        "steps": preset.steps,
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "dtype": preset.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
