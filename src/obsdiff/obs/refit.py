"""Least squares on the kept weights with the cached Hessian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from obsdiff.obs.linalg import quadratic_forms, row_products

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
        tolerance: Relative decrease at which the refit is settled; 0 runs all steps. So does a CUDA device, which would
            have to be waited for in each step.
    """
    diagonal = hessian.diagonal()
    scale = mask / diagonal.clamp_min(1e-6 * float(diagonal.mean()))  # preconditions, and keeps all steps on the mask
    change = dense - weight
    residual = change @ hessian
    error = row_products(residual, change).sum(dtype=torch.float64)
    del change
    result = weight.clone()
    direction, curved = residual * scale, torch.empty_like(residual)
    product = row_products(residual, direction)
    solved = SOLVED * product
    taken = 0
    while taken < steps:
        taken += 1
        if taken < steps:
            torch.matmul(direction, hessian, out=curved)
            curvature = row_products(direction, curved)
        else:  # no step follows that would ask for the residual
            curvature = quadratic_forms(direction, hessian)
        # A solved row stays: what is left of its residual is rounding, and H may be singular along it.
        step = torch.where((product > solved) & (curvature > 0), product / curvature, 0.0)
        result.addcmul_(step, direction)
        decrease = (step * product).sum(dtype=torch.float64)
        error -= decrease
        if taken == steps or (not hessian.is_cuda and float(decrease) <= tolerance * max(float(error), 0.0)):
            break
        residual.addcmul_(step, curved, value=-1)
        preconditioned = torch.mul(residual, scale, out=curved)  # which has served
        updated = row_products(residual, preconditioned)
        torch.addcmul(preconditioned, torch.where(product > 0, updated / product, 0.0), direction, out=direction)
        product = updated
    return Refitted(result.mul_(mask), max(float(error), 0.0), taken)
