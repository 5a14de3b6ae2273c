"""Fréchet distance between two sets of features, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)`` (1706.08500 eq. 6).

    The means and covariances are those of the features ``a`` (n, d) and ``b`` (m, d).

    The root is taken of a symmetric matrix by its eigenvalues, so rank-deficient covariances (fewer samples than
    dimensions) give a finite, never complex, result.
    """
    a, b = a.double(), b.double()
    root_a = _root(torch.cov(a.T))
    covariance_b = torch.cov(b.T)
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp_min(0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    distance = shift + torch.cov(a.T).trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
