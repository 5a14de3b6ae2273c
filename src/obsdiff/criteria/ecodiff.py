"""EcoDiff (2412.02852): gates on heads and neurons, learned by distillation; the units of the lowest gates go.

A unit's output is multiplied by a hard-concrete gate (Louizos et al. 1712.01312, eq. 10 and 11): for u uniform on
(0, 1), ``s = σ((log u − log(1 − u) + λ) / β)`` and ``z = min(1, max(0, s (ζ − γ) + γ))`` with β = 0.83, γ = -0.1 and
ζ = 1.1 (YaNgZhAnG-V5/EcoDiff 00aa5f1). The λ of all units minimise a distillation loss plus a share of the number of
gates that are open, whose expectation is ``Σ σ(λ − β log(−γ/ζ))`` (1712.01312 eq. 12). How they are learned stands in
:mod:`obsdiff.pruning.gates`; here is what a gate is, and the choice: the lowest λ of each module go, as many as its
pattern says. Single weights have no gates.
"""

from __future__ import annotations

import math

from torch import Tensor

from obsdiff.criteria.base import GroupProblem
from obsdiff.obs.structured import keep_highest

BETA, GAMMA, ZETA = 0.83, -0.1, 1.1


def hard_concrete(openness: Tensor, uniform: Tensor) -> Tensor:
    """Gates in [0, 1], 0 and 1 themselves among them, of the shape of λ.

    Args:
        openness: λ, float32.
        uniform: Drawn from (0, 1), the same shape.
    """
    concrete = ((uniform.logit() + openness) / BETA).sigmoid()
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(openness: Tensor) -> Tensor:
    """How likely a gate is above 0, of the shape of λ."""
    return (openness - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def choose(problem: GroupProblem) -> Tensor:
    """Bool (count,), True = kept."""
    return keep_highest(problem.openness, problem.remove)
