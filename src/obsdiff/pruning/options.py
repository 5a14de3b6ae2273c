"""How to calibrate and how to evaluate: the part of the options that pruning and recovery share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CalibrationOptions:
    """How layer inputs are measured.

    Args:
        prompts: Prompt set: a .txt, .csv, .tsv or .parquet file, a Hugging Face dataset (owner/name), or an embedded
            one (digits-train, digits-heldout). Default: the pipeline's own set, if it has one.
        column: Caption column of a table or dataset.
        num_prompts: Prompts to draw.
        steps: Denoising steps; default: the pipeline's own.
        guidance_scale: Classifier-free guidance; default: the pipeline's own.
        batch_size: Prompts per pipeline call; changes speed and memory only.
        packages: Calibration passes; later layers are measured with earlier ones pruned.
        tokens: Tokens drawn of each sequence at each call; default: all.
        weighting: Timestep weights: log_decrease, log_increase, linear_decrease, linear_increase or uniform.
            Default: that of the stored statistics, else the method's own (uniform for sparsegpt, log_decrease for
            the others).
        damping: Dampening relative to the mean of a Hessian's diagonal.
    """

    prompts: str | None = None
    column: str | None = None
    num_prompts: int = 100
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4
    packages: int = 1
    tokens: int | None = None
    weighting: str | None = None
    damping: float = 0.01


@dataclass
class EvaluationOptions:
    """How the result is measured, dense against pruned on the same prompts and seeds.

    Args:
        num_images: Images of each; 0 skips the evaluation.
        prompts: Prompt set, as for the calibration. Default: the pipeline's own, else the calibration prompts.
        column: Caption column of a table or dataset.
        seed: Noise seed of the first image; the others count up.
        batch_size: Images per pipeline call.
    """

    num_images: int = 64
    prompts: str | None = None
    column: str | None = None
    seed: int = 1000
    batch_size: int = 32
