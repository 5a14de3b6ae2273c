"""Meeting a budget with given differences between units: uniform allocation and outlier rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from obsdiff.allocation.budget import Costs
from obsdiff.allocation.knapsack import choose
from obsdiff.allocation.units import Unit, removed
from obsdiff.obs.pattern import Pattern, Unstructured

BISECTIONS = 60


def meet_with_offsets(units: Sequence[Unit], offsets: Sequence[float], costs: Costs, limit: float) -> list[Pattern]:
    """Each unit removes a common share plus its offset, within its options, so that the budget is met.

    Ratios are continuous. Heads, widths and N:M come in steps: there the options nearest to the targets are chosen, by
    the summed squared distances weighted with what the units cost dense.

    The sparsest options must be within the ``limit``.
    """
    if all(isinstance(option, Unstructured) for unit in units for option in unit.options):
        return _ratios(units, offsets, costs, limit)

    def distances(common: float) -> list[list[float]]:
        return [
            [max(of_unit) * (removed(option) - common - offset) ** 2 for option in unit.options]
            for unit, offset, of_unit in zip(units, offsets, costs.options, strict=True)
        ]

    def nearest(common: float) -> float:
        return sum(
            of_unit[min(range(len(d)), key=d.__getitem__)]
            for d, of_unit in zip(distances(common), costs.options, strict=True)
        )

    # the largest common share that is too dear: from there the allocator moves as little as the limit asks
    common = _bisect(lambda value: nearest(value) <= limit)
    picked = list(choose(distances(common), costs.options, limit).picked)
    _spend(picked, distances(common), costs, limit)
    return [unit.options[i] for unit, i in zip(units, picked, strict=True)]


def _spend(picked: list[int], distances: Sequence[Sequence[float]], costs: Costs, limit: float) -> None:
    """Step by step to denser options while the limit allows, each time the one that strays least from its target.

    Nearest options often leave a head's worth of the budget over; comparisons are at equal cost, so it is spent.
    """

    def cost() -> float:
        return sum(of_unit[i] for of_unit, i in zip(costs.options, picked, strict=True))

    while True:
        spare = limit - cost()
        steps = [
            (distances[unit][i - 1] - distances[unit][i], unit)
            for unit, i in enumerate(picked)
            if i > 0 and 0 < costs.options[unit][i - 1] - costs.options[unit][i] <= spare
        ]
        if not steps:
            return
        picked[min(steps)[1]] -= 1


def _ratios(units: Sequence[Unit], offsets: Sequence[float], costs: Costs, limit: float) -> list[Pattern]:
    def ratios(common: float) -> list[float]:
        return [
            min(max(common + offset, removed(unit.options[0])), removed(unit.options[-1]))
            for unit, offset in zip(units, offsets, strict=True)
        ]

    dense = [max(of_unit) / (1 - removed(unit.options[0])) for unit, of_unit in zip(units, costs.options, strict=True)]

    def kept(common: float) -> float:
        return sum(size * (1 - ratio) for size, ratio in zip(dense, ratios(common), strict=True))

    low = _bisect(lambda value: kept(value) <= limit)
    return [Unstructured(round(ratio, 10)) for ratio in ratios(low + 1e-12)]


def _bisect(met: Callable[[float], bool]) -> float:
    """The largest value in [-1, 2] at which a condition does not hold yet, if it holds from some value on."""
    low, high = -1.0, 2.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if met(middle):
            high = middle
        else:
            low = middle
    return low
