"""``obsdiff bench prune``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from obsdiff.cli.options import BenchOptions
from obsdiff.cli.parse import clear_errors, fail, parse_options

USAGE = "usage: obsdiff bench prune [--preset NAME ...]; obsdiff bench prune --help lists the options"


def main(args: Sequence[str] | None = None) -> None:
    """Parse, measure, print one JSON line."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if args[:1] != ["prune"]:
        fail("obsdiff bench", f"say what to measure: {USAGE}")
    options = parse_options(BenchOptions, "obsdiff bench prune", args[1:])
    with clear_errors("obsdiff bench prune"):
        from dataclasses import replace

        import torch

        from obsdiff.evaluation.bench import bench_prune, find_preset

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        given = {
            key: value
            for key in ("device", "dtype", "num_prompts", "steps", "batch_size")
            if (value := getattr(options, key)) is not None
        }
        preset = replace(find_preset(options.preset), **given)
        print(
            json.dumps(
                bench_prune(
                    options.preset,
                    preset,
                    options.pattern,
                    options.method,
                    options.packages,
                    options.statistics,
                )
            )
        )
