"""Which weights to drop, given a score for each: exact counts whatever the ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from obsdiff.obs.pattern import NM, Pattern, Unstructured

SORTED = 2**21  # scores that a CUDA device sorts; of more, order and places would take too much of its memory
SAMPLE = 2048  # scores looked at to bracket the threshold of a large selection


def count_nonzero(values: Tensor) -> int:
    """How many entries are not zero; on a CPU in a fraction of torch's time, which branches at each."""
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:  # which numpy does not have
        return int(values.count_nonzero())
    array = values.detach().numpy()
    return int((array if array.dtype == bool else array != 0).sum())


def count_each(masks: Sequence[Tensor]) -> list[int]:
    """How many entries of each are True, with one wait for a device."""
    if masks[0].device.type == "cpu":
        return [count_nonzero(mask) for mask in masks]
    return [int(count) for count in torch.stack([mask.sum() for mask in masks]).tolist()]


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """A bool mask, True on exactly ``count`` of the lowest scores, the first of those that are equal."""
    flat = scores.detach().reshape(-1)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if flat.is_cuda and len(flat) <= SORTED:
        return _first_in_order(flat, count).view(scores.shape)
    values: Any = flat
    if flat.device.type == "cpu":  # where numpy selects and compares in a fifth of torch's time
        values = (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()
    threshold = float(_kth_lowest(values, count))
    # comparing all is several times faster than writing at the indices of the lowest
    dropped = torch.as_tensor(values <= threshold)
    if count_nonzero(dropped) != count:
        dropped = flat < threshold
        equal = (~(dropped | (flat > threshold))).nonzero().squeeze(1)
        dropped[equal[: count - count_nonzero(dropped)]] = True
    return dropped.view(scores.shape)


def _first_in_order(flat: Tensor, count: int) -> Tensor:
    """The same by a sort, which asks nothing of the device before the next operation can be launched."""
    order = flat.argsort(stable=True)[:count]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order, True)


def _kth_lowest(values: Any, count: int) -> Any:
    """The ``count``-th lowest of a tensor's values, or of an array's.

    Among many values a sample brackets it within four standard deviations, and only the few inside the bracket are
    selected from; if the bracket misses, all are.
    """
    among, rest = values, count
    if len(values) >= 8 * SAMPLE:
        sample = values[:: len(values) // SAMPLE | 1]  # odd, so that it does not meet the same rows again and again
        share, last = count / len(values), len(sample) - 1
        margin = 4 * (share * (1 - share) / len(sample)) ** 0.5 + 1 / last
        ends = (1 + round(min(max(at, 0.0), 1.0) * last) for at in (share - margin, share + margin))
        low, high = (_selected(sample, end) for end in ends)
        inside = values[(values >= low) & (values <= high)]
        below = int((values < low).sum())
        if below < count <= below + len(inside):
            among, rest = inside, count - below
    return _selected(among, rest)


def _selected(values: Any, count: int) -> Any:
    """The ``count``-th lowest by the library's own selection."""
    if isinstance(values, Tensor):
        return values.topk(count, largest=False, sorted=False).values.max()
    ordered = values.copy()
    ordered.partition(count - 1)
    return ordered[count - 1]


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
