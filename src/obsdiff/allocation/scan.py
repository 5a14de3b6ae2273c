"""Sensitivity scan: how much the denoiser's output changes when one layer alone is pruned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.probe import Probe
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.units import Unit, removed
from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.files import read_json, write_json
from obsdiff.models.graph import Graph
from obsdiff.obs.pattern import NM, Pattern, Structured
from obsdiff.progress import track
from obsdiff.pruning.options import ScanOptions
from obsdiff.pruning.statistics import check_fingerprint
from obsdiff.pruning.surgery import Edits
from obsdiff.ranks import rank, solved_in_turn, world_size

FILE = "sensitivity.json"
FORMAT = 2
SAVE_EVERY_S = 30.0
SOLVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # shares at which layers are solved
MEASURED = (0.5, 0.8, 0.98)  # and those at which the denoiser runs; the last is the usual ceiling: no extrapolation
MEASURED_STRUCTURED = (0.25, 0.5, 0.75)
# Beside ranks the text stream's neurons go nearly all, where an extrapolated error is two to three times too small.
MEASURED_BESIDE_RANKS = (0.25, 0.5, 0.75, 0.9, 0.98)
MEASURED_RANK = (0.5, 0.75, 0.85, 0.95)  # errors of ranks fall by orders of magnitude
TRIPLES = 160
MOST_PASSES = 12.0  # cost of a scan that chooses its own number of triples, in bare passes over the calibration set
BROKEN = 1e9  # stands for an error that is not finite


@dataclass
class Sensitivity:
    """What a scan leaves.

    Attributes:
        fingerprint: Everything that the numbers depend on.
        solved: Per unit the layers' own relative error by share removed.
        measured: Per unit the relative error of the denoiser's output by share removed.
        triples: (latent, step, prompt) triples of the probe.
        cost: "scan_s" seconds; "solve_s" seconds and "passes" (the whole probe through the whole denoiser, in
            multiples), both of all processes together.
        earlier_s: Seconds of "scan_s" that earlier runs spent, whose results the store held.
    """

    fingerprint: dict[str, Any]
    solved: dict[str, dict[float, float]] = field(default_factory=dict)
    measured: dict[str, dict[float, float]] = field(default_factory=dict)
    triples: int = 0
    cost: dict[str, float] = field(default_factory=lambda: {"scan_s": 0.0, "solve_s": 0.0, "passes": 0.0})
    earlier_s: float = 0.0


def levels_of(unit: Unit, shares: Sequence[float]) -> list[Pattern]:
    """The unit's options nearest to ``shares``, each once, without the dense one."""
    found = {min(unit.options, key=lambda option: abs(removed(option) - share)) for share in shares}
    return sorted((option for option in found if removed(option) > 0), key=removed)


def measured_levels(unit: Unit, levels: Sequence[float] | None) -> list[Pattern]:
    """The options at which the denoiser runs; None: the defaults of the unit's kind."""
    shares: Sequence[float] = MEASURED
    if isinstance(sparsest := unit.options[-1], Structured):
        usual = MEASURED_BESIDE_RANKS if unit.beside_ranks else MEASURED_STRUCTURED
        shares = usual if sparsest.rank is None else MEASURED_RANK
    return levels_of(unit, levels or shares)


def passes_needed(graph: Graph, units: Sequence[Unit], levels: Sequence[float] | None) -> float:
    """What a scan costs, in multiples of the whole probe through the whole denoiser."""
    stages, first = len(graph.stages), 0
    runs = float(stages)  # the dense outputs
    for unit in units:
        if graph.chain and unit.stage > first:
            runs += stages - first  # moving on
            first = unit.stage
        runs += len(measured_levels(unit, levels)) * (stages - first)
    return runs / stages


def triples_of(graph: Graph, units: Sequence[Unit], scanning: ScanOptions, calls: int) -> int:
    """Triples to record, where a calibration pass makes ``calls`` calls of the denoiser (prompts times steps)."""
    if scanning.triples is not None:
        return min(scanning.triples, calls)
    return max(4, min(TRIPLES, calls, int(MOST_PASSES * calls / passes_needed(graph, units, scanning.levels))))


def scan(
    solver: Solver,
    units: Sequence[Unit],
    probe: Probe,
    prompts: str,
    *,
    levels: Sequence[float] | None = None,
    store: Path | None = None,
    quiet: bool = True,
) -> Sensitivity:
    """Prune each unit alone at a few shares, and measure the denoiser's output against the dense one on ``probe``.

    Where ``torch.distributed`` is initialised the units are dealt out over its processes, and all get all results; a
    store is continued by any number of them.

    Args:
        solver: Prunes layers; the dense denoiser is as before afterwards.
        units: Without limits, so that a store serves every allocation; in the order of a forward pass.
        probe: Where to measure.
        prompts: Hash of what the probe's denoiser was told (:func:`obsdiff.pruning.calibrate.conditioning_hash`).
        levels: Shares to measure at; None: :data:`MEASURED`.
        store: Folder to keep the results in; what it holds of the same settings is not measured again.
        quiet: No progress bar.

    Raises:
        UserError: The store was made with other statistics or settings.
    """
    graph, fingerprint = solver.graph, _fingerprint(solver, units, len(probe), prompts, levels)
    found = (_open(store, fingerprint) if store is not None else None) or Sensitivity(fingerprint, triples=len(probe))
    found.earlier_s = found.cost["scan_s"]
    missing = [unit for unit in units if unit.name not in found.measured]
    if not missing:
        return found
    restart = Restart(graph, probe)
    found.cost["passes"] += world_size() * restart.stages_run / len(graph.stages)  # the dense outputs

    def measure(unit: Unit) -> _Measured:
        if unit.stage > restart.first:
            solver.forget()
        return _measure(unit, restart, solver, levels)

    started = saved = time.perf_counter()
    scanned = solved_in_turn(missing, measure)
    for unit, result in track(scanned, len(missing), "scanning", quiet or rank() > 0):
        found.solved[unit.name], found.measured[unit.name] = result.solved, result.measured
        found.cost["solve_s"] += result.solve_s
        found.cost["passes"] += result.stages_run / len(graph.stages)
        found.cost["scan_s"] = found.earlier_s + time.perf_counter() - started
        if store is not None and rank() == 0 and time.perf_counter() - saved > SAVE_EVERY_S:
            _save(found, store)
            saved = time.perf_counter()
    if store is not None and rank() == 0:
        _save(found, store)
    return found


@dataclass(frozen=True)
class _Measured:
    """One unit: its own and its output errors by share removed, and what they cost."""

    solved: dict[float, float]
    measured: dict[float, float]
    solve_s: float
    stages_run: int


def _measure(unit: Unit, restart: Restart, solver: Solver, levels: Sequence[float] | None) -> _Measured:
    """All levels of one unit."""
    before = restart.stages_run
    restart.advance(unit.stage)
    measured = measured_levels(unit, levels)
    patterns = sorted({*levels_of(unit, SOLVED), *measured}, key=removed)
    started = time.perf_counter()
    candidates = dict(zip(patterns, solver.candidates(unit.members, patterns), strict=True))
    solve_s = time.perf_counter() - started
    errors = {}
    for pattern in measured:
        edits = Edits()
        try:
            candidates[pattern].apply(edits, solver.graph)
            errors[removed(pattern)] = min(restart.error(), BROKEN)
        finally:
            edits.undo()
    solved = {removed(pattern): candidates[pattern].error for pattern in patterns}
    return _Measured(solved, errors, solve_s, restart.stages_run - before)


def _fingerprint(
    solver: Solver, units: Sequence[Unit], triples: int, prompts: str, levels: Sequence[float] | None
) -> dict[str, Any]:
    options = solver.options
    sparsest = units[0].options[-1]  # options begin dense, which N:M has no pattern of its own for
    kind = f"N:{sparsest.m}" if isinstance(sparsest, NM) else type(sparsest).__name__.lower()
    return {
        "kind": f"{kind} beside ranks" if any(unit.beside_ranks for unit in units) else kind,
        "statistics": dict(solver.statistics.fingerprint),
        "method": options.method,
        "refit": options.refits,
        "seed": options.seed,
        "damping": options.damping,
        "fusion": options.fusion,
        "triples": triples,
        "prompts": prompts,
        "levels": None if levels is None else list(levels),
    }


def _save(found: Sensitivity, store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
        write_json(
            store / FILE,
            {
                "format": FORMAT,
                "fingerprint": found.fingerprint,
                "triples": found.triples,
                "cost": found.cost,
                "units": {
                    name: {"solved": _pairs(found.solved[name]), "measured": _pairs(errors)}
                    for name, errors in found.measured.items()
                },
            },
        )
    except OSError as error:
        raise UserError(f"cannot write {store}: {error.strerror or error}; choose another folder") from error


def _pairs(errors: Mapping[float, float]) -> list[list[float]]:
    return [[share, error] for share, error in errors.items()]


def _open(store: Path, fingerprint: Mapping[str, Any]) -> Sensitivity | None:
    """What a store holds; None if there is none."""
    if not (store / FILE).exists():
        return None
    content = read_json(store / FILE, "a sensitivity scan")
    try:
        if content["format"] != FORMAT:
            raise UserError(
                f"{store} was written in format {brief(content['format'])}; this version reads {FORMAT}; delete it"
            )
        check_fingerprint(content["fingerprint"], fingerprint, store, "the sensitivity scan")
        return Sensitivity(
            dict(content["fingerprint"]),
            {name: {s: float(e) for s, e in unit["solved"]} for name, unit in content["units"].items()},
            {name: {s: float(e) for s, e in unit["measured"]} for name, unit in content["units"].items()},
            int(content["triples"]),
            {key: float(value) for key, value in content["cost"].items()},
        )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{store / FILE} is damaged: {brief(error)}; delete it and scan again") from None
