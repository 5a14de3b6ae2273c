"""``obsdiff evaluate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from obsdiff.cli.early import checked_evaluate
from obsdiff.cli.options import EvaluateOptions
from obsdiff.cli.parse import clear_errors, parse_options

PROGRAM = "obsdiff evaluate"
EXAMPLE = """example: obsdiff evaluate outputs/digits --output outputs/digits-evaluated
required: the pipeline (a run's folder, a name, any folder or a hub id)"""
NONE = "none"


def main(args: Sequence[str] | None = None) -> None:
    """Parse, draw, measure, print the figures. Under ``torchrun`` the processes share the drawing."""
    with clear_errors(PROGRAM):
        started = time.perf_counter()
        options = checked_evaluate(parse_options(EvaluateOptions, PROGRAM, args, positional=True, example=EXAMPLE))

        from obsdiff.devices import choose_device

        device = choose_device(options.device, float64=False)

        from obsdiff.evaluation.scorers import check_scorers
        from obsdiff.export.evaluate import FILE, asked_prompts, evaluate, origin_of, write_evaluation
        from obsdiff.export.layouts import INDEX, check_layout, write_images
        from obsdiff.export.summary import measured_summary
        from obsdiff.files import check_apart, check_folder, check_writable, whole_folder
        from obsdiff.pruning.folder import load_pipeline
        from obsdiff.ranks import joined_processes, rank, wait_for_all

        output = None if options.output is None else Path(options.output)
        images = None if options.images is None else Path(options.images)
        check_apart(output=output, images=images)
        if output is not None:
            check_folder(output, FILE, "an evaluation", replace=options.overwrite)
        if images is not None:
            check_folder(images, INDEX, "images", replace=False, hint="another --images")
        check_writable(*(place for place in (output, images) if place is not None))
        check_scorers(options.scorers)
        what, against = origin_of(options.pipeline)
        against = against if options.against is None else None if options.against == NONE else options.against
        with joined_processes(device) as device:
            pipe = load_pipeline(options.pipeline, dtype=options.dtype, device=device)
            dense = None if against is None else load_pipeline(against, dtype=options.dtype, device=device)
            prompts = asked_prompts(pipe, options.evaluation, distinct=options.layout != "plain")
            records = check_layout(options.layout, prompts, options.evaluation.prompts)
            found = evaluate(
                pipe,
                dense,
                what=what,
                scorers=options.scorers,
                latency=options.latency,
                quiet=False,
                texts=prompts,
                **asdict(options.evaluation),
            )
            if rank() == 0:
                title = f"{options.pipeline}" + ("" if against is None else f" against {against}")
                if output is not None:
                    with whole_folder(output, FILE, replace=options.overwrite) as folder:
                        write_evaluation(folder, found, title)
                if images is not None:
                    with whole_folder(images, INDEX) as folder:
                        write_images(folder, options.layout, found["images"][what], prompts, found["seeds"], records)
                print(measured_summary(title, found, output, time.perf_counter() - started))
            wait_for_all()
