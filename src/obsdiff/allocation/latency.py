"""Budgets in measured latency: a table of module times, then the whole denoiser on the clock."""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import nn

from obsdiff.allocation.budget import Costs, tabulated
from obsdiff.allocation.clock import Calls, Clock, Trial, new_process, time_calls, write_trial
from obsdiff.allocation.curves import interpolate
from obsdiff.allocation.request import Budget
from obsdiff.allocation.times import Times
from obsdiff.allocation.units import Unit
from obsdiff.errors import UserError
from obsdiff.models.calls import remembered_call
from obsdiff.models.graph import Graph, Group, shapes_with
from obsdiff.models.modes import eval_mode
from obsdiff.models.obsdiff_shrunk import apply_shapes
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import kept_units
from obsdiff.pruning.surgery import Edits, become_shrunk
from obsdiff.ranks import from_rank, rank, solved_in_turn

POINTS = 5  # widths at which each kind of module is timed
ROUNDS = 24  # of the clock, for one table
TOLERANCE = 0.99  # of a budget must be spent
NEAR = 0.005  # of the dense time: choices that differ by so much tell of each other
CHOICES = 24  # of widths to try until one meets the budget
LEAST_PROCESSES, MOST_PROCESSES = 5, 24  # that measure a choice, and that confirm it
MOST_TRIALS = 100  # processes in all


def shared_clock(clock: Clock) -> Clock:
    """One clock for all processes: the first one's, so that all choose alike."""
    return lambda calls: from_rank(clock(calls) if rank() == 0 else [])


def inputs_of(pipe: Any, graph: Graph, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one denoiser call as sampling one image makes it: two rows with guidance."""
    return next(iter(remembered_call(pipe, call).values()))


@torch.no_grad()
def latency_costs(
    pipe: Any,
    graph: Graph,
    units: Sequence[Unit],
    budget: Budget,
    call: Mapping[str, Any],
    times: Times,
    clock: Clock = time_calls,
) -> Costs:
    """Seconds of each option, from timing every kind of module at a few widths; equal modules are timed once.

    What ``times`` holds of them is not timed again.

    Raises:
        UserError: The pattern does not change latency.
    """
    if not isinstance(units[0].options[0], Structured):
        raise UserError("a budget in latency needs a structured pattern: dense kernels do not skip zeros")
    with eval_mode(graph.denoiser):
        arguments = inputs_of(pipe, graph, call)
        modules = {groups.name: groups for groups in graph.groups}
        planned = [name for unit in units for name in unit.members]
        inputs = _module_inputs(graph, planned, arguments)
        tables: dict[Any, list[tuple[float, float]]] = {}
        table_of = {}
        for name in planned:
            key = _signature(graph, modules[name], inputs[name])
            if key not in tables:
                timed = partial(_table, graph, modules[name], inputs[name], clock)
                tables[key] = list(zip(_widths(modules[name]), times.measure(str(key), timed), strict=True))
            table_of[name] = tables[key]
        [dense] = times.measure("dense", partial(_seconds, [partial(graph.denoiser, **arguments)], clock))
    whole = sum(interpolate(table_of[name], modules[name].count) for name in planned)

    def cost(unit: Unit, pattern: Any) -> float:
        return sum(interpolate(table_of[n], kept_units(modules[n], pattern)) for n in unit.members)

    # modules timed alone may add up to more than the whole; what they save is what counts
    return tabulated(units, cost, dense - whole, dense, budget.share)


def _signature(graph: Graph, groups: Group, inputs: Any) -> Any:
    """What a module's time depends on."""
    shapes = tuple(tuple(graph.weight(name).shape) for name in groups.layers)
    args, kwargs = inputs
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return groups.kind, shapes, tuple(tuple(tensor.shape) for tensor in tensors)


def _module_inputs(graph: Graph, names: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each module gets in one call of the denoiser."""
    seen: dict[str, Any] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = (args, kwargs)

    handles = [graph.layer(name).register_forward_pre_hook(partial(record, name), with_kwargs=True) for name in names]
    try:
        graph.denoiser(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _widths(groups: Group) -> list[int]:
    """Heads or neurons kept, for a table."""
    return sorted({max(1, round(groups.count * i / (POINTS - 1))) for i in range(POINTS)})


def _table(graph: Graph, groups: Group, inputs: Any, clock: Clock) -> list[float]:
    """Seconds at each of the widths."""
    args, kwargs = inputs
    calls = []
    for kept in _widths(groups):
        shapes = shapes_with(graph, {groups.name: kept})
        prefix = groups.name + "."
        layers = {name.removeprefix(prefix): shape for name, shape in shapes["tensors"].items()}
        attributes = {"": shapes["attributes"].get(groups.name, {})}
        module = _smaller(graph.layer(groups.name), {"tensors": layers, "attributes": attributes})
        calls.append(partial(module, *args, **kwargs))
    # a noisy clock may call a wider module faster: what is kept never costs less
    return list(accumulate(_seconds(calls, clock), max))


def _seconds(calls: Calls, clock: Clock) -> list[float]:
    """Medians over rounds."""
    rounds = [clock(calls) for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


@torch.no_grad()
def _smaller(module: nn.Module, shapes: Mapping[str, Any]) -> nn.Module:
    """A copy whose layers are smaller and hold the corner of their dense weights."""
    smaller: Any = copy.deepcopy(module)
    apply_shapes(smaller, shapes)
    for name, shape in shapes["tensors"].items():
        corner = tuple(slice(size) for size in shape)
        smaller.get_parameter(name).copy_(module.get_parameter(name)[corner])
    return smaller


@dataclass(frozen=True)
class Share:
    """A measured share of the dense latency.

    Attributes:
        value: Mean over new processes.
        low, high: Its 95 % interval.
        processes: How many measured it.
    """

    value: float
    low: float
    high: float
    processes: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f}) of the dense time in {self.processes} processes"

    def decides(self, budget: float) -> bool:
        """Whether the interval lies all inside or all outside of what a budget accepts."""
        return self.fits(budget) or self.misses(budget)

    def misses(self, budget: float) -> bool:
        """Whether the whole interval is more than 1 % below the budget, or above it."""
        return self.high < TOLERANCE * budget or self.low > budget

    def fits(self, budget: float) -> bool:
        """Whether the whole interval is within 1 % of the budget and never above."""
        return self.low >= TOLERANCE * budget and self.high <= budget


def share_of(shares: Sequence[float]) -> Share:
    """Mean and Student's 95 % interval of what processes, at least two, measured."""
    mean, n = statistics.fmean(shares), len(shares)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(shares) / math.sqrt(n)
    return Share(mean, mean - half, mean + half, n)


def meet_on_the_clock(
    pipe: Any,
    graph: Graph,
    budget: Budget,
    call: Mapping[str, Any],
    solve: Callable[[float], tuple[dict[str, int], float]],
    limit: float,
    times: Times,
    trial: Trial = new_process,
    quiet: bool = True,
) -> tuple[dict[str, int], Share]:
    """Tighten or loosen the table's limit until the whole denoiser meets the budget, within 1 % and never above.

    New processes measure each choice of widths, a few at a time. They load the dense and the shrunk denoiser from
    files, as a user will: what share a process reads is decided anew in each, and this process, which has done other
    things before, reads higher ones (docs/results.md). Choices that differ little share what they measured, moved by
    what the table says of their difference. A choice whose interval fits is accepted if that over other processes,
    which measure it afterwards, fits as well: the first alone would favour choices that chance flatters. Where
    processes differ too much for that, a choice is taken whose interval stays below the budget.

    Args:
        pipe, graph, budget, call: As for :func:`latency_costs`.
        solve: Heads and neurons kept by module for a limit of the table, and what they cost by the table in seconds.
        limit: The table's own.
        times: Of earlier trials, which are not made again; new ones are added and saved.
        trial: Times the denoisers in a folder, see :func:`obsdiff.allocation.clock.new_process`.
        quiet: Do not say on standard error what was measured.

    Returns:
        The widths found, and their share of the dense latency as the last measurement has it.

    Raises:
        UserError: No choice came out below the budget, or a trial failed.
    """
    inputs = inputs_of(pipe, graph, call)
    tried: list[_Tried] = []
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as folder:

        def measure(kept: dict[str, int], cost: float, confirming: bool = False) -> Share:
            """By a few new processes; to confirm, by as many as it takes."""

            def timed() -> tuple[float, float]:
                dense_s, smaller_s = times.measure(json.dumps(kept), lambda: list(trial(Path(folder))))
                times.save()
                return dense_s, smaller_s

            def trials() -> list[tuple[float, float]]:
                _write_choice(Path(folder), graph, kept, inputs)
                found = [timed() for _ in range(LEAST_PROCESSES)]
                while confirming and len(found) < MOST_PROCESSES and not _share(found).decides(budget.share):
                    found.append(timed())
                return found

            [(_, found)] = solved_in_turn([trials], lambda trials: trials())  # by the first process, for all
            tried.append(_Tried(kept, cost, found))
            if not quiet and rank() == 0:
                print(f"{budget}: {'again, ' if confirming else ''}{_share(found)}", file=sys.stderr)
            return _share(found)

        for _ in range(CHOICES):
            kept, cost = solve(limit)
            own = _share_of_choice(tried, kept)
            if own is None or not own.misses(budget.share):
                measure(kept, cost)
            share, slope = _estimate(tried, cost)
            half, aim = share.high - share.value, (1 + TOLERANCE) / 2 * budget.share
            coarse = share.processes >= MOST_PROCESSES and 2 * half > (1 - TOLERANCE) * budget.share
            if coarse:
                aim = budget.share - half
            if share.fits(budget.share) or (coarse and share.high <= budget.share):
                again = measure(kept, cost, confirming=True)
                if again.fits(budget.share) or (coarse and again.high <= budget.share):
                    return kept, again
                share, slope = _estimate(tried, cost)
            if sum(len(one.seconds) for one in tried) >= MOST_TRIALS:
                break
            limit += (aim - share.value) * _dense_s(tried) / slope
    found = _slowest_below(tried, budget.share)
    if found is None:
        raise UserError(f"no choice of widths came below {budget} on the clock; loosen the budget or the floors")
    return found


@dataclass(frozen=True)
class _Tried:
    """Widths, their cost by the table in seconds, and the seconds of dense and smaller calls that processes found."""

    kept: dict[str, int]
    cost: float
    seconds: Sequence[tuple[float, float]]


def _share(seconds: Sequence[tuple[float, float]]) -> Share:
    return share_of([smaller_s / dense_s for dense_s, smaller_s in seconds])


def _share_of_choice(tried: Sequence[_Tried], kept: Mapping[str, int]) -> Share | None:
    """By all processes that measured a choice; None if none did."""
    seconds = [pair for one in tried if one.kept == kept for pair in one.seconds]
    return _share(seconds) if seconds else None


def _slowest_below(tried: Sequence[_Tried], budget: float) -> tuple[dict[str, int], Share] | None:
    """The choice with the largest share whose interval, over all that measured it, stays below the budget."""
    shares = [(one.kept, share) for one in tried if (share := _share_of_choice(tried, one.kept)) is not None]
    return max((found for found in shares if found[1].high <= budget), key=lambda found: found[1].value, default=None)


def _dense_s(tried: Sequence[_Tried]) -> float:
    return statistics.median(dense_s for one in tried for dense_s, _ in one.seconds)


def _estimate(tried: Sequence[_Tried], cost: float) -> tuple[Share, float]:
    """The share of widths of a ``cost``, from all tried near it, and how much of the table's differences shows."""
    dense_s = _dense_s(tried)
    costs = [one.cost / dense_s for one in tried]
    slope = 1.0
    if max(costs) - min(costs) > 2 * NEAR:
        slope = statistics.linear_regression(costs, [_share(one.seconds).value for one in tried]).slope
        slope = min(max(slope, 0.5), 2.0)
    at = cost / dense_s
    near = [
        smaller_s / own_s + slope * (at - table)
        for one, table in zip(tried, costs, strict=True)
        for own_s, smaller_s in one.seconds
        if abs(at - table) <= NEAR
    ]
    return share_of(near), slope


def _write_choice(folder: Path, graph: Graph, kept: Mapping[str, int], inputs: Mapping[str, Any]) -> None:
    """Dense and shrunk denoiser and the arguments of a call, for a trial."""
    shapes = shapes_with(graph, kept)
    smaller = _smaller(graph.denoiser, shapes)
    become_shrunk(Edits(), smaller, shapes)
    try:
        write_trial(folder, graph.denoiser, smaller, inputs)
    except OSError as error:
        raise UserError(
            f"cannot write the denoisers to time to {folder.parent}: {error.strerror or error}; "
            "free some space or set TMPDIR"
        ) from error
