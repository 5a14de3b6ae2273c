"""Choosing one option per unit at the least summed error under one budget: the multiple-choice knapsack problem.

Lagrangian bisection gives a good choice and a bound; a search over Pareto-optimal partial choices, cut by that bound,
gives the best one (Dyer, Riha & Walker 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STATES = 20_000  # partial choices kept; beyond it the search thins them out and is no longer exact
BISECTIONS = 100


class Infeasible(ValueError):
    """Even the cheapest options exceed the limit.

    Attributes:
        least: What they cost.
    """

    def __init__(self, least: float, limit: float) -> None:
        super().__init__(f"the cheapest options cost {least:g}, the limit is {limit:g}")
        self.least = least


@dataclass(frozen=True)
class Choice:
    """One option per unit.

    Attributes:
        picked: Index of the option of each unit.
        error: Sum of their errors.
        cost: Sum of their costs, at most the limit.
        bound: No choice within the limit has a smaller error.
    """

    picked: tuple[int, ...]
    error: float
    cost: float
    bound: float


def choose(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    limit: float,
    max_states: int = MAX_STATES,
) -> Choice:
    """``min Σ error  s.t.  Σ cost ≤ limit``, one option per unit.

    Args:
        errors: Per unit, the error of each of its options.
        costs: The same shape: what each option costs.
        limit: The budget, in the unit of ``costs``.
        max_states: Partial choices kept; the result is optimal unless more would be needed, and ``bound`` tells.

    Raises:
        Infeasible: The cheapest options exceed the limit.
    """
    e = [torch.tensor(list(values), dtype=torch.float64) for values in errors]
    c = [torch.tensor(list(values), dtype=torch.float64) for values in costs]
    least = sum(float(values.min()) for values in c)
    if least > limit:
        raise Infeasible(least, limit)
    best, price, bound = _lagrangian(e, c, limit)
    best = _fill(e, c, limit, best)
    found = _search(e, c, limit, price, _total(e, best), max_states)
    if found is not None:
        best = found
    error = _total(e, best)
    return Choice(tuple(best), error, _total(c, best), min(bound, error))


def _total(values: Sequence[Tensor], picked: Sequence[int]) -> float:
    return sum(float(v[i]) for v, i in zip(values, picked, strict=True))


def _priced(e: Sequence[Tensor], c: Sequence[Tensor], price: float) -> list[int]:
    """Each unit's best option at a price per cost; the cheaper one if equal."""
    picked = []
    for errors, costs in zip(e, c, strict=True):
        value = errors + price * costs
        equal = (value <= value.min()).nonzero().squeeze(1)
        picked.append(int(equal[costs[equal].argmin()]))
    return picked


def _lagrangian(e: Sequence[Tensor], c: Sequence[Tensor], limit: float) -> tuple[list[int], float, float]:
    """A feasible choice, its price, and the best bound ``Σ min(error + price · cost) − price · limit``."""

    def bound(price: float, picked: Sequence[int]) -> float:
        return _total(e, picked) + price * (_total(c, picked) - limit)

    picked = _priced(e, c, 0.0)
    best_bound = _total(e, picked)
    if _total(c, picked) <= limit:
        return picked, 0.0, best_bound
    low, high = 0.0, 1.0
    while _total(c, picked := _priced(e, c, high)) > limit:
        low, high = high, high * 4
        if high > 1e300:  # the limit is what the cheapest options cost
            cheapest = [int(costs.argmin()) for costs in c]
            return cheapest, 0.0, best_bound
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = _priced(e, c, middle)
        best_bound = max(best_bound, bound(middle, tried))
        if _total(c, tried) > limit:
            low = middle
        else:
            high, picked = middle, tried
    return picked, high, max(best_bound, bound(high, picked))


def _fill(e: Sequence[Tensor], c: Sequence[Tensor], limit: float, picked: list[int]) -> list[int]:
    """Spend what the limit leaves over: one better option after the other, the largest gain first."""
    picked = list(picked)
    cost = _total(c, picked)
    while True:
        best: tuple[float, int, int] | None = None
        for unit, (errors, costs) in enumerate(zip(e, c, strict=True)):
            now = picked[unit]
            gains = torch.where(cost - costs[now] + costs <= limit, errors[now] - errors, 0.0)
            option = int(gains.argmax())
            if float(gains[option]) > 0 and (best is None or float(gains[option]) > best[0]):
                best = (float(gains[option]), unit, option)
        if best is None:
            return picked
        _, unit, option = best
        picked[unit] = option
        cost = _total(c, picked)  # summed afresh, so that rounding never adds up past the limit


def _search(
    e: Sequence[Tensor], c: Sequence[Tensor], limit: float, price: float, incumbent: float, max_states: int
) -> list[int] | None:
    """The best choice that beats ``incumbent``, or None.

    States are partial choices over the first units; one survives unless another is no dearer and no worse, or unless
    even the priced relaxation of the other units cannot bring it below the incumbent.
    """
    relaxed = [float((errors + price * costs).min()) for errors, costs in zip(e, c, strict=True)]
    cheapest = [float(costs.min()) for costs in c]
    error = torch.zeros(1, dtype=torch.float64)
    cost = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for unit, (errors, costs) in enumerate(zip(e, c, strict=True)):
        new_error = (error[:, None] + errors).flatten()
        new_cost = (cost[:, None] + costs).flatten()
        rest, rest_cost = sum(relaxed[unit + 1 :]), sum(cheapest[unit + 1 :])
        alive = (new_cost + rest_cost <= limit) & (new_error + price * (new_cost - limit) + rest < incumbent)
        index = alive.nonzero().squeeze(1)
        if len(index) == 0:
            return None
        index = index[new_error[index].argsort(stable=True)]
        index = index[new_cost[index].argsort(stable=True)]  # by cost, then by error
        values = new_error[index]
        lowest = torch.cat([values.new_tensor([float("inf")]), values.cummin(0).values[:-1]])
        index = index[values < lowest]
        if len(index) > max_states:
            index = index[torch.linspace(0, len(index) - 1, max_states).round().long().unique()]
        trail.append((index // len(errors), index % len(errors)))
        error, cost = new_error[index], new_cost[index]
    state = int(error.argmin())
    picked = []
    for parents, options in reversed(trail):
        picked.append(int(options[state]))
        state = int(parents[state])
    picked.reverse()
    within = _total(c, picked) <= limit  # summed in the caller's order
    return picked if within and _total(e, picked) < incumbent else None
