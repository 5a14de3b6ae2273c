"""OWL (2310.05175): blocks with more outliers keep more; a rule from the diagonal of the Hessians, without any run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.allocation.units import Unit
from obsdiff.models.graph import Graph
from obsdiff.obs.hessian import weight_matrices
from obsdiff.pruning.statistics import Statistics

OUTLIER = 5.0  # M: a score above M times the mean is an outlier
RANGE = 0.08  # λ: ratios stay within ± λ of the mean


def outlier_ratio(scores: Tensor, outlier: float = OUTLIER) -> float:
    """Share of scores above ``outlier`` times their mean (OWL eq. 1)."""
    return float((scores > outlier * scores.mean()).double().mean())


def owl_offsets(graph: Graph, units: Sequence[Unit], statistics: Statistics, spread: float = RANGE) -> list[float]:
    """How much more than the average each unit removes: in [-2 λ, 2 λ], the more outliers its block has the less.

    Scores are ``|W_ij| · ‖x_j‖``; as published the outliers are counted over a whole block, so its units share one
    value, scaled linearly so that the largest and the smallest are 2 λ apart.
    """
    scores: dict[int, list[Tensor]] = {}
    for unit in units:
        for name in unit.members:
            group = graph.group_of.get(name)
            for layer in (name,) if group is None else [s.layer for s in group.consumers]:
                scores.setdefault(unit.stage, []).append(_scores(graph, layer, statistics))
    ratios = {block: outlier_ratio(torch.cat(found)) for block, found in scores.items()}
    low, high = min(ratios.values()), max(ratios.values())
    scale = 2 * spread / (high - low) if high > low else 0.0
    mean = sum(ratios[unit.stage] for unit in units) / len(units)
    return [-scale * (ratios[unit.stage] - mean) for unit in units]


def _scores(graph: Graph, layer: str, statistics: Statistics) -> Tensor:
    """Wanda's scores of one layer, flat."""
    site = statistics.site(graph.site_of[layer].name, graph.weight(layer).device)
    weights = weight_matrices(graph.layer(layer)).detach().float()
    norms = site.power().sqrt()
    return (weights.abs() * norms[:, None, :]).flatten()
