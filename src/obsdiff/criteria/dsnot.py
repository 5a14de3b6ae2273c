"""DSnoT (Dynamic Sparse no Training, 2310.08915): Wanda's mask, then pairs of weights change places; no weight changes.

Of each output row, what pruning takes from its expected output is ``r = Σ_pruned W_j E[x_j]``. Growing brings back
the pruned weight that lowers |r| most for its spread over inputs, the largest ``sign(r) W_j E[x_j] / Var[x_j]``;
pruning takes the kept weight of lowest Wanda score ``|W_j| ‖x_j‖`` among those with ``sign(r) W_j E[x_j] < 0``, so
that |r| falls again (N:M: the lowest of the same group of M, whatever its sign). A row goes on for up to 50 pairs,
until |r| is small or would change sign.

Here r is of one token; the published code (zyxxmu/DSnoT dd4e2ee) adds it up over the 2,048 tokens of a sequence
before it compares it with 0.1. A weight is swapped once, and a row that has no candidate left is finished, where that
code goes on to weights that are there already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obsdiff.criteria.base import Problem, Solution
from obsdiff.obs.pattern import NM, Pattern
from obsdiff.obs.select import keep_best_per_row

CYCLES = 50
THRESHOLD = 0.1 / 2048


def solve(problem: Problem) -> list[Solution]:
    norms, (mean, variance) = problem.powers.sqrt(), problem.spread
    solutions = []
    for weight, pattern in zip(problem.weights, problem.patterns, strict=True):
        scores = weight.abs() * norms
        mask = swapped(keep_best_per_row(scores, pattern), scores, weight * mean.float(), variance, pattern)
        solutions.append(Solution(weight * mask, mask))
    return solutions


def swapped(mask: Tensor, scores: Tensor, expected: Tensor, variance: Tensor, pattern: Pattern) -> Tensor:
    """The mask after growing and pruning, as many of each row as before.

    As r keeps its sign, both sequences of candidates are known beforehand, and how far a row gets is a running sum.

    Args:
        mask: Bool (rows, columns), True = kept.
        scores: Wanda's, float32 (rows, columns).
        expected: ``W_j E[x_j]``, float32 (rows, columns).
        variance: Of the inputs, float32 (columns,).
        pattern: N:M swaps within groups.
    """
    missing = torch.where(mask, 0.0, expected).sum(1, keepdim=True, dtype=torch.float64)
    towards = expected * missing.sign().to(expected)  # above 0: growing it lowers |r|; below 0: pruning it does
    gain = torch.where(~mask & (towards > 0), towards / variance.clamp_min(torch.finfo(torch.float32).tiny), -torch.inf)
    if isinstance(pattern, NM):
        partner = _partners(gain, torch.where(mask, scores, torch.inf), pattern.m)
        gain = torch.where(mask.gather(1, partner), gain, -torch.inf)
        grow = gain.argsort(dim=1, descending=True, stable=True)[:, :CYCLES]
        drop = partner.gather(1, grow)
        there = gain.gather(1, grow) > -torch.inf
    else:
        cost = torch.where(mask & (towards < 0), scores, torch.inf)
        grow = gain.argsort(dim=1, descending=True, stable=True)[:, :CYCLES]
        drop = cost.argsort(dim=1, stable=True)[:, :CYCLES]
        there = (gain.gather(1, grow) > -torch.inf) & (cost.gather(1, drop) < torch.inf)
    change = towards.gather(1, drop).double() - towards.gather(1, grow).double()
    after = missing.abs() + change.cumsum(1)
    taken = (there & (after - change > THRESHOLD) & (after > 0)).cumprod(1).bool()
    grown = torch.zeros_like(mask).scatter_(1, grow, taken)
    dropped = torch.zeros_like(mask).scatter_(1, drop, taken)
    return (mask | grown) & ~dropped


def _partners(gain: Tensor, cost: Tensor, m: int) -> Tensor:
    """For each column the one of its group of ``m`` that goes if it comes back, (rows, columns): the k-th to come back
    in a group takes the place of the k-th lowest of those that were kept."""
    gains, costs = gain.unflatten(1, (-1, m)), cost.unflatten(1, (-1, m))
    place = gains.argsort(dim=2, descending=True, stable=True).argsort(2)
    start = torch.arange(0, gain.shape[1], m, device=gain.device)[:, None]
    return (costs.argsort(dim=2, stable=True).gather(2, place) + start).flatten(1)
