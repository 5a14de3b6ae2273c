"""Finding the support by operator splitting (ALPS, 2406.07831), on the same Hessian as everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from obsdiff.obs.pattern import Pattern
from obsdiff.obs.select import keep_best

ITERATIONS = 60
RHO_START = 0.1


class Spectrum:
    """One eigendecomposition of a site's Hessian, columns scaled to unit diagonal; shared by all its layers.

    Attributes:
        scale: diag(H)^½ (n,), so that ``scaled weight = W · scale``.
    """

    def __init__(self, hessian: Tensor, damping: float) -> None:
        diagonal = hessian.diagonal()
        self.scale = (diagonal + damping * diagonal.mean()).sqrt()
        scaled = hessian / self.scale[:, None] / self.scale
        scaled.diagonal().fill_(1.0)
        values, self.vectors = torch.linalg.eigh(scaled)
        self.values = values.clamp_min(0.0)


def admm_support(weight: Tensor, spectrum: Spectrum, pattern: Pattern, iterations: int = ITERATIONS) -> Tensor:
    """Alternate a ridge step with H and a projection onto the pattern, raising ρ as the support settles.

    ``W ← (W₀ H + ρ D − V)(H + ρ I)⁻¹``, ``D ← P(W + V / ρ)``, ``V ← V + ρ (W − D)`` (ALPS alg. 1) on columns scaled
    by diag(H)^½, where P keeps the largest entries of the whole layer (or of each N:M group).

    Args:
        weight: Dense weight, float32 (rows, columns).
        spectrum: Of the layer's Hessian.
        pattern: Unstructured or N:M.
        iterations: At most this many.

    Returns:
        The mask, True = kept; the refit gives the weights.
    """
    q, values = spectrum.vectors, spectrum.values
    dense = weight * spectrum.scale
    target = (dense @ q) * values  # W₀ H in the eigenbasis
    mask = keep_best(dense.abs(), pattern)
    d = dense * mask
    v = torch.zeros_like(dense)
    rho = RHO_START
    kept = max(1, int(mask.sum()))
    for iteration in range(1, iterations + 1):
        w = ((target + (rho * d - v) @ q) / (values + rho)) @ q.T
        proposal = w + v / rho
        updated = keep_best(proposal.abs(), pattern)
        d = proposal * updated
        v += rho * (w - d)
        if iteration % 3 == 0:  # ALPS §3.3: faster while the support still moves much
            moved = int((updated & ~mask).sum()) / kept
            mask = updated
            if moved == 0:
                break
            rho *= 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1
    return updated
