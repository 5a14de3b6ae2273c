"""Removing groups of input columns: attention heads (a head's channels) and FFN neurons (single channels)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.obs.linalg import DAMPING, damped, inverse

RRF_CONSTANT = 60  # k of reciprocal rank fusion, as published


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks of ``size`` on the diagonal of (groups · size, groups · size), (groups, size, size)."""
    count = len(matrix) // size
    return matrix.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def without_columns(weight: Tensor, hessian_inverse: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and inverse Hessian of what stays, compensated for what goes.

    ``W_S − W_R (H⁻¹_RR)⁻¹ H⁻¹_RS`` is the least-squares weight on the kept columns, and
    ``H⁻¹_SS − H⁻¹_SR (H⁻¹_RR)⁻¹ H⁻¹_RS`` the inverse of H_SS: a downdate of the rank that goes, exact.

    Args:
        weight: (rows, columns).
        hessian_inverse: (columns, columns).
        kept: Bool (columns,).
    """
    gone = ~kept
    solved = torch.linalg.solve(hessian_inverse[gone][:, gone], hessian_inverse[gone][:, kept])
    left = hessian_inverse[kept]
    return weight[:, kept] - weight[:, gone] @ solved, left[:, kept] - left[:, gone] @ solved


def group_errors(weight: Tensor, hessian_inverse: Tensor, size: int) -> Tensor:
    """The exact error of deleting each group of ``size`` consecutive columns with optimal compensation.

    ``L_g = tr(W_g ((H⁻¹)_gg)⁻¹ W_gᵀ)``, float32 (groups,). For single columns this is OBS-Diff eq. 6 without its
    factor 2; for heads it replaces the approximation of eq. 7.
    """
    count = weight.shape[1] // size
    blocks = diagonal_blocks(hessian_inverse, size)
    columns = weight.reshape(len(weight), count, size).permute(1, 2, 0)  # (groups, size, rows)
    if size == 1:
        return columns.square().sum((1, 2)) / blocks.reshape(-1)
    factor = torch.linalg.cholesky(blocks)
    return torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((1, 2))


def reciprocal_rank(errors: Sequence[Tensor]) -> Tensor:
    """OBS-Diff eq. 8, ``Σ 1 / (60 + rank)``, negated so that low means removable; rank 1 is the lowest error."""
    ranks = torch.stack([error.argsort(stable=True).argsort() for error in errors]) + 1
    return -(1.0 / (RRF_CONSTANT + ranks)).sum(0)


def relative_error(errors: Sequence[Tensor]) -> Tensor:
    """Each consumer's errors as shares of their sum, added."""
    return torch.stack([error / error.sum() for error in errors]).sum(0)


FUSIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "reciprocal_rank": reciprocal_rank,
    "relative_error": relative_error,
}


def fuse(errors: Sequence[Tensor], fusion: str) -> Tensor:
    """One score per group from the errors in several consumers; the lowest score is removed first.

    Args:
        errors: (groups,) of each consumer; those of a single one are the scores.
        fusion: A name of :data:`FUSIONS`.

    Raises:
        ValueError: There is none of that name.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; choose one of {', '.join(FUSIONS)}")
    return errors[0] if len(errors) == 1 else FUSIONS[fusion](errors)


@dataclass(frozen=True)
class Consumer:
    """A layer whose input channels are removed.

    Attributes:
        weight: (rows, columns); the units' columns come first, unit by unit.
        hessian: Of its input (columns, columns); None if nothing was measured.
        others: Columns behind those of the units: not up for removal, but they compensate like the rest.
        gradient: Of a loss by ``weight``, float32 (rows, columns); None if nobody asked for it.
    """

    weight: Tensor
    hessian: Tensor | None = None
    others: int = 0
    gradient: Tensor | None = None

    @property
    def slope(self) -> Tensor:
        """The gradient, for rules that need it."""
        if self.gradient is None:
            raise ValueError("this rule needs the gradients of a loss")
        return self.gradient

    def columns(self, stays: Tensor) -> Tensor:
        """Bool (columns,) from bool over the units' columns: the others stay."""
        return torch.cat([stays, stays.new_ones(self.others)]) if self.others else stays


def select_groups(
    consumers: Sequence[Consumer],
    size: int,
    remove: int,
    fusion: str = "reciprocal_rank",
    chunk: int | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """Greedy choice of the groups to keep: score all, remove the cheapest, update weights and inverses, repeat.

    After removing R the rest sees ``W −= W_R (H⁻¹_RR)⁻¹ H⁻¹_R:`` and ``H⁻¹ −= H⁻¹_:R (H⁻¹_RR)⁻¹ H⁻¹_R:`` (a rank-|R|
    downdate, exact), so no Hessian is factorised twice.

    Args:
        consumers: All layers that read the same channels (two in joint attention); not changed.
        size: Channels per group (head_dim, or 1).
        remove: Groups to remove.
        fusion: See :func:`fuse`.
        chunk: Groups removed between two scorings; None: 1 for heads, 1/16 of the removed neurons otherwise.
        damping: Relative dampening of each Hessian.

    Returns:
        Bool (groups,), True = kept.
    """
    weights = [consumer.weight.float().clone() for consumer in consumers]
    inverses = [inverse(c.hessian, damping)[0] for c in consumers if c.hessian is not None]
    alive = torch.arange((weights[0].shape[1] - consumers[0].others) // size, device=weights[0].device)
    kept = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
    chunk = chunk or (1 if size > 1 else max(1, remove // 16))
    while remove > 0:
        now = min(chunk, remove)
        n = len(alive) * size
        errors = [group_errors(w[:, :n], inv[:n, :n], size) for w, inv in zip(weights, inverses, strict=True)]
        scores = fuse(errors, fusion)
        gone = drop_indices(scores, now)
        kept[alive[gone]] = False
        remaining = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        remaining[gone] = False
        stays = remaining.repeat_interleave(size)
        for k, consumer in enumerate(consumers):
            weights[k], inverses[k] = without_columns(weights[k], inverses[k], consumer.columns(stays))
        alive = alive[remaining]
        remove -= now
    return kept


def drop_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores; equal scores go in order."""
    return scores.argsort(stable=True)[:count]


def keep_highest(scores: Tensor, remove: int) -> Tensor:
    """Bool like ``scores`` (count,), False on the ``remove`` lowest."""
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[drop_indices(scores, remove)] = False
    return kept


def compensate(weight: Tensor, hessian: Tensor, kept: Tensor, damping: float = DAMPING) -> Tensor:
    """The best weight on the kept columns: ``W_S + W_R H_RS H_SS⁻¹``, the closed form of the constrained problem.

    Args:
        weight: Dense weight (rows, columns), any float dtype.
        hessian: H of the layer's input, float32.
        kept: Bool (columns,).

    Returns:
        Float32 (rows, kept columns).
    """
    w = weight.float()
    if bool(kept.all()):
        return w.clone()
    hessian = damped(hessian, damping)
    factor = torch.linalg.cholesky(hessian[kept][:, kept])
    moved = w[:, ~kept] @ hessian[~kept][:, kept]
    return w[:, kept] + torch.cholesky_solve(moved.T, factor).T
