"""Which weights to drop, given a score for each: exact counts whatever the ties."""

from __future__ import annotations

import torch
from torch import Tensor

from obsdiff.obs.pattern import NM, Pattern, Unstructured

SAMPLE = 4096  # scores looked at to bracket the threshold of a large selection


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """A bool mask, True on exactly ``count`` of the lowest scores, however many are equal."""
    flat = scores.reshape(-1)
    dropped = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if count > 0:
        sure, candidates = _bracket(flat, count) if flat.numel() > 4 * SAMPLE else (dropped, None)
        dropped = sure
        if candidates is None:
            dropped[flat.topk(count, largest=False, sorted=False).indices] = True
        else:
            rest = count - int(sure.sum())
            dropped[candidates[flat[candidates].topk(rest, largest=False, sorted=False).indices]] = True
    return dropped.view(scores.shape)


def _bracket(flat: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Split a large selection: a mask of what certainly goes, and the indices that hold the threshold.

    A sorted sample brackets the threshold within four standard deviations; selecting among the few scores inside is
    several times faster than among all. If the bracket misses (or a NaN hides it), the indices are None.
    """
    sample = flat[:: flat.numel() // SAMPLE].sort().values
    share, last = count / flat.numel(), len(sample) - 1
    margin = 4 * (share * (1 - share) / len(sample)) ** 0.5 + 1 / last
    low, high = (sample[round(min(max(at, 0.0), 1.0) * last)] for at in (share - margin, share + margin))
    below = flat < low
    candidates = ((flat >= low) & (flat <= high)).nonzero().squeeze(1)
    certain = int(below.sum())
    if certain <= count <= certain + len(candidates):
        return below, candidates
    return torch.zeros_like(below), None


def drop_lowest_nm(scores: Tensor, pattern: NM) -> Tensor:
    """A bool mask like ``scores`` (..., columns), True on the m - n lowest of every m consecutive columns."""
    groups = scores.unflatten(-1, (-1, pattern.m))
    lowest = groups.argsort(dim=-1, stable=True)[..., : pattern.m - pattern.n]
    dropped = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True)
    return dropped.flatten(-2)


def keep_best(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask (True = kept) that keeps the best scores of one layer (rows, columns) under ``pattern``."""
    if isinstance(pattern, NM):
        return ~drop_lowest_nm(scores, pattern)
    assert isinstance(pattern, Unstructured)
    return ~drop_lowest(scores, round(pattern.ratio * scores.numel()))


def keep_best_per_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """Like :func:`keep_best`, but every row gives up the same share; the rounding is spread over the rows."""
    if isinstance(pattern, NM):
        return keep_best(scores, pattern)
    assert isinstance(pattern, Unstructured)
    rows, columns = scores.shape
    steps = torch.arange(rows + 1, dtype=torch.float64, device=scores.device)
    counts = (steps * (pattern.ratio * columns)).round().diff().long()
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return rank >= counts[:, None]


def split_count(ratio: float, total: int, start: int, end: int) -> int:
    """How many of the elements [start, end) of ``total`` to drop so that all parts add up to round(ratio · total)."""
    return round(round(ratio * total) * end / total) - round(round(ratio * total) * start / total)
