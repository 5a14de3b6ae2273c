"""Least squares on the kept weights with the cached Hessian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 8
TOLERANCE = 0.004  # stop when a step lowers the error by less than this share of it
SOLVED = 1e-8  # a row whose squared residual fell to this share of its start is near float32 rounding


class Refitted(NamedTuple):
    """What a refit gives.

    Attributes:
        weight: Float32 (rows, columns), exactly zero off the mask.
        error: ``tr((W − W₀) H (W − W₀)ᵀ)``.
        steps: Conjugate-gradient steps that were taken.
    """

    weight: Tensor
    error: float
    steps: int


def refit(
    weight: Tensor,
    dense: Tensor,
    mask: Tensor,
    hessian: Tensor,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> Refitted:
    """``min tr((W − W₀) H (W − W₀)ᵀ)  s.t.  W = M ∘ W`` by conjugate gradients, all rows at once.

    Each row is its own problem with its own step sizes; diag(H) preconditions. Started from ``weight``, the error never
    rises from step to step, and only products with H are needed.

    Args:
        weight: Pruned weight to start from, float32 (rows, columns), zero off the mask.
        dense: W₀, float32.
        mask: True = kept.
        hessian: Undamped H.
        steps: At most this many steps.
        tolerance: Relative decrease at which the refit is settled; 0 runs all steps.
    """
    kept = mask.to(weight.dtype)
    diagonal = hessian.diagonal()
    scale = kept / diagonal.clamp_min(1e-6 * float(diagonal.mean()))  # preconditions, and keeps all steps on the mask
    change = dense - weight
    residual = change @ hessian
    error = _row_products(residual, change).sum(dtype=torch.float64)
    result = weight.clone()
    direction, preconditioned = residual * scale, torch.empty_like(residual)
    product = _row_products(residual, direction)
    solved = SOLVED * product
    taken = 0
    while taken < steps:
        taken += 1
        curved = direction @ hessian
        curvature = _row_products(direction, curved)
        # A solved row stays: what is left of its residual is rounding, and H may be singular along it.
        step = torch.where((product > solved) & (curvature > 0), product / curvature, 0.0)
        result.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        decrease = (step * product).sum(dtype=torch.float64)
        error -= decrease
        if float(decrease) <= tolerance * max(float(error), 0.0):
            break
        torch.mul(residual, scale, out=preconditioned)
        updated = _row_products(residual, preconditioned)
        torch.addcmul(preconditioned, torch.where(product > 0, updated / product, 0.0), direction, out=direction)
        product = updated
    result.mul_(kept)
    error = _row_products(residual, torch.sub(dense, result, out=change)).sum(dtype=torch.float64)
    return Refitted(result, max(float(error), 0.0), taken)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, (rows, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)
