"""Damped factors of a site's Hessian."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

DAMPING = 0.01  # relative to mean diag(H), the published default
RETRIES = 5
BLOCKED = 128  # columns of factors and forms at a time; torch's own factor spends half of its time on copies
LAUNCHED = 1024  # of products by parts on a GPU, where each part is a launch
MIRRORED = 256  # columns of the tiles that are transposed: a cache holds two


class SingularHessian(ArithmeticError):
    """No dampening tried made the Hessian positive definite."""


def all_finite(values: Tensor) -> bool:
    """Whether no entry (there is one at least) is infinite or NaN: the extremes tell, in a tenth of the time."""
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``H + damping · mean(diag H) · I``, a new tensor."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal += damping * diagonal.mean()
    return result


def upper_factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The upper triangular R with ``H = R Rᵀ`` for the damped H, and the dampening that was needed.

    This is the Cholesky factor of H in reversed order. Its inverse ``U = R⁻¹`` is the upper factor of SparseGPT,
    ``H⁻¹ = Uᵀ U``, so that neither H⁻¹ nor a second factorisation is needed. A failed factorisation is tried again
    with ten times the dampening, and says so.

    Args:
        hessian: Symmetric (n, n), float32.
        damping: Relative to the mean of the diagonal.

    Raises:
        SingularHessian: Still not positive definite after five retries.
    """
    tried = damping
    for _ in range(RETRIES + 1):
        factor = _factored(hessian, tried)
        if factor is not None:
            return factor, tried
        warnings.warn(
            f"Hessian of {len(hessian)} columns is not positive definite at dampening {tried:g}; "
            f"trying {10 * max(tried, 1e-6):g}",
            RuntimeWarning,
            stacklevel=2,
        )
        tried = 10 * max(tried, 1e-6)
    raise SingularHessian(f"Hessian of {len(hessian)} columns is not positive definite at dampening {tried:g}")


def _factored(hessian: Tensor, damping: float) -> Tensor | None:
    """R of the damped H, some columns at a time from the last ones on; None if that is not positive definite.

    With the columns behind them known, those of a block are ``R_b R_bbᵀ = H_b − R_> R_b>ᵀ``, whose own rows give
    R_bb (Golub & Van Loan, Matrix Computations, 4.2.6, in reversed order).
    """
    step = LAUNCHED if hessian.is_cuda else BLOCKED
    added = damping * hessian.diagonal().mean()
    factor, failures = torch.zeros_like(hessian), []
    for end in range(len(hessian), 0, -step):
        start = max(0, end - step)
        left = torch.addmm(hessian[:end, start:end], factor[:end, end:], factor[start:end, end:].T, alpha=-1)
        flipped = left[start:].flip(0, 1)
        flipped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        failures.append(failed)
        own = factor[start:end, start:end].copy_(lower.flip(0, 1))
        if start > 0:
            factor[:start, start:end] = torch.linalg.solve_triangular(own.T, left[:start], upper=False, left=False)
    return None if bool(torch.stack(failures).any()) else factor  # asked once: a GPU would be waited for each time


def mirror_(upper: Tensor) -> Tensor:
    """The symmetric matrix of which ``upper`` holds the upper triangle, in place, whatever is below."""
    for start in range(0, len(upper), MIRRORED):
        end = start + MIRRORED
        upper[end:, start:end] = upper[start:end, end:].T
        own = upper[start:end, start:end].triu_()
        own += own.triu(1).T
    return upper


def inverse(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The inverse of the damped H, symmetric (n, n), and the dampening that was needed."""
    factor, used = upper_factor(hessian, damping)
    return torch.cholesky_inverse(factor.T.flip(0, 1), upper=True).flip(0, 1), used


def quadratic_error(delta: Tensor, hessian: Tensor) -> float:
    """``tr(Δ H Δᵀ)``: the weighted mean squared output error of a weight change (OBS-Diff eq. 3), never negative."""
    return max(0.0, float(quadratic_forms(delta.to(hessian.dtype), hessian).sum(dtype=torch.float64)))


def quadratic_forms(rows: Tensor, hessian: Tensor) -> Tensor:
    """``w H wᵀ`` of each row w, (rows, 1), from the upper triangle of a symmetric H: little more than half the work of
    ``W H``.

    Of some columns at a time, ``w_b H_bb w_bᵀ + 2 w_< H_<b w_bᵀ``, where < are those before them.
    """
    step = LAUNCHED if hessian.is_cuda else BLOCKED
    total = torch.zeros(len(rows), 1, dtype=hessian.dtype, device=hessian.device)
    for start in range(0, len(hessian), step):
        end = min(start + step, len(hessian))
        own = rows[:, start:end]
        seen = own @ hessian[start:end, start:end]
        seen.addmm_(rows[:, :start], hessian[:start, start:end], alpha=2)
        total += row_products(seen, own)
    return total


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, (rows, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)
