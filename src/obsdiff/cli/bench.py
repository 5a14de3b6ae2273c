"""``obsdiff bench prune``, ``obsdiff bench scan`` and ``obsdiff bench train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from obsdiff.cli.early import check_bench, check_on_cpu
from obsdiff.cli.options import BenchOptions, BenchScanOptions, BenchTrainOptions
from obsdiff.cli.parse import clear_errors, fail, parse_options

USAGE = "usage: obsdiff bench prune|scan|train [--preset NAME ...]; obsdiff bench prune --help lists the options"


def main(args: Sequence[str] | None = None) -> None:
    """Parse, measure, print one JSON line."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if args[:1] == ["scan"]:
        _scan(args[1:])
        return
    if args[:1] == ["train"]:
        _train(args[1:])
        return
    if args[:1] != ["prune"]:
        fail("obsdiff bench", f"say what to measure: {USAGE}")
    with clear_errors("obsdiff bench prune"):
        options = parse_options(BenchOptions, "obsdiff bench prune", args[1:])
        check_bench(options)

        from obsdiff.bench.prune import bench_prune
        from obsdiff.memory import freed_at_once
        from obsdiff.ranks import joined_processes, rank

        preset = _preset(options, options.preset)
        if options.weights_on_disk:
            check_on_cpu("weights_on_disk", preset.work.device)
        scarce = options.streamed or options.weights_on_disk
        with joined_processes(preset.work.device) as device, freed_at_once(scarce, large=not options.streamed):
            preset = replace(preset, work=replace(preset.work, device=device))
            found = bench_prune(
                options.preset,
                preset,
                options.pattern,
                options.method,
                None if options.streamed else options.packages,
                options.statistics,
                options.calls_on_disk,
                options.weights_on_disk,
            )
            if rank() == 0:
                print(json.dumps(found))


def _train(args: Sequence[str]) -> None:
    with clear_errors("obsdiff bench train"):
        options = parse_options(BenchTrainOptions, "obsdiff bench train", args)
        from obsdiff.bench.train import bench_train
        from obsdiff.data.trajectories import TrajectoryDataModule

        def data(pipeline: str, folder: Any, batch_size: int) -> TrajectoryDataModule:
            return TrajectoryDataModule(
                pipeline, str(folder), options.prompts, num_prompts=options.num_prompts, batch_size=batch_size
            )

        found = bench_train(options.pipeline, options.pattern, data, options.batch_size, options.steps, options.rounds)
        print(json.dumps(found))


def _scan(args: Sequence[str]) -> None:
    with clear_errors("obsdiff bench scan"):
        options = parse_options(BenchScanOptions, "obsdiff bench scan", args)
        check_bench(options)

        from obsdiff.bench.scan import bench_scan
        from obsdiff.bench.workloads import build, workload_of
        from obsdiff.devices import choose_device
        from obsdiff.errors import UserError
        from obsdiff.pruning.options import BACKWARD, FORWARD, ScanOptions

        scanning = ScanOptions(triples=options.triples, by=options.by)
        if options.plans < 0 or (options.triples is not None and options.triples < 1):
            raise UserError("plans must be at least 0 and triples at least 1")
        if options.by not in (FORWARD, BACKWARD):
            raise UserError(f"--by is {options.by!r}; it is {FORWARD} or {BACKWARD}")
        if options.pipeline is not None and options.preset is not None:
            raise UserError("give a preset or a pipeline, not both")
        name = options.pipeline or options.preset or "sd3-tiny-cpu"
        if options.pipeline is None:
            preset = _preset(options, name)
            pipe, conditioning = build(preset)
            work = preset.work
        else:
            given = {**_given(options), "device": choose_device(options.device)}
            pipe, conditioning, work = workload_of(name, **given)
        found = bench_scan(name, pipe, conditioning, work, options.pattern, options.method, scanning, options.plans)
        print(json.dumps(found))


def _preset(options: BenchOptions | BenchScanOptions, name: str) -> Any:
    """The preset with what the options change."""
    from obsdiff.bench.presets import find_preset, shortened
    from obsdiff.devices import choose_device

    preset = find_preset(name)
    preset = replace(preset, work=replace(preset.work, **_given(options)))
    if isinstance(options, BenchOptions) and options.stages is not None:
        preset = replace(preset, config=shortened(preset, options.stages))
    if isinstance(options, BenchOptions) and options.side is not None:
        preset = replace(preset, call={**preset.call, "height": options.side, "width": options.side})
    choose_device(preset.work.device)
    return preset


def _given(options: BenchOptions | BenchScanOptions) -> dict[str, Any]:
    """What the options say about the workload; sets the threads."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keys = ("device", "dtype", "precision", "num_prompts", "steps", "batch_size")
    return {key: value for key in keys if (value := getattr(options, key, None)) is not None}
