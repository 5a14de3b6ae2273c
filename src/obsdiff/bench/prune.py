"""Speed of pruning: how much a prune costs over the bare forward passes it needs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from obsdiff.bench.workloads import Preset, build, forward_only
from obsdiff.criteria import find_method
from obsdiff.memory import peak_memory_bytes
from obsdiff.models.subject import subject_of
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.oneshot import prune
from obsdiff.pruning.statistics import Statistics
from obsdiff.versions import versions


def bench_prune(
    name: str, preset: Preset, pattern: str, method: str, packages: int, store: str | None
) -> dict[str, Any]:
    """Time the bare denoiser calls of one calibration pass, then a whole prune, in this process.

    Returns:
        ``forward_only_s, calibrate_s, solve_s, total_s, ratio`` (total / forward_only), ``peak_memory_bytes, device,
        preset, packages`` and what else the figures depend on.
    """
    pipe, conditioning = build(preset)
    forward_s = forward_only(pipe, conditioning, preset)
    started = time.perf_counter()
    subject = subject_of(pipe, conditioning)  # traced once, as a run does

    def measure(sites: set[str]) -> Statistics:
        return calibrate(
            subject,
            conditioning,
            steps=preset.steps,
            guidance_scale=preset.guidance_scale,
            batch_size=preset.batch_size,
            store=store,
            needs=find_method(method).needs | (set() if store is None else {"gram"}),
            sites=None if store is not None else sites,
        )

    reused = store is not None and (Path(store) / "statistics.json").exists()
    statistics = measure(set()) if store is not None and packages == 1 else measure
    report = prune(subject, pattern, method=method, statistics=statistics, packages=packages)
    total_s = time.perf_counter() - started
    return {
        "forward_only_s": round(forward_s, 3),
        "calibrate_s": round(0.0 if reused else report.time_s["calibrate"], 3),
        "solve_s": round(report.time_s["solve"], 3),
        "total_s": round(total_s, 3),
        "ratio": round(total_s / forward_s, 3),
        "peak_memory_bytes": peak_memory_bytes(pipe.device),
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "preset": name,
        "packages": packages,
        "statistics_reused": reused,
        "pattern": pattern,
        "method": method,
        "sparsity": report.sparsity,
        "mean_layer_error": report.mean_layer_error,
        "num_prompts": preset.num_prompts,
        "steps": preset.steps,
        "batch_size": preset.batch_size,
        "dtype": preset.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
