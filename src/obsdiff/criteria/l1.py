"""L1 norms (Li et al. 1608.08710, section 3.1): units whose filters are small go.

``s_u = Σ |W|`` over the rows that make unit u's channels (a head's queries, keys and values; a neuron's or a
channel's filters). What reads them is not counted; ``magnitude`` counts it too, as torch-pruning's group norm does
(DepGraph, 2301.12900). Of single weights the L1 norm is the magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obsdiff.criteria import magnitude
from obsdiff.criteria.base import GroupProblem
from obsdiff.obs.structured import keep_highest

solve = magnitude.solve


def choose(problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept."""
    scores = torch.stack([weight.float().abs().sum(3).sum((0, 2)) for weight in problem.producers]).sum(0)
    return keep_highest(scores, problem.remove)
