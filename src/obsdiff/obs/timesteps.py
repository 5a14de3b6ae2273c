"""Weights over the denoising steps (OBS-Diff 2510.06751 §4.1)."""

from __future__ import annotations

import math

from obsdiff.errors import UserError

ALPHA_MIN, ALPHA_MAX = 0.8, 1.2  # the published code's defaults; the paper's text names none

WEIGHTINGS = ("log_decrease", "log_increase", "linear_decrease", "linear_increase", "uniform")
MEASURED = "measured"
"""Weights that are found out on the model (:mod:`obsdiff.pruning.alphas`), and then stand as a list."""


def timestep_weights(weighting: str, steps: int) -> list[float]:
    """``α_t`` for t = 1..``steps``, t = 1 the first (noisiest) denoiser call of a trajectory.

    ``log_decrease`` is eq. 4: ``α_t = α_min + (α_max − α_min) / ln T · ln(T − t + 1)``; the others are the paper's
    alternatives (table 6). OBS does not depend on the scale of the weights, only on their shape.

    Args:
        weighting: A name of :data:`WEIGHTINGS`, with another range after it ("log_decrease:0.2-1.8"), or the weights
            themselves ("1.4,1.1,0.5").
        steps: T.

    Raises:
        UserError: It is none of these, or lists another number of weights.
    """
    name, low, high, listed = _parsed(weighting)
    if listed:
        if len(listed) != steps:
            raise UserError(f"{len(listed)} timestep weights are given for {steps} steps")
        return listed
    if name == "uniform" or steps == 1:
        return [1.0] * steps
    span = high - low
    if name.startswith("log"):
        rising = [low + span / math.log(steps) * math.log(t) for t in range(1, steps + 1)]
    else:
        rising = [low + span * (t - 1) / (steps - 1) for t in range(1, steps + 1)]
    return rising if name.endswith("increase") else rising[::-1]


def check_weighting(weighting: str) -> None:
    """Refuse what names no weights, whatever the steps.

    Raises:
        UserError: Saying what there is.
    """
    if weighting != MEASURED:
        _parsed(weighting)


def listed_weights(weights: list[float]) -> str:
    """Weights as a text that :func:`timestep_weights` takes, to three digits, their mean being 1."""
    mean = sum(weights) / len(weights)
    return ",".join(f"{weight / mean:.3g}" for weight in weights)


def _parsed(weighting: str) -> tuple[str, float, float, list[float]]:
    """Name and range, or the list."""
    name, colon, rest = weighting.partition(":")
    if name in WEIGHTINGS:
        if name == "uniform" and colon:
            raise UserError(f"timestep weighting {weighting!r}: uniform weights have no range")
        low, high, *more = _numbers(rest.split("-"), weighting) if colon else [ALPHA_MIN, ALPHA_MAX]
        if more or low > high:
            raise UserError(f"timestep weighting {weighting!r} needs a range from low to high, such as {name}:0.2-1.8")
        return name, low, high, []
    if "," in weighting:
        return "", 0.0, 0.0, _numbers(weighting.split(","), weighting)
    raise UserError(
        f"unknown timestep weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}, {MEASURED}, with a range as "
        "log_decrease:0.2-1.8, or list a weight for each step"
    )


def _numbers(texts: list[str], weighting: str) -> list[float]:
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = []
    if len(found) < 2 or not all(0 < value < math.inf for value in found):
        raise UserError(f"timestep weighting {weighting!r} needs positive numbers, such as log_decrease:0.2-1.8")
    return found
