"""Speed of pruning: how much a prune costs over the bare forward passes it needs."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from obsdiff.bench.presets import Preset
from obsdiff.bench.workloads import build, forward_only
from obsdiff.criteria import find_method
from obsdiff.export.places import pipeline_bytes
from obsdiff.memory import peak_memory_bytes, resident_memory_bytes
from obsdiff.models.subject import subject_of
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.oneshot import prune
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.stream import stream
from obsdiff.versions import versions


def bench_prune(
    name: str, preset: Preset, pattern: str, method: str, packages: int | None, store: str | None
) -> dict[str, Any]:
    """Time the bare denoiser calls of one calibration pass, then a whole prune, in this process.

    Args:
        name, preset: What to run.
        pattern, method: How layers are pruned.
        packages: Calibration passes; None: stage by stage (:mod:`obsdiff.pruning.stream`).
        store: Folder to keep the calibration in, or to find it.

    Returns:
        ``forward_only_s, calibrate_s, solve_s, total_s, ratio`` (total / forward_only), ``peak_memory_bytes, device,
        preset, packages`` and what else the figures depend on.
    """
    pipe, conditioning = build(preset)
    work = preset.work
    forward_s = forward_only(pipe, conditioning, work)
    weights_bytes, before_bytes = pipeline_bytes(pipe), resident_memory_bytes()
    started = time.perf_counter()
    subject = subject_of(pipe, conditioning)  # traced once, as a run does

    settings: Any = {"steps": work.steps, "guidance_scale": work.guidance_scale, "batch_size": work.batch_size}
    needs = find_method(method).needs | (set() if store is None else {"gram"})
    reused = store is not None and (Path(store) / "statistics.json").exists()

    def measure(sites: set[str]) -> Statistics:
        own = None if store is not None else sites
        return calibrate(subject, conditioning, **settings, store=store, needs=needs, sites=own)

    statistics: Any = measure
    if packages is None:
        statistics = stream(subject, conditioning, **settings, needs=needs)
    elif store is not None and packages == 1:
        statistics = measure(set())
    with TemporaryDirectory() as folder:  # a run keeps a stream's solves, too
        solved = None if packages is not None else Path(folder) / "solved"
        report = prune(subject, pattern, method=method, statistics=statistics, packages=packages, solved=solved)
    total_s = time.perf_counter() - started
    return {
        "forward_only_s": round(forward_s, 3),
        "calibrate_s": round(0.0 if reused else report.time_s["calibrate"], 3),
        "solve_s": round(report.time_s["solve"], 3),
        "total_s": round(total_s, 3),
        "ratio": round(total_s / forward_s, 3),
        "peak_memory_bytes": peak_memory_bytes(pipe.device),
        "weights_bytes": weights_bytes,
        "resident_before_bytes": before_bytes,
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "preset": name,
        "packages": report.packages,
        "streamed": report.streamed,
        "statistics_reused": reused,
        "pattern": pattern,
        "method": method,
        "sparsity": report.sparsity,
        "mean_layer_error": report.mean_layer_error,
        "num_prompts": work.num_prompts,
        "steps": work.steps,
        "batch_size": work.batch_size,
        "dtype": work.dtype,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
