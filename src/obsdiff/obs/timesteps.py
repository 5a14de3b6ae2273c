"""Weights over the denoising steps (OBS-Diff 2510.06751 §4.1)."""

from __future__ import annotations

import math

from obsdiff.errors import UserError

ALPHA_MIN, ALPHA_MAX = 0.8, 1.2  # the published code's defaults; the paper's text names none

WEIGHTINGS = ("log_decrease", "log_increase", "linear_decrease", "linear_increase", "uniform")


def timestep_weights(
    weighting: str, steps: int, alpha_min: float = ALPHA_MIN, alpha_max: float = ALPHA_MAX
) -> list[float]:
    """``α_t`` for t = 1..``steps``, t = 1 the first (noisiest) denoiser call of a trajectory.

    ``log_decrease`` is eq. 4: ``α_t = α_min + (α_max − α_min) / ln T · ln(T − t + 1)``; the others are the paper's
    alternatives (table 6). OBS does not depend on the scale of the weights, only on their shape.

    Raises:
        UserError: Unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"unknown timestep weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    if weighting == "uniform" or steps == 1:
        return [1.0] * steps
    span = alpha_max - alpha_min
    if weighting.startswith("log"):
        rising = [alpha_min + span / math.log(steps) * math.log(t) for t in range(1, steps + 1)]
    else:
        rising = [alpha_min + span * (t - 1) / (steps - 1) for t in range(1, steps + 1)]
    return rising if weighting.endswith("increase") else rising[::-1]
