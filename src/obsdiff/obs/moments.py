"""What the solves and their errors go by: a site's input as mean and covariance, never as their sum."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from obsdiff.obs.diagonal import Diagonal
from obsdiff.obs.hessian import Gram
from obsdiff.obs.linalg import all_finite, quadratic_error

ROUNDING = 2.0**-44  # a variance below this share of the squared mean is rounding of float32 inputs


class UnusableStatistics(ValueError):
    """Moments that no solve can go by; the message says why."""


class Moments:
    """What is known of a site's input x: its mean μ and ``C = E[(x − μ)(x − μ)ᵀ]``; ``H = C + μ μᵀ`` only if asked for.

    Attributes:
        mean: μ, float64 where the device has it (columns,).
        centred: C, float32 (columns, columns).
        variance: Its diagonal.
    """

    def __init__(self, statistics: Gram, group: int = 0) -> None:
        self.num_tokens = statistics.num_tokens
        self.mean = statistics.mean(group)
        self.centred = statistics.covariance(group)
        self.variance = self.centred.diagonal()
        variance, square = float(self.centred.diagonal().sum()), float(self.mean.square().sum())
        _check(self.centred, self.centred.diagonal(), variance + square)
        self.varies = variance > ROUNDING * square

    @cached_property
    def hessian(self) -> Tensor:
        """H, float32 (columns, columns)."""
        mean = self.mean.float()
        return torch.addr(self.centred, mean, mean)

    def seen(self, biased: bool) -> Tensor:
        """What least squares go by: C if a bias takes up the mean (and anything is left of the input without it)."""
        return self.centred if biased and self.varies else self.hessian

    def through(self, weight: Tensor) -> Tensor:
        """What a weight (or a change of it) makes of the mean input: ``W μ``, (rows,), in the dtype of ``mean``."""
        return weight.to(self.mean.dtype) @ self.mean

    def spread(self, weight: Tensor) -> float:
        """What it makes of the variance: ``tr(W C Wᵀ)``."""
        return quadratic_error(weight, self.centred)

    def output(self, dense: Tensor) -> tuple[float, float]:
        """Of the dense layer's output without its bias: variance ``tr(W₀ C W₀ᵀ)`` and squared mean ``‖W₀ μ‖²``."""
        return self.spread(dense), float(self.through(dense).square().sum())


class Powers:
    """What is known of a site's input where only the diagonal of H was measured.

    Attributes:
        power: diag H, float32 (columns,).
        mean, variance: Of the input, (columns,).
    """

    def __init__(self, statistics: Diagonal, group: int = 0) -> None:
        self.num_tokens = statistics.num_tokens
        self.mean = statistics.mean(group)
        self.variance = statistics.variances()[group] / statistics.weight_sum
        self.power = statistics.power()[group]
        _check(self.power, self.power, float(self.power.sum()))


def _check(values: Tensor, variances: Tensor, total: float) -> None:
    if not math.isfinite(total) or not all_finite(values):
        raise UnusableStatistics("hold non-finite values")
    if bool((variances < 0).any()):
        raise UnusableStatistics("hold negative variances")
    if total <= 0:
        raise UnusableStatistics("saw only zeros")


def relative_error(error: float, variance: float, square: float) -> float:
    """An output error over the variance of the dense output.

    The mean is no signal: against the whole power, an output that is all wrong would look right where the mean is
    large. Only an output that does not vary is measured against its power.
    """
    if variance > ROUNDING * square:
        return error / variance
    return error / (variance + square) if variance + square > 0 else 0.0
