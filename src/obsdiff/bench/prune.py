"""Speed of pruning: how much a prune costs over the bare forward passes it needs."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from obsdiff.allocation.fitting import plan_loaded
from obsdiff.bench.presets import Preset
from obsdiff.bench.workloads import build, forward_only
from obsdiff.criteria import find_method
from obsdiff.errors import UserError
from obsdiff.export.places import pipeline_bytes
from obsdiff.memory import peak_memory_bytes, resident_memory_bytes
from obsdiff.models.offload import offload
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.precision import check_precision
from obsdiff.pruning.calibrate import calibrate
from obsdiff.pruning.oneshot import prune
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.stream import stream
from obsdiff.ranks import from_all, world_size
from obsdiff.versions import versions


def bench_prune(
    name: str,
    preset: Preset,
    pattern: str,
    method: str,
    packages: int | None,
    store: str | None,
    calls_on_disk: bool = False,
    weights_on_disk: bool = False,
) -> dict[str, Any]:
    """Time the bare denoiser calls of one calibration pass, then a whole prune; several processes share the latter.

    Args:
        name, preset: What to run.
        pattern, method: How layers are pruned.
        packages: Calibration passes; None: stage by stage (:mod:`obsdiff.pruning.stream`).
        store: Folder to keep the calibration in, or to find it.
        calls_on_disk: Whether recorded calls wait on the working directory's disk, stage by stage.
        weights_on_disk: Whether weights rest there, in the bare calls, too.

    Returns:
        ``forward_only_s, calibrate_s, solve_s, total_s, ratio`` (total / forward_only), ``peak_memory_bytes`` and what
        the memory plan said of it, ``calibrate_cpu_s`` (None stage by stage) and ``total_cpu_s``, which are CPU seconds
        of the process that took most, ``device, preset, packages`` and what else the figures depend on.
    """
    work = preset.work
    needs = find_method(method).needs | (set() if store is None else {"gram"})
    if work.precision not in (None, "float32") and "gram" not in needs:
        raise UserError(f"precision is of whole Hessians, and {method} asks for none; leave it out")
    pipe, conditioning = build(preset)
    if work.precision is not None and "gram" in needs:
        needs |= {work.precision}
        check_precision(needs, pipe.device)
    if weights_on_disk:
        offload(pipe, pipe.device, Path())
    forward_s = forward_only(pipe, conditioning, work)
    weights_bytes, before_bytes = pipeline_bytes(pipe), resident_memory_bytes()
    calibration = CalibrationOptions(
        num_prompts=work.num_prompts,
        steps=work.steps,
        guidance_scale=work.guidance_scale,
        batch_size=work.batch_size,
        packages=packages,
        streamed=packages is None,
        calls_on_disk=calls_on_disk,
        precision=work.precision,
    )
    options = PruneOptions(
        pattern=pattern,
        method=method,
        allocation="uniform",
        calibration=calibration,
        pipeline=preset.pipeline,
        output="",
        statistics=store,
        weights_on_disk=weights_on_disk,
        evaluation=EvaluationOptions(num_images=0),
    )
    planned = _planned(subject_of(pipe, conditioning), options)
    started, began, measuring_s = time.perf_counter(), time.process_time(), 0.0
    subject = subject_of(pipe, conditioning)  # traced once, as a run does

    settings: Any = {"steps": work.steps, "guidance_scale": work.guidance_scale, "batch_size": work.batch_size}
    reused = store is not None and (Path(store) / "statistics.json").exists()

    def measure(sites: set[str]) -> Statistics:
        nonlocal measuring_s
        own, before = None if store is not None else sites, time.process_time()
        found = calibrate(subject, conditioning, **settings, store=store, needs=needs, sites=own)
        measuring_s += time.process_time() - before
        return found

    statistics: Any = measure
    if packages is None:
        statistics = stream(subject, conditioning, **settings, needs=needs)
        if calls_on_disk:
            statistics.keep_on_disk(Path())
    elif store is not None and packages == 1:
        statistics = measure(set())
    # on the output's disk, as in a run; where no file is nameless, the masks of the report outlast the folder
    with TemporaryDirectory(dir=".", ignore_cleanup_errors=True) as folder:
        keeps = packages is None or (store is not None and packages == 1)
        solved = Path(folder) / "solved" if keeps else None
        report = prune(subject, pattern, method=method, statistics=statistics, packages=packages, solved=solved)
    total_s = time.perf_counter() - started
    cpu_s = [max(spent) for spent in zip(*from_all((measuring_s, time.process_time() - began)), strict=True)]
    return {
        "forward_only_s": round(forward_s, 3),
        "calibrate_s": round(0.0 if reused else report.time_s["calibrate"], 3),
        "solve_s": round(report.time_s["solve"], 3),
        "total_s": round(total_s, 3),
        "ratio": round(total_s / forward_s, 3),
        "calibrate_cpu_s": None if packages is None else round(cpu_s[0], 3),
        "total_cpu_s": round(cpu_s[1], 3),
        "processes": world_size(),
        "peak_memory_bytes": peak_memory_bytes(pipe.device),
        "planned_memory_bytes": planned,
        "weights_bytes": weights_bytes,
        "resident_before_bytes": before_bytes,
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "preset": name,
        "packages": report.packages,
        "streamed": report.streamed,
        "calls_on_disk": calls_on_disk,
        "weights_on_disk": weights_on_disk,
        "statistics_reused": reused,
        "pattern": pattern,
        "method": method,
        "sparsity": report.sparsity,
        "mean_layer_error": report.mean_layer_error,
        "num_prompts": work.num_prompts,
        "steps": work.steps,
        "batch_size": work.batch_size,
        "dtype": work.dtype,
        "precision": None if report.fingerprint is None else report.fingerprint.get("precision", "float32"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _planned(subject: Subject, options: PruneOptions) -> int | None:
    """Bytes that the plan of such a prune counts on the pipeline's device; None where it cannot be made."""
    try:
        planned = plan_loaded(subject, options).memory
    except Exception:  # whatever a model does to counting its call: it is pruned all the same
        return None
    return planned.host_bytes if planned.on_host else planned.device_bytes
