"""OBS-Diff exactly as published (2510.06751), for comparison; ``obs`` is what this package makes of it.

Single weights: SparseGPT's sweep (eq. 2 in fixed column order) on log-weighted statistics (eq. 4-5), scores compared
over 128 columns and all rows, the same share of each 128, N:M inside the loop. Nothing is refitted or centred.

Heads and neurons go greedily, and after each choice the rest is compensated exactly. The text leaves eq. 7 open (the
inverse of a head's block, or the block of the inverse) and says nothing of how many neurons go at once; here the
published code decides (Alrightlone/OBS-Diff 3383a4f). Its mistakes are not repeated: one weight too many per block of
128, half-precision overflow, the same noise in every batch, padded tokens in H.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obsdiff.criteria import sparsegpt
from obsdiff.criteria.base import GroupProblem
from obsdiff.obs.linalg import inverse
from obsdiff.obs.structured import diagonal_blocks, drop_indices, fuse, without_columns

FEWEST, MOST = 64, 1024  # neurons between two scorings
HELD_BACK = 512


solve = sparsegpt.solve  # what differs is the weighting of the statistics, and the packages


def choose(problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept: the groups of lowest score go, heads one by one, neurons by :func:`chunks`.

    Each consumer scores by eq. 6 or 7; two are fused by eq. 8, where the first one (the image stream) decides ties.
    """
    weights = [consumer.weight.float() for consumer in problem.consumers]
    inverses = [inverse(c.hessian, problem.damping)[0] for c in problem.consumers if c.hessian is not None]
    alive = torch.arange(problem.count, device=weights[0].device)
    for now in chunks(problem.remove) if problem.size == 1 else [1] * problem.remove:
        n = len(alive) * problem.size
        errors = [group_scores(w[:, :n], inv[:n, :n], problem.size) for w, inv in zip(weights, inverses, strict=True)]
        order = errors[0].argsort(stable=True)
        remaining = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        remaining[order[drop_indices(fuse(errors, problem.fusion)[order], now)]] = False
        stays = [consumer.columns(remaining.repeat_interleave(problem.size)) for consumer in problem.consumers]
        pairs = [without_columns(w, inv, s) for w, inv, s in zip(weights, inverses, stays, strict=True)]
        weights, inverses = [w for w, _ in pairs], [inv for _, inv in pairs]
        alive = alive[remaining]
    kept = torch.zeros(problem.count, dtype=torch.bool, device=alive.device)
    kept[alive] = True
    return kept


def group_scores(weight: Tensor, hessian_inverse: Tensor, size: int) -> Tensor:
    """``Σ_k ‖W_{:,k}‖² / c_k`` over the columns k of each group, float32 (groups,): eq. 6 (without its factor 2) and 7.

    ``c_k`` is the squared diagonal of the Cholesky factor of the group's block of H⁻¹: what column k costs once the
    group's columns before it are gone. That these change column k is left out, so for heads the score approximates the
    exact error, :func:`obsdiff.obs.structured.group_errors`.
    """
    pivots = torch.linalg.cholesky(diagonal_blocks(hessian_inverse, size)).diagonal(dim1=1, dim2=2)
    return (weight.square().sum(0).view(-1, size) / pivots.square()).sum(1)


def chunks(remove: int) -> Iterator[int]:
    """How many neurons go between two scorings, ``remove`` in all: the published code's sequence."""
    planned = (remove - HELD_BACK) // 2
    while remove > 0:
        now = min(remove, max(planned, FEWEST), MOST)
        yield now
        remove -= now
        planned = (planned - HELD_BACK) // 2
