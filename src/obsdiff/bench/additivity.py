"""Whether single-layer errors add up to the error of everything pruned together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import pearsonr, rankdata

from obsdiff.allocation.budget import Costs
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.curves import error_curve
from obsdiff.allocation.joint import joint_errors
from obsdiff.allocation.probe import Probe
from obsdiff.allocation.scan import Sensitivity
from obsdiff.allocation.targets import meet_with_offsets
from obsdiff.allocation.units import Unit, removed
from obsdiff.obs.pattern import Pattern
from obsdiff.pruning.plan import Plan

SPREAD = 0.3  # random plans differ by up to this share from the common one


@dataclass(frozen=True)
class Additivity:
    """Random plans at one budget.

    Attributes:
        predicted: Sum of the single-layer errors of each plan.
        joint: Its measured error, everything pruned together.
    """

    predicted: list[float]
    joint: list[float]

    @property
    def rank_correlation(self) -> tuple[float, tuple[float, float]]:
        """Spearman's, with its 95 % interval by Fisher's transformation: 1 if both order the plans alike."""
        found = pearsonr(rankdata(self.predicted), rankdata(self.joint))
        low, high = found.confidence_interval(0.95)
        return float(found.statistic), (float(low), float(high))


def check_additivity(
    solver: Solver,
    base: Plan,
    units: Sequence[Unit],
    costs: Costs,
    sensitivity: Sensitivity,
    probe: Probe,
    plans: int = 24,
    seed: int = 0,
) -> Additivity:
    """Predict and measure the error of random plans that all meet the same budget."""
    generator = torch.Generator().manual_seed(seed)
    predicted, drawn = [], []
    for _ in range(plans):
        offsets = (SPREAD * (2 * torch.rand(len(units), generator=generator) - 1)).tolist()
        patterns = meet_with_offsets(units, offsets, costs, costs.limit)
        predicted.append(sum(map(_predicted, units, patterns, [sensitivity] * len(units))))
        entries = {name: p for unit, p in zip(units, patterns, strict=True) for name in unit.members}
        drawn.append(Plan(base.pattern, {name: entries[name] for name in base.entries}))
    return Additivity(predicted, joint_errors(solver, drawn, probe))


def _predicted(unit: Unit, pattern: Pattern, sensitivity: Sensitivity) -> float:
    return error_curve(sensitivity.solved[unit.name], sensitivity.errors(unit.name), [removed(pattern)])[0]
