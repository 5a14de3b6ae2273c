"""Diff-Pruning (Fang et al., NeurIPS 2023, 2305.10924 section 4): Taylor expansion over pruned timesteps.

A unit i goes by ``Σ_k |θ_ik · Σ_{t: L_t / L_max > T} ∂L_t/∂θ_ik|``: gradients of the diffusion loss are added up over
the times whose loss is above a share T of the largest, and every weight counts by itself. T is 0.05, as published for
CIFAR-10 and CelebA (:data:`obsdiff.obs.observers.GRADIENTS`). A single weight is a unit of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obsdiff.criteria import taylor
from obsdiff.criteria.base import GroupProblem
from obsdiff.obs.structured import keep_highest

solve = taylor.solve  # of single weights; what differs is the gradient


def choose(problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept."""
    scores = torch.stack([products.abs().sum(1) for products in taylor.changes_by_unit(problem)]).sum(0)
    return keep_highest(scores, problem.remove)
