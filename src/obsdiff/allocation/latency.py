"""Budgets in measured latency: a table of module times, then the whole denoiser on the clock."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from obsdiff.allocation.budget import Budget, Costs, _costs, shapes_with
from obsdiff.allocation.curves import interpolate
from obsdiff.allocation.units import Unit
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import example_inputs
from obsdiff.models.conditioning import segment_lengths
from obsdiff.models.obsdiff_shrunk import apply_shapes
from obsdiff.models.wiring import WiredGroups, Wiring
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import kept_groups
from obsdiff.ranks import from_rank, rank

POINTS = 5  # widths at which each kind of module is timed
TRIES = 12  # choices to measure on the clock until one meets the budget
TOLERANCE = 0.99  # of a budget must be spent
LEAST_ROUNDS, MOST_ROUNDS, MOST_S = 24, 500, 60.0  # of the clock, for one choice; to confirm one, twice the most
WARM_S, TIMED_S = 0.01, 0.02  # of each call's turn in a round: not counted, and counted
Calls = Sequence[Callable[[], Any]]
Clock = Callable[[Calls], list[float]]


@torch.no_grad()
def time_calls(calls: Calls) -> list[float]:
    """Median seconds of each call in one round of short turns, so that a slow spell of the machine hits all alike.

    A turn repeats one call, as sampling does, and does not count its first ``WARM_S``: right after another model a call
    finds its weights out of the caches, which hides a part of what was saved (docs/results.md).
    """

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn(call: Callable[[], Any]) -> float:
        started, times = now(), list[float]()
        call()
        while (ended := now()) - started < WARM_S:
            call()
        while sum(times) < TIMED_S:
            call()
            begun, ended = ended, now()
            times.append(ended - begun)
        return statistics.median(times)

    return [turn(call) for call in calls]


def shared_clock(clock: Clock) -> Clock:
    """One clock for all processes: the first one's, so that all choose alike."""
    return lambda calls: from_rank(clock(calls) if rank() == 0 else [])


def inputs_of(pipe: Any, wiring: Wiring, call: Mapping[str, Any]) -> dict[str, Any]:
    """Random arguments of one denoiser call as sampling one image makes it: two rows with guidance."""
    length = sum(segment_lengths(pipe, wiring.family, call))
    rows = 2 if float(call.get("guidance_scale") or 1.0) > 1 else 1
    parameter = next(wiring.denoiser.parameters())
    return dict(example_inputs(wiring.denoiser, length, rows, str(parameter.device), parameter.dtype))


@torch.no_grad()
def latency_costs(
    pipe: Any,
    wiring: Wiring,
    units: Sequence[Unit],
    budget: Budget,
    call: Mapping[str, Any],
    clock: Clock = time_calls,
) -> Costs:
    """Seconds of each option, from timing every kind of module at a few widths; equal modules are timed once.

    Raises:
        UserError: The pattern does not change latency.
    """
    if not isinstance(units[0].options[0], Structured):
        raise UserError("a budget in latency needs a structured pattern: dense kernels do not skip zeros")
    arguments = inputs_of(pipe, wiring, call)
    modules = {groups.name: groups for groups in wiring.groups}
    planned = [name for unit in units for name in unit.members]
    inputs = _module_inputs(wiring, planned, arguments)
    tables: dict[Any, list[tuple[float, float]]] = {}
    table_of = {}
    for name in planned:
        key = _signature(wiring, modules[name], inputs[name])
        if key not in tables:
            tables[key] = _table(wiring, modules[name], inputs[name], clock)
        table_of[name] = tables[key]
    dense = _seconds([partial(wiring.denoiser, **arguments)], clock)[0]
    whole = sum(interpolate(table_of[name], modules[name].count) for name in planned)

    def cost(unit: Unit, pattern: Any) -> float:
        return sum(interpolate(table_of[n], kept_groups(modules[n], pattern)) for n in unit.members)

    # modules timed alone may add up to more than the whole; what they save is what counts
    return _costs(units, cost, dense - whole, dense, budget.share)


def _signature(wiring: Wiring, groups: WiredGroups, inputs: Any) -> Any:
    """What a module's time depends on."""
    shapes = tuple(tuple(wiring.weight(name).shape) for name in (*groups.producers, *groups.consumers))
    args, kwargs = inputs
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return groups.kind, shapes, tuple(tuple(tensor.shape) for tensor in tensors)


def _module_inputs(wiring: Wiring, names: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each module gets in one call of the denoiser."""
    seen: dict[str, Any] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args, kwargs)

    handles = [wiring.layer(name).register_forward_pre_hook(partial(record, name), with_kwargs=True) for name in names]
    try:
        wiring.denoiser(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _table(wiring: Wiring, groups: WiredGroups, inputs: Any, clock: Clock) -> list[tuple[float, float]]:
    """Seconds by heads or neurons kept."""
    widths = sorted({max(1, round(groups.count * i / (POINTS - 1))) for i in range(POINTS)})
    args, kwargs = inputs
    calls = []
    for kept in widths:
        shapes = shapes_with(wiring, {groups.name: kept})
        prefix = groups.name + "."
        layers = {name.removeprefix(prefix): shape for name, shape in shapes["layers"].items()}
        attributes = {"": shapes["attributes"].get(groups.name, {})}
        module = _smaller(wiring.layer(groups.name), {"layers": layers, "attributes": attributes})
        calls.append(partial(module, *args, **kwargs))
    # a noisy clock may call a wider module faster: what is kept never costs less
    return list(zip(map(float, widths), accumulate(_seconds(calls, clock), max), strict=True))


def _seconds(calls: Calls, clock: Clock) -> list[float]:
    """Medians over rounds."""
    rounds = [clock(calls) for _ in range(LEAST_ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class Share:
    """A measured share of the dense latency.

    Attributes:
        value: Median over rounds.
        low, high: Its 95 % interval.
    """

    value: float
    low: float
    high: float

    def decides(self, budget: float) -> bool:
        """Whether the interval lies on one side of what a budget accepts, or all inside."""
        return self.high < TOLERANCE * budget or self.low > budget or self.fits(budget)

    def fits(self, budget: float) -> bool:
        """Whether the whole interval is within 1 % of the budget and never above."""
        return self.low >= TOLERANCE * budget and self.high <= budget


def share_of(ratios: Sequence[float]) -> Share:
    """Median and 95 % interval of at least :data:`LEAST_ROUNDS` ratios, by order statistics: no outlier counts."""
    ordered, n = sorted(ratios), len(ratios)
    # the median is below the value at rank `at` only if at most `at` of n fair coins show heads
    tails = accumulate(math.comb(n, heads) for heads in range(n // 2))
    at = max(sum(1 for tail in tails if 40 * tail <= 2**n) - 1, 0)
    return Share(statistics.median(ordered), ordered[at], ordered[n - 1 - at])


@torch.no_grad()
def _smaller(module: nn.Module, shapes: Mapping[str, Any]) -> nn.Module:
    """A copy with smaller layers, as near to a pruned model which was loaded as can be had before pruning.

    Its layers hold the corner of their dense weights, not random ones, and lie in memory in one piece, not in the gaps
    that the larger layers left. How much either matters is not settled (docs/results.md).
    """
    smaller: Any = copy.deepcopy(module)
    apply_shapes(smaller, shapes)
    for name, (rows, columns) in shapes["layers"].items():
        dense: Any = module.get_submodule(name)
        layer = smaller.get_submodule(name)
        layer.weight.copy_(dense.weight[:rows, :columns])
        if dense.bias is not None:
            layer.bias.copy_(dense.bias[:rows])
    return copy.deepcopy(smaller)


def meet_on_the_clock(
    pipe: Any,
    wiring: Wiring,
    budget: Budget,
    call: Mapping[str, Any],
    solve: Callable[[float], dict[str, int]],
    limit: float,
    clock: Clock = time_calls,
) -> tuple[dict[str, int], Share]:
    """Tighten or loosen the table's limit until the whole denoiser meets the budget, within 1 % and never above.

    A choice is accepted if its interval fits, and fits again in a longer measurement made afterwards: the first alone
    would favour choices that the clock's noise flatters. Where the clock is too noisy for that, it is the slowest
    choice whose interval stays below the budget.

    Args:
        pipe, wiring, budget, call: As for :func:`latency_costs`.
        solve: Heads and neurons kept by module, for a limit of the table.
        limit: The table's own.
        clock: Times calls.

    Returns:
        The widths found, and their measured share of the dense latency.

    Raises:
        UserError: No try came out below the budget.
    """
    arguments = inputs_of(pipe, wiring, call)
    dense = partial(wiring.denoiser, **arguments)
    seen: dict[tuple[tuple[str, int], ...], list[float]] = {}
    dense_s: list[float] = []

    def measured(kept: dict[str, int], confirming: bool = False) -> Share:
        calls = [dense, partial(_smaller(wiring.denoiser, shapes_with(wiring, kept)), **arguments)]
        known = seen.setdefault(tuple(kept.items()), [])
        ratios: list[float] = [] if confirming else known
        most, started = 1 + confirming, time.perf_counter()
        for done in range(1, most * MOST_ROUNDS + 1):
            seconds = clock(calls)
            dense_s.append(seconds[0])
            ratios.append(seconds[1] / seconds[0])
            if done >= LEAST_ROUNDS and (
                from_rank(time.perf_counter() - started) > most * MOST_S
                or (not confirming and share_of(ratios).decides(budget.share))
            ):
                break
        if confirming:
            known += ratios
        return share_of(ratios)

    low, high = 0.0, math.inf  # limits known to be met, and to be missed
    below: list[tuple[float, dict[str, int], Share]] = []
    for _ in range(TRIES):
        kept = solve(limit)
        share = measured(kept)
        if share.fits(budget.share):
            share = measured(kept, confirming=True)
            if share.fits(budget.share):
                return kept, share
        if share.high <= budget.share:
            below.append((share.value, kept, share))
        if share.high < TOLERANCE * budget.share:
            low = max(low, limit)
        elif share.low > budget.share:
            high = min(high, limit)
        whole_s = statistics.median(dense_s)
        guess = limit + ((1 + TOLERANCE) / 2 * budget.share - share.value) * whole_s
        limit = guess if low < guess < high else (low + min(high, 2 * low + whole_s)) / 2
    if not below:
        raise UserError(f"no choice of widths came below {budget} on the clock; loosen the budget or the floors")
    _, kept, share = max(below, key=lambda found: found[0])
    return kept, share
