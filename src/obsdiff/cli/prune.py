"""``obsdiff prune`` and ``prune.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from obsdiff.cli.early import check_on_cpu, checked_prune, kept
from obsdiff.cli.parse import clear_errors, parse_options
from obsdiff.errors import UserError
from obsdiff.paths import unfinished_solves, unfinished_stages
from obsdiff.pruning.options import PruneOptions

PROGRAM = "obsdiff prune"
EXAMPLE = """example: obsdiff prune --pipeline digits-sd3 --output outputs/digits --pattern unstructured:0.5
required: --pipeline (a name, folder or hub id) and --output (a new folder)"""


def main(args: Sequence[str] | None = None) -> None:
    """Parse, prune, print where the result is. Under ``torchrun`` the processes share the work."""
    with clear_errors(PROGRAM) as session:
        options = checked_prune(parse_options(PruneOptions, PROGRAM, args, example=EXAMPLE))
        stages = str(unfinished_stages(options.output))
        solved = unfinished_solves(options.output)
        session.kept = partial(
            kept, options.statistics, options.sensitivity, stages, output=options.output, solved=solved
        )

        from obsdiff.devices import choose_device

        device = options.device if options.dry_run and options.device else choose_device(options.device)
        if options.offload and device.startswith("cpu"):
            raise UserError(
                "--offload spares the memory of a device, and this run is on the cpu; leave it out, or give "
                "--weights_on_disk true"
            )
        if options.weights_on_disk:
            check_on_cpu("weights_on_disk", device)

        from obsdiff.allocation.planning import check_options
        from obsdiff.export.places import check_places
        from obsdiff.export.run import prune_run
        from obsdiff.export.summary import prune_summary
        from obsdiff.memory import freed_at_once
        from obsdiff.models.offload import offload
        from obsdiff.pruning.folder import load_pipeline
        from obsdiff.ranks import from_all, joined_processes, rank

        check_places(options)  # cheap mistakes before costly loading
        check_options(
            options,
            None if options.statistics is None else Path(options.statistics),
            None if options.sensitivity is None else Path(options.sensitivity),
        )
        if options.dry_run or options.device_memory is not None or options.host_memory is not None:
            from obsdiff.allocation.fitting import plan_from_configs
            from obsdiff.export.memory_report import full_plan
            from obsdiff.ranks import started_first

            if options.dry_run and not started_first():
                return
            planned = plan_from_configs(options, device)
            if options.dry_run:
                print(full_plan(planned))
                return
            options = planned.options
            if planned.chosen and started_first():
                print(f"chosen to fit: {planned.chosen}", file=sys.stderr)
        with ExitStack() as stack:
            device = stack.enter_context(joined_processes(device))
            options = from_all(options)[0]  # each planned beside what it holds itself
            # before anything is loaded: these are for what memory hardly holds
            streamed, scarce = options.calibration.streamed, options.calibration.streamed or options.weights_on_disk
            stack.enter_context(freed_at_once(scarce, large=not streamed))
            pipe = load_pipeline(
                options.pipeline,
                dtype=options.dtype,
                device="cpu" if options.offload else device,
                variant=options.variant,
                denoiser=options.denoiser,
            )
            if options.offload:
                offload(pipe, device)
            if options.weights_on_disk:
                offload(pipe, device, Path(options.output).parent)
            report = prune_run(pipe, options)
            if rank() == 0:
                print(prune_summary(report, options.output))
