"""Removing groups of input columns: attention heads (a head's channels) and FFN neurons (single channels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.obs.linalg import DAMPING, damped, inverse

RRF_CONSTANT = 60  # k of reciprocal rank fusion, as published
FUSIONS = ("reciprocal_rank", "relative_error")


def group_errors(weight: Tensor, hessian_inverse: Tensor, size: int) -> Tensor:
    """The exact error of deleting each group of ``size`` consecutive columns with optimal compensation.

    ``L_g = tr(W_g ((H⁻¹)_gg)⁻¹ W_gᵀ)``, float32 (groups,). For single columns this is OBS-Diff eq. 6 without its
    factor 2; for heads it replaces the approximation of eq. 7.
    """
    count = weight.shape[1] // size
    blocks = hessian_inverse.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.reshape(len(weight), count, size).permute(1, 2, 0)  # (groups, size, rows)
    if size == 1:
        return columns.square().sum((1, 2)) / blocks.reshape(-1)
    factor = torch.linalg.cholesky(blocks)
    return torch.linalg.solve_triangular(factor, columns, upper=False).square().sum((1, 2))


def fuse(errors: Sequence[Tensor], fusion: str) -> Tensor:
    """One score per group from the errors in several consumers; the lowest score is removed first.

    ``reciprocal_rank`` is OBS-Diff eq. 8, ``Σ 1 / (60 + rank)``, negated so that low means removable; ranks start
    at 1 with the lowest error. ``relative_error`` adds each consumer's errors as shares of their sum.
    """
    if len(errors) == 1:
        return errors[0]
    if fusion == "relative_error":
        return torch.stack([error / error.sum() for error in errors]).sum(0)
    ranks = torch.stack([error.argsort(stable=True).argsort() for error in errors]) + 1
    return -(1.0 / (RRF_CONSTANT + ranks)).sum(0)


@dataclass(frozen=True)
class Consumer:
    """A layer whose input channels are removed.

    Attributes:
        weight: (rows, columns).
        hessian: Of its input (columns, columns); None if nothing was measured.
        columns: Where the units' channels lie, unit by unit, int64 (count · size,); None: they are all columns. What
            else the layer reads is not up for removal, but compensates like the rest.
    """

    weight: Tensor
    hessian: Tensor | None = None
    columns: Tensor | None = None

    def units_first(self, matrix: Tensor, both: bool = False) -> Tensor:
        """The columns (and rows) of a matrix with those of the units in front, in their order."""
        if self.columns is None:
            return matrix
        others = torch.ones(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
        others[self.columns] = False
        order = torch.cat([self.columns, others.nonzero().flatten()])
        return matrix[:, order][order] if both else matrix[:, order]

    @property
    def channels(self) -> int:
        """Channels of all units together."""
        return self.weight.shape[1] if self.columns is None else len(self.columns)


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
    weights = [c.units_first(c.weight.float().clone()) for c in consumers]
    inverses = [c.units_first(inverse(c.hessian, damping)[0], both=True) for c in consumers if c.hessian is not None]
    rest = [c.weight.shape[1] - c.channels for c in consumers]  # columns of other things, behind the units'
    alive = torch.arange(consumers[0].channels // size, device=weights[0].device)
    kept = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
    chunk = chunk or (1 if size > 1 else max(1, remove // 16))
    while remove > 0:
        now = min(chunk, remove)
        n = len(alive) * size
        scores = fuse(
            [group_errors(w[:, :n], inv[:n, :n], size) for w, inv in zip(weights, inverses, strict=True)], fusion
        )
        gone = drop_indices(scores, now)
        kept[alive[gone]] = False
        remaining = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        remaining[gone] = False
        stays = remaining.repeat_interleave(size)
        for k, (w, inv) in enumerate(zip(weights, inverses, strict=True)):
            s = torch.cat([stays, stays.new_ones(rest[k])])
            r = ~s
            solved = torch.linalg.solve(inv[r][:, r], inv[r][:, s])  # (H⁻¹_RR)⁻¹ H⁻¹_RS
            weights[k] = w[:, s] - w[:, r] @ solved
            inverses[k] = inv[s][:, s] - inv[s][:, r] @ solved
        alive = alive[remaining]
        remove -= now
    return kept


def drop_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores; equal scores go in order."""
    return scores.argsort(stable=True)[:count]


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
