"""Which units of a group to keep (heads, neurons, ResNet channels): one function per rule, all with one signature;
``RULES`` is the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obsdiff.criteria import diff_pruning, ecodiff, l1, obs_diff, taylor
from obsdiff.criteria.base import GroupProblem
from obsdiff.obs.structured import keep_highest, select_groups

Rule = Callable[[GroupProblem], Tensor]
"""From the units of one group to bool (count,), True = kept."""


def exact_error(problem: GroupProblem) -> Tensor:
    """Least exact OBS error of deleting a group, one after another: ours, where OBS-Diff approximates (its eq. 7)."""
    return select_groups(problem.consumers, problem.size, problem.remove, problem.fusion, damping=problem.damping)


def magnitude(problem: GroupProblem) -> Tensor:
    """Least L1 norm of all weights that would go (after Li et al. 1608.08710)."""
    count, size = problem.count, problem.size
    sums = [consumer.weight.float().abs().sum(0)[: count * size] for consumer in problem.consumers]
    scores = torch.stack([s.view(count, size).sum(1) for s in sums]).sum(0)
    for weight in problem.producers:
        scores = scores + weight.float().abs().sum(3).sum((0, 2))
    return keep_highest(scores, problem.remove)


def random(problem: GroupProblem) -> Tensor:
    """Drawn from the module's own seed, the same on every device."""
    scores = torch.rand(problem.count, generator=torch.Generator().manual_seed(problem.seed))
    return keep_highest(scores.to(problem.consumers[0].weight.device), problem.remove)


RULES: dict[str, Rule] = {
    "obs": exact_error,
    "obs-diff": obs_diff.choose,
    "taylor": taylor.choose,
    "diff-pruning": diff_pruning.choose,
    "ecodiff": ecodiff.choose,
    "magnitude": magnitude,
    "l1": l1.choose,
    "random": random,
}


def choose_groups(rule: str, problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept, by the rule of that name.

    Raises:
        ValueError: There is none.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    return RULES[rule](problem)
