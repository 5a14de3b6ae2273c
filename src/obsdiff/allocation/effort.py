"""What a sensitivity scan does, and what that costs: shares, calls, vectors, backward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from obsdiff.allocation.units import Unit, removed
from obsdiff.models.graph import Graph
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.pruning.options import BACKWARD, FORWARD, ScanOptions

SOLVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # shares at which layers are solved
MEASURED = (0.5, 0.8, 0.98)  # and those at which the denoiser runs; the last is the usual ceiling: no extrapolation
MEASURED_STRUCTURED = (0.25, 0.5, 0.75)
# Beside ranks the text stream's neurons go nearly all, where an extrapolated error is two to three times too small.
MEASURED_BESIDE_RANKS = (0.25, 0.5, 0.75, 0.9, 0.98)
MEASURED_RANK = (0.5, 0.75, 0.85, 0.95)  # errors of ranks fall by orders of magnitude
PRODUCTS = 320  # random vectors of all calls, from which errors of layers are predicted: they scatter by 8 % or more
PRODUCTS_STRUCTURED = 640  # modules are few, so that what their errors are off by averages out less
TAIL_TRIPLES = 32  # of the probe, on which a backward scan measures the largest share
HELD_BYTES = 2**28  # changes of weights that one backward pass serves; of large denoisers as much as they take
TRIPLES = 160
MOST_PASSES = 12.0  # cost of a scan that chooses its own number of triples, in bare passes over the calibration set


def levels_of(unit: Unit, shares: Sequence[float]) -> list[Pattern]:
    """The unit's options nearest to ``shares``, each once, without the dense one."""
    found = {min(unit.options, key=lambda option: abs(removed(option) - share)) for share in shares}
    return sorted((option for option in found if removed(option) > 0), key=removed)


def measured_levels(unit: Unit, levels: Sequence[float] | None, by: str = FORWARD) -> list[Pattern]:
    """The options at which the denoiser runs; levels None: the unit's kind's; a backward scan has none."""
    if by == BACKWARD:
        return levels_of(unit, SOLVED)[-1:]
    shares: Sequence[float] = MEASURED
    if isinstance(sparsest := unit.options[-1], Structured):
        usual = MEASURED_BESIDE_RANKS if unit.beside_ranks else MEASURED_STRUCTURED
        shares = MEASURED_RANK if sparsest.directions else usual
    return levels_of(unit, levels or shares)


def passes_needed(
    graph: Graph, units: Sequence[Unit], levels: Sequence[float] | None, by: str = FORWARD, triples: int = 1
) -> float:
    """What a scan on so many triples costs, in multiples of the whole probe through the whole denoiser; a backward pass
    by inputs, not weights, counts as one."""
    return _passes(graph, units, levels, way_of(graph, units, levels, by, triples), triples)


def way_of(graph: Graph, units: Sequence[Unit], levels: Sequence[float] | None, by: str, triples: int) -> str:
    """How units are scanned: few triples need so many vectors that running the denoiser costs less."""
    costs = {way: _passes(graph, units, levels, way, triples) for way in {by, FORWARD}}
    return by if costs[by] < costs[FORWARD] else FORWARD


def _passes(graph: Graph, units: Sequence[Unit], levels: Sequence[float] | None, by: str, triples: int) -> float:
    stages, few = len(graph.stages), few_triples(triples, by) / triples
    runs = stages * (1 + (few if few < 1 else 0))  # the dense outputs
    first = at = 0
    for part in parts_of(graph, units, by):
        if not graph.repeats and part[0].stage > first:
            runs += part[0].stage - first  # moving on
            first = part[0].stage
        if by == BACKWARD:
            runs += (1 + vectors_of(units, triples)) * (stages - first)
        if few == 1:
            at = first
        for unit in part:
            if not graph.repeats and unit.stage > at:
                runs += few * (unit.stage - at)
                at = unit.stage
            runs += few * len(measured_levels(unit, levels, by)) * (stages - at)
        if few == 1:
            first = at
    return runs / stages


def vectors_of(units: Sequence[Unit], triples: int) -> int:
    """Random vectors per triple that the errors of units are predicted with."""
    structured = isinstance(units[0].options[-1], Structured)
    return math.ceil((PRODUCTS_STRUCTURED if structured else PRODUCTS) / triples)


def few_triples(triples: int, by: str) -> int:
    """How many of so many triples the denoiser runs on with a unit pruned."""
    return min(triples, TAIL_TRIPLES) if by == BACKWARD else triples


def parts_of(graph: Graph, units: Sequence[Unit], by: str) -> list[list[Unit]]:
    """The units, those together that one backward pass serves; of a forward scan each alone."""
    if by == FORWARD:
        return [[unit] for unit in units]
    most = held_bytes(graph)
    parts: list[list[Unit]] = []
    held = 0
    for unit in units:
        weights = {name: graph.weight(name).numel() for name in _changed(graph, unit)}
        size = 4 * len(levels_of(unit, SOLVED)) * sum(weights.values())
        if not parts or held + size > most:
            parts.append([])
            held = 0
        parts[-1].append(unit)
        held += size
    return parts


def held_bytes(graph: Graph) -> int:
    """What candidates may take while one backward pass serves them: as much as the denoiser takes, or a little."""
    return max(HELD_BYTES, sum(parameter.nbytes for parameter in graph.denoiser.parameters()))


def _changed(graph: Graph, unit: Unit) -> list[str]:
    """The layers whose weights a candidate changes."""
    if not isinstance(unit.options[-1], Structured):
        return list(unit.members)
    return [s.layer for name in unit.members for s in graph.group_of[name].consumers]


def triples_of(graph: Graph, units: Sequence[Unit], scanning: ScanOptions, calls: int) -> int:
    """Triples to record, where a calibration pass makes ``calls`` calls of the denoiser (prompts times steps)."""
    if scanning.triples is not None:
        return min(scanning.triples, calls)
    passes = passes_needed(graph, units, scanning.levels, scanning.by)
    return max(4, min(TRIPLES, calls, int(MOST_PASSES * calls / passes)))
