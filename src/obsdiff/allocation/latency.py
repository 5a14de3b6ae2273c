"""Budgets in measured latency: a table of module times chooses, a new process measures what came out."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from obsdiff.allocation.budget import Costs, costs_from, table_cost
from obsdiff.allocation.clock import call_of, time_calls, time_in_new_process
from obsdiff.allocation.curves import interpolate
from obsdiff.allocation.request import Budget
from obsdiff.allocation.units import Unit
from obsdiff.files import read_json, write_json
from obsdiff.models.calls import remembered_call
from obsdiff.models.content import component_hash
from obsdiff.models.denoisers import dtype_of, parts_of
from obsdiff.models.graph import Graph, Group, shapes_with
from obsdiff.models.modes import eval_mode
from obsdiff.models.obsdiff_shrunk import apply_shapes
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.plan import kept_units
from obsdiff.pruning.surgery import Edits, become_shrunk
from obsdiff.ranks import rank, solved_in_turn
from obsdiff.versions import versions

FILE = "latency.json"
POINTS, ROUNDS = 5, 12  # widths at which a kind of module is timed, and how often
CLOSE, FAR = 0.01, 0.03  # relative distances from the budget: up to here no correction, from here on a warning
STEP = 2.0  # a correction changes what is saved at most by this factor
Share = tuple[float, float, float]  # of the dense latency: value, and the 95 % interval of its measurement


class _Kept(BaseModel):
    times: dict[str, list[float] | list[list[float]]]


@dataclass(frozen=True)
class Timing:
    """What is called, and where its times are kept.

    Attributes:
        arguments: Of a call of each denoiser, by the prefix of its names.
        depends_on: What times depend on: model, call, machine.
        file: Of the times by a hash of what was timed; None: they are not kept.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    depends_on: Sequence[Any]
    file: Path | None

    def times(self, what: str, measure: Callable[[], list[Any]]) -> list[Any]:
        """The kept times of ``what``, else what ``measure`` gives; by the first of several processes, for all."""

        def once(key: str) -> list[Any]:
            if self.file is None:
                return measure()
            kept = read_json(self.file, "times of denoisers", _Kept)["times"] if self.file.exists() else {}
            if key not in kept:
                kept[key] = measure()
                write_json(self.file, {"times": kept})
            return list(kept[key])

        key = hashlib.sha256(json.dumps([what, *self.depends_on]).encode()).hexdigest()
        [(_, found)] = solved_in_turn([key], once)
        return found


def timing_of(pipe: Any, graph: Graph, call: Mapping[str, Any], store: Path | None) -> Timing:
    """Of the call that the pipeline makes to sample one image; ``store`` is a folder."""
    recorded, parameter = remembered_call(pipe, call), next(graph.denoiser.parameters())
    single = next(iter(recorded.values()))
    arguments = {prefix: recorded.get(prefix[:-1], single) for prefix in parts_of(graph.denoiser)}
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else platform.machine()
    machine = [platform.node(), device, torch.get_num_threads(), versions()]
    depends_on = [component_hash(graph.denoiser), str(dtype_of(graph.denoiser)), dict(call), machine]
    return Timing(arguments, depends_on, None if store is None else store / FILE)


@torch.no_grad()
def latency_costs(graph: Graph, units: Sequence[Unit], budget: Budget, timing: Timing) -> Costs:
    """Share of the dense latency of each option, from timing every kind of module at a few widths."""
    kinds: dict[str, str] = {}
    examples: dict[str, Any] = {}  # of each kind a group, and a call of the module around it

    def note(group: Group, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [list(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        weights = {layer.removeprefix(name): list(graph.weight(layer).shape) for layer in group.layers}
        kinds[group.name] = f"{type(module).__name__} {weights} {inputs}"
        examples.setdefault(kinds[group.name], (group, name, args, kwargs))

    hooks = []
    for group in (graph.group_of[name] for unit in units for name in unit.members):
        name = _around(graph, group)
        hooks.append(graph.layer(name).register_forward_pre_hook(partial(note, group, name), with_kwargs=True))
    whole = call_of(parts_of(graph.denoiser), timing.arguments)
    with eval_mode(graph.denoiser):
        try:
            whole()
        finally:
            for hook in hooks:
                hook.remove()
        found = {kind: timing.times(kind, partial(_table, graph, whole, *of)) for kind, of in examples.items()}
    tables = {name: list(zip(_widths(graph.group_of[name]), found[kind], strict=True)) for name, kind in kinds.items()}

    def cost(name: str, pattern: Any) -> float:
        return interpolate(tables[name], kept_units(graph.group_of[name], pattern))

    # modules timed alone may add up to more than the whole; what they save is what counts
    return costs_from(units, cost, 1 - sum(table[-1][1] for table in tables.values()), 1, budget.share)


def _around(graph: Graph, group: Group) -> str:
    """Name of the smallest module that is called and holds all layers of a group."""
    together = zip(*(layer.split(".") for layer in group.layers), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, together)]
    while isinstance(graph.layer(".".join(shared)), nn.ModuleList):
        shared.pop()
    return ".".join(shared)


def _widths(group: Group) -> list[int]:
    """Units kept, for a table."""
    return sorted({max(1, round(group.count * i / (POINTS - 1))) for i in range(POINTS)})


def _table(graph: Graph, whole: Callable[[], Any], group: Group, name: str, args: Any, kwargs: Any) -> list[float]:
    """Share of the ``whole`` call's time that the module called ``name`` takes at each width of a group inside."""
    smaller = [_smaller(graph.layer(name), shapes_with(graph, {group.name: kept}), name) for kept in _widths(group)]
    calls: list[Callable[[], Any]] = [*(partial(module, *args, **kwargs) for module in smaller), whole]
    rounds = [[at / seconds[-1] for at in seconds[:-1]] for seconds in (time_calls(calls) for _ in range(ROUNDS))]
    # a noisy clock may call a wider module faster: what is kept never costs less
    return list(accumulate(map(statistics.median, zip(*rounds, strict=True)), max))


@torch.no_grad()
def _smaller(module: nn.Module, shapes: Mapping[str, Mapping[str, Any]], name: str = "") -> nn.Module:
    """A copy of the module called ``name`` whose tensors are smaller: the corners of the dense ones."""
    smaller = copy.deepcopy(module)
    inside = {key: {at[len(name) :].strip("."): to for at, to in of.items()} for key, of in shapes.items()}
    apply_shapes(smaller, inside)
    for at, tensor in smaller.named_parameters():
        tensor.copy_(module.get_parameter(at)[tuple(slice(size) for size in tensor.shape)])
    return smaller


def meet_latency(
    graph: Graph,
    units: Sequence[Unit],
    budget: Budget,
    costs: Costs,
    timing: Timing,
    solve: Callable[[float], list[Pattern]],
    quiet: bool = True,
) -> tuple[list[Pattern], Share]:
    """Patterns that ``solve`` gives for a limit of the table, and the share that a new process measures of them.

    A table is wrong about what modules save in the whole. So if the first choice is off, one correction asks for more
    or less saving, in the ratio of the wanted to the measured one; the choice nearer to the budget is taken. One that
    is still more than 3 % off is taken with a warning.

    Raises:
        UserError: The new process failed.
    """

    def off(found: tuple[Any, Share]) -> float:
        return abs(found[1][0] / budget.share - 1)

    limit, prunable, tried = costs.limit, costs.dense - costs.fixed, list[tuple[list[Pattern], Share]]()
    while not tried or (len(tried) < 2 and off(tried[0]) > CLOSE):
        patterns = solve(max(limit, sum(map(min, costs.options))))
        chosen = {name: pattern for unit, pattern in zip(units, patterns, strict=True) for name in unit.members}
        kept = {name: kept_units(graph.group_of[name], p) for name, p in chosen.items() if isinstance(p, Structured)}
        share = share_of(timing.times(json.dumps(kept), partial(_time_choice, graph, kept, timing.arguments)))
        tried.append((patterns, share))
        if not quiet and rank() == 0:
            said = "{}: {:.4f} ({:.4f} to {:.4f}) of the dense time in a new process".format(budget, *share)
            print(said, file=sys.stderr)
        ratio = (1 - budget.share) / max(1 - share[0], 1e-9)
        limit = prunable - min(max(ratio, 1 / STEP), STEP) * (prunable - table_cost(units, patterns, costs))
    best = min(tried, key=off)
    if off(best) > FAR and rank() == 0:
        warnings.warn(f"{budget} came to {best[1][0]:.4f} of the dense time; ask for another share", stacklevel=2)
    return best


def share_of(rounds: Sequence[Sequence[float]]) -> Share:
    """Ratio of the medians over rounds of (dense, smaller) seconds, and its interval by a bootstrap over rounds."""
    drawn = torch.randint(len(rounds), (1000, len(rounds)), generator=torch.Generator().manual_seed(0))
    picked = torch.cat([torch.arange(len(rounds))[None], drawn])  # first the rounds as they are
    dense, smaller = torch.tensor(rounds, dtype=torch.float64)[picked].quantile(0.5, dim=1).T
    low, high = (smaller / dense)[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(smaller[0] / dense[0]), low, high


def _time_choice(graph: Graph, kept: Mapping[str, int], arguments: Mapping[str, Any]) -> list[list[float]]:
    shapes = shapes_with(graph, kept)
    smaller = _smaller(graph.denoiser, shapes)
    become_shrunk(Edits(), smaller, shapes)
    return time_in_new_process(graph.denoiser, smaller, arguments)
