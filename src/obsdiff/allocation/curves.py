"""Error curves from few measurements.

A layer's error at the denoiser's output is its own output error times an amplification that hardly depends on how much
was pruned (docs/method.md has the figures). Its own error comes with every solve, so the amplification needs few
measurements and the curve between them follows the solves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

TINY = 1e-30  # below every error that is measured, so that logarithms exist


def error_curve(solved: Mapping[float, float], measured: Mapping[float, float], shares: Sequence[float]) -> list[float]:
    """Output error at ``shares``, never falling.

    Args:
        solved: The layer's own relative error by share removed.
        measured: The error at the denoiser's output by share removed; each share must also be solved.
        shares: Where to read the curve, rising, in [0, 1); the error of share 0 is 0.
    """
    if not any(error > 0 for error in measured.values()):
        return [0.0] * len(shares)
    own = sorted((_logit(share), math.log(max(error, TINY))) for share, error in solved.items() if share > 0)
    amplified = sorted(
        (_logit(share), math.log(max(error, TINY)) - math.log(max(solved[share], TINY)))
        for share, error in measured.items()
        if share > 0 and error > 0
    )
    found = []
    for share in shares:
        if share <= 0:
            found.append(0.0)
            continue
        at = _logit(share)
        found.append(math.exp(interpolate(own, at, extend=True) + interpolate(amplified, at)))
    return list(accumulate(found, max))


def corrected_errors(
    solved: Mapping[float, float], predicted: Mapping[float, float], measured: Mapping[float, float]
) -> dict[float, float]:
    """Predicted output errors by share removed, brought to what was measured at the largest share.

    What a first-order prediction misses grows with the change itself: the logarithm of measured over predicted goes
    with the layer's own relative error (docs/method.md has the figures).

    Args:
        solved: The layer's own relative error; of all shares that were predicted.
        predicted: The output error to first order; of the largest share that was measured too.
        measured: The output error where the denoiser ran; where it did this is what counts.
    """
    largest = max(measured)
    if not (measured[largest] > 0 and predicted[largest] > 0):
        return {**predicted, **measured}
    missed = math.log(measured[largest] / predicted[largest]) / max(solved[largest], TINY)
    most = solved[largest]
    corrected = {s: error * math.exp(missed * min(solved[s], most)) for s, error in predicted.items()}
    return {**corrected, **measured}


def interpolate(points: Sequence[tuple[float, float]], at: float, extend: bool = False) -> float:
    """Piecewise linear through ``points`` (sorted); outside constant, or with ``extend`` along the last stretch."""
    if len(points) == 1:
        return points[0][1]
    if not extend:
        at = min(max(at, points[0][0]), points[-1][0])
    right = next((i for i in range(1, len(points) - 1) if at < points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
