"""Fréchet distance between Gaussians of features, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance between the Gaussians of the features ``a`` (n, d) and ``b`` (m, d)."""
    a, b = a.double(), b.double()
    return frechet_between(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_between(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)`` (1706.08500 eq. 6).

    The root is taken of a symmetric matrix by its eigenvalues, so rank-deficient covariances (fewer samples than
    dimensions) give a finite, never complex, result.

    Args:
        mean_a, covariance_a, mean_b, covariance_b: Float64 (d,) and (d, d).
    """
    root_a = _root(covariance_a)
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float(distance.clamp_min(0))  # NaN stays NaN


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
