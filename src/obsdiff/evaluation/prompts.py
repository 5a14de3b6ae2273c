"""What the images of an evaluation are of."""

from __future__ import annotations

from typing import Any

from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import check_measurable
from obsdiff.evaluation.sampling import cycle_prompts
from obsdiff.models.conditioning import told_nothing
from obsdiff.models.info import info_of
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions


def evaluation_prompts(
    pipe: Any, evaluation: EvaluationOptions, calibration: CalibrationOptions | None = None
) -> list[str]:
    """One prompt per image of the evaluation: from the set that was named, else the pipeline's own, else the
    calibration's.

    Raises:
        UserError: The options are out of range, there is no set, it cannot be read, or its prompts ask for what the
            pipeline's reader of images cannot tell.
    """
    if evaluation.num_images < 0:
        raise UserError(f"evaluation.num_images is {evaluation.num_images}; it must be at least 0")
    if evaluation.batch_size < 1:
        raise UserError(f"evaluation.batch_size is {evaluation.batch_size}; it must be at least 1")
    if evaluation.num_images == 0:
        return []
    if told_nothing(pipe, evaluation.prompts):
        return [""] * evaluation.num_images
    info = info_of(pipe)
    sets = [(evaluation.prompts, evaluation.column), (info.prompts.get("evaluation"), None)]
    if calibration is not None:
        sets += [(calibration.prompts, calibration.column), (info.prompts.get("calibration"), None)]
    source, column = next(((source, column) for source, column in sets if source), (None, None))
    if source is None:
        raise UserError("name what to draw, evaluation.prompts, or ask for no evaluation, evaluation.num_images 0")
    prompts = cycle_prompts(load_prompts(source, column), evaluation.num_images)
    check_measurable(prompts, info.alignment, evaluation.measures)
    return prompts
