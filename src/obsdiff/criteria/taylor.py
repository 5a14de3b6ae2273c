"""First-order Taylor expansion (Molchanov et al. 1611.06440, 1906.10771): what a removal changes in the loss.

Single weights go by ``|w ∂L/∂w|``, compared within each layer; a unit by ``|Σ w ∂L/∂w|`` over all weights that go
with it, the first-order change of the loss when all of them become zero at once (the "Taylor" baseline of
Diff-Pruning, whose code asks torch-pruning for ``multivariable=True``). The gradients are of the loss over all times
(:mod:`obsdiff.pruning.gradients`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obsdiff.criteria.base import GroupProblem, Problem, Solution
from obsdiff.obs.select import keep_best
from obsdiff.obs.structured import keep_highest


def solve(problem: Problem) -> list[Solution]:
    solutions = []
    for weight, gradient, pattern in zip(problem.weights, problem.slopes, problem.patterns, strict=True):
        mask = keep_best((weight * gradient).abs(), pattern)
        solutions.append(Solution(weight * mask, mask))
    return solutions


def choose(problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept."""
    changes = torch.stack([products.sum(1) for products in changes_by_unit(problem)]).sum(0)
    return keep_highest(changes.abs(), problem.remove)


def changes_by_unit(problem: GroupProblem) -> Iterator[Tensor]:
    """``w ∂L/∂w`` of every weight that goes with a unit, float32 (count, weights): layer by layer."""
    count, size = problem.count, problem.size
    for consumer in problem.consumers:
        products = (consumer.weight.float() * consumer.slope)[:, : count * size]
        yield products.unflatten(1, (count, size)).transpose(0, 1).flatten(1)
    for weight, gradient in zip(problem.producers, problem.slopes, strict=True):
        yield (weight.float() * gradient).transpose(0, 1).flatten(1)
