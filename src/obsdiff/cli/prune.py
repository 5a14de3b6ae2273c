"""``obsdiff prune`` and ``prune.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from obsdiff.cli.options import PruneOptions
from obsdiff.cli.parse import clear_errors, parse_options


def main(args: Sequence[str] | None = None) -> None:
    """Parse, prune, print where the result is."""
    options = parse_options(PruneOptions, "obsdiff prune", args)
    with clear_errors("obsdiff prune"):
        from obsdiff.criteria import find_method
        from obsdiff.export.planning import check_plan_request
        from obsdiff.export.report import summary
        from obsdiff.export.run import prune_run
        from obsdiff.obs.pattern import parse_pattern
        from obsdiff.pruning.folder import check_output, load_pipeline

        check_output(Path(options.output), options.overwrite)  # cheap mistakes before costly loading
        parse_pattern(options.pattern)
        find_method(options.method)
        check_plan_request(planning_of(options), options.include, options.exclude, options.spare_blocks)
        pipe = load_pipeline(options.pipeline, dtype=options.dtype, device=options.device)
        report = prune_run(pipe, request_of(options, pipe))
        print(summary(report, options.output))


def planning_of(options: PruneOptions) -> Any:
    """The options as a :class:`obsdiff.export.planning.PlanRequest`."""
    from obsdiff.allocation.allocate import ScanOptions
    from obsdiff.allocation.units import Limits
    from obsdiff.export.planning import PlanRequest

    store = None if options.sensitivity is None else Path(options.sensitivity)
    limits = options.limits
    return PlanRequest(
        None if options.plan is None else Path(options.plan),
        options.allocation,
        options.budget,
        ScanOptions(options.scan.levels, options.scan.triples, store),
        Limits(limits.floors, limits.ceilings, limits.share),
    )


def request_of(options: PruneOptions, pipe: Any) -> Any:
    """The options as a :class:`obsdiff.export.run.Request`, prompts read."""
    from obsdiff.data.prompts import load_prompts
    from obsdiff.errors import UserError
    from obsdiff.export.run import Request
    from obsdiff.models.info import info_of

    calibration, evaluation, own = options.calibration, options.evaluation, info_of(pipe).prompts
    source = calibration.prompts or own.get("calibration")
    if source is None:
        raise UserError("give --calibration.prompts: a file, a dataset (owner/name), or an embedded set")
    if evaluation.num_images < 0:
        raise UserError(f"evaluation.num_images is {evaluation.num_images}; it must be at least 0")
    if evaluation.batch_size < 1:
        raise UserError(f"evaluation.batch_size is {evaluation.batch_size}; it must be at least 1")
    evaluated = evaluation.prompts or own.get("evaluation")
    column = evaluation.column if evaluation.prompts else None if evaluated else calibration.column
    return Request(
        pattern=options.pattern,
        method=options.method,
        output=Path(options.output),
        calibration_prompts=load_prompts(source, calibration.column, calibration.num_prompts, options.seed),
        evaluation_prompts=load_prompts(evaluated or source, column),
        num_images=evaluation.num_images,
        evaluation_seed=evaluation.seed,
        evaluation_batch_size=evaluation.batch_size,
        refit=options.refit,
        seed=options.seed,
        include=options.include,
        exclude=options.exclude,
        spare_blocks=options.spare_blocks,
        fusion=options.fusion,
        store=None if options.statistics is None else Path(options.statistics),
        overwrite=options.overwrite,
        prune_again=options.prune_again,
        steps=calibration.steps,
        guidance_scale=calibration.guidance_scale,
        batch_size=calibration.batch_size,
        packages=calibration.packages,
        tokens=calibration.tokens,
        weighting=calibration.weighting,
        damping=calibration.damping,
        planning=planning_of(options),
    )
