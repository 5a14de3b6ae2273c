"""Which units of a group to keep (heads, neurons, ResNet channel groups), by the method's own rule; ``RULES`` is the
table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.obs.structured import Consumer, drop_indices, select_groups


@dataclass(frozen=True)
class Choice:
    """What a rule chooses from.

    Attributes:
        consumers: Layers whose input columns would go; with Hessians for "obs".
        producers: Weights whose output rows would go, unit by unit: (slabs, count, rows, columns).
        count: Units.
        size: Channels per unit in the consumers.
        remove: How many units go.
        fusion: How "obs" ranks over several consumers, see :func:`obsdiff.obs.structured.fuse`.
        damping: Relative dampening of the Hessians.
        seed: For "random".
    """

    consumers: Sequence[Consumer]
    producers: Sequence[Tensor]
    count: int
    size: int
    remove: int
    fusion: str
    damping: float
    seed: int

    def without_lowest(self, scores: Tensor) -> Tensor:
        """Bool (count,): all but those of the lowest scores."""
        kept = torch.ones(self.count, dtype=torch.bool, device=scores.device)
        kept[drop_indices(scores, self.remove)] = False
        return kept


def obs(choice: Choice) -> Tensor:
    """The exact OBS error of each unit (OBS-Diff §4.3-4.4), greedily."""
    return select_groups(choice.consumers, choice.size, choice.remove, choice.fusion, damping=choice.damping)


def magnitude(choice: Choice) -> Tensor:
    """The L1 norm of all weights that would go (after Li et al. 1608.08710)."""
    sums = [c.units_first(c.weight.float().abs()).sum(0)[: c.channels] for c in choice.consumers]
    scores = torch.stack([s.view(choice.count, choice.size).sum(1) for s in sums]).sum(0)
    for weight in choice.producers:
        scores = scores + weight.float().abs().sum(3).sum((0, 2))
    return choice.without_lowest(scores)


def random(choice: Choice) -> Tensor:
    """Scores drawn from the group's own seed, the same on every device."""
    scores = torch.rand(choice.count, generator=torch.Generator().manual_seed(choice.seed))
    return choice.without_lowest(scores.to(choice.consumers[0].weight.device))


RULES: dict[str, Callable[[Choice], Tensor]] = {"obs": obs, "magnitude": magnitude, "random": random}


def choose_units(rule: str, choice: Choice) -> Tensor:
    """Bool (count,), True = kept.

    Raises:
        ValueError: There is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
    return RULES[rule](choice)
