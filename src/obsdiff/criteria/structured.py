"""Which heads or neurons to keep, by the method's own rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.obs.structured import Consumer, drop_indices, select_groups


def choose_groups(
    rule: str,
    consumers: Sequence[Consumer],
    producers: Sequence[Tensor],
    count: int,
    size: int,
    remove: int,
    fusion: str,
    damping: float,
    seed: int,
) -> Tensor:
    """Bool (count,), True = kept.

    Args:
        rule: "obs" (exact OBS group error, OBS-Diff §4.3-4.4), "magnitude" (L1 norm of all weights that would go,
            after Li et al. 1608.08710) or "random".
        consumers: Layers whose input columns would go; with Hessians for "obs".
        producers: Weights (slabs · count · size, columns) whose output rows would go.
        count: Groups.
        size: Channels per group.
        remove: How many groups go.
        fusion: How "obs" ranks over several consumers, see :func:`obsdiff.obs.structured.fuse`.
        damping: Relative dampening of the Hessians.
        seed: For "random".
    """
    if rule == "obs":
        return select_groups(consumers, size, remove, fusion, damping=damping)
    if rule == "magnitude":
        scores = torch.stack([c.weight.float().abs().sum(0).view(count, size).sum(1) for c in consumers]).sum(0)
        for weight in producers:
            scores = scores + weight.float().abs().sum(1).view(-1, count, size).sum((0, 2))
    elif rule == "random":
        scores = torch.rand(count, generator=torch.Generator().manual_seed(seed)).to(consumers[0].weight.device)
    else:
        raise ValueError(f"unknown rule {rule!r}; there are obs, magnitude and random")
    kept = torch.ones(count, dtype=torch.bool, device=scores.device)
    kept[drop_indices(scores, remove)] = False
    return kept
