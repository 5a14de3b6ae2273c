"""``obsdiff prune`` and ``prune.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from obsdiff.cli.parse import clear_errors, parse_options
from obsdiff.pruning.options import PruneOptions


def main(args: Sequence[str] | None = None) -> None:
    """Parse, prune, print where the result is. Under ``torchrun`` the processes share the work."""
    options = parse_options(PruneOptions, "obsdiff prune", args)
    with clear_errors("obsdiff prune"):
        from obsdiff.allocation.planning import check_options
        from obsdiff.export.run import prune_run
        from obsdiff.export.summary import prune_summary
        from obsdiff.pruning.folder import check_output, load_pipeline
        from obsdiff.ranks import joined_processes, rank

        check_output(Path(options.output), options.overwrite)  # cheap mistakes before costly loading
        check_options(
            options,
            None if options.statistics is None else Path(options.statistics),
            None if options.sensitivity is None else Path(options.sensitivity),
        )
        with joined_processes(options.device) as device:
            pipe = load_pipeline(options.pipeline, dtype=options.dtype, device=device)
            report = prune_run(pipe, options)
            if rank() == 0:
                print(prune_summary(report, options.output))
