"""Fréchet distance between Gaussians of features, in float64.

A covariance Σ is held as a factor A of few rows, Σ = Aᵀ A: then no root of it is needed, and a few hundred images cost
a few hundred rows, not the square of 2,048 features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance between the Gaussians of the features ``a`` (n, d) and ``b`` (m, d)."""
    return frechet_between(a.double().mean(0), factor_of(a), b.double().mean(0), factor_of(b))


def factor_of(features: Tensor) -> Tensor:
    """A float64 factor (min(n, d), d) of the covariance of features (n, d), n at least 2."""
    centred = features.double() - features.double().mean(0)
    factor = centred / (len(features) - 1) ** 0.5
    return factor if len(factor) <= factor.shape[1] else torch.linalg.qr(factor, mode="r").R


def factor_of_covariance(covariance: Tensor) -> Tensor:
    """A factor (d, d) of a covariance (d, d) in float64, which may have lost its rank."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def frechet_between(mean_a: Tensor, factor_a: Tensor, mean_b: Tensor, factor_b: Tensor) -> float:
    """``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)`` (1706.08500 eq. 6).

    With ``Σ_a = Aᵀ A`` and ``Σ_b = Bᵀ B`` the eigenvalues of the last root are the singular values of ``A Bᵀ``, since
    those of ``Σ_a Σ_b`` are the squares of these: never complex, whatever the ranks.

    Args:
        mean_a, mean_b: Float64 (d,).
        factor_a, factor_b: Float64 (r, d) and (s, d).
    """
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return float(distance.clamp_min(0))  # NaN stays NaN
