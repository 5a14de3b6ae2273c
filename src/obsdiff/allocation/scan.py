"""Sensitivity scan: how much the denoiser's output changes when one layer alone is pruned.

The denoiser runs with each layer pruned, at a few shares ("forward"); or at the largest share alone, and the errors at
the others are predicted from gradients ("backward", :mod:`obsdiff.allocation.gradients`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from obsdiff.allocation.candidates import Candidate, Solver
from obsdiff.allocation.curves import corrected_errors
from obsdiff.allocation.effort import SOLVED, few_triples, levels_of, measured_levels, parts_of, vectors_of, way_of
from obsdiff.allocation.gradients import NotDifferentiable, predicted_errors
from obsdiff.allocation.probe import Probe
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.units import Unit, removed
from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.files import read_json, write_json
from obsdiff.obs.pattern import NM, Pattern
from obsdiff.progress import track
from obsdiff.pruning.options import BACKWARD, FORWARD
from obsdiff.pruning.statistics import check_fingerprint
from obsdiff.pruning.surgery import Edits
from obsdiff.ranks import rank, solved_in_turn, world_size

FILE = "sensitivity.json"
FORMAT = 4
SAVE_EVERY_S = 30.0
BROKEN = 1e9  # stands for an error that is not finite


@dataclass
class Sensitivity:
    """What a scan leaves.

    Attributes:
        fingerprint: Everything that the numbers depend on.
        solved: Per unit the layers' own relative error by share removed.
        measured: Per unit the relative error of the denoiser's output by share removed.
        predicted: The same to first order, from gradients; nothing of units that are measured at all their shares.
        triples: (latent, step, prompt) triples of the probe.
        cost: "scan_s" seconds; "solve_s" seconds and "passes" (the whole probe through the whole denoiser, in
            multiples), both of all processes together.
        note: For people: why errors that were to be predicted were measured; else "".
        earlier_s: Seconds of "scan_s" that earlier runs spent, whose results the store held.
    """

    fingerprint: dict[str, Any]
    solved: dict[str, dict[float, float]] = field(default_factory=dict)
    measured: dict[str, dict[float, float]] = field(default_factory=dict)
    predicted: dict[str, dict[float, float]] = field(default_factory=dict)
    triples: int = 0
    cost: dict[str, float] = field(default_factory=lambda: {"scan_s": 0.0, "solve_s": 0.0, "passes": 0.0})
    note: str = ""
    earlier_s: float = 0.0

    @property
    def way(self) -> str:
        """Whether errors were predicted, "backward", or all were measured, "forward"."""
        return BACKWARD if any(self.predicted.values()) else FORWARD

    def errors(self, name: str) -> dict[float, float]:
        """What is known of a unit's output error, by share removed."""
        measured, predicted = self.measured[name], self.predicted[name]
        return corrected_errors(self.solved[name], predicted, measured) if predicted else measured


def scan(
    solver: Solver,
    units: Sequence[Unit],
    probe: Probe,
    prompts: str,
    *,
    levels: Sequence[float] | None = None,
    by: str = FORWARD,
    store: Path | None = None,
    quiet: bool = True,
) -> Sensitivity:
    """Prune each unit alone at a few shares, and compare the denoiser's output with the dense one on ``probe``.

    Where ``torch.distributed`` is initialised the units are dealt out over its processes, and all get all results; a
    store is continued by any number of them.

    Args:
        solver: Prunes layers; the dense denoiser is as before afterwards.
        units: Without limits, so that a store serves every allocation; in the order of a forward pass.
        probe: Where to measure.
        prompts: Hash of what the probe's denoiser was told (:func:`obsdiff.pruning.calibrate.conditioning_hash`).
        levels: Shares to measure at, of a forward scan; None: :data:`MEASURED`.
        by: "forward", or "backward": errors at the other shares are predicted, where the denoiser can be differentiated
            and there is memory for it (else they are measured, and the note says so), if that costs less.
        store: Folder to keep the results in; what it holds of the same settings is not measured again.
        quiet: No progress bar.

    Raises:
        UserError: The store was made with other statistics or settings.
    """
    fingerprint = _fingerprint(solver, units, len(probe), prompts, levels, by)
    found = (_open(store, fingerprint) if store is not None else None) or Sensitivity(fingerprint, triples=len(probe))
    found.earlier_s = found.cost["scan_s"]
    missing = [unit for unit in units if unit.name not in found.measured]
    if not missing:
        return found
    scanner = _Scanner(solver, missing, probe, levels, way_of(solver.graph, units, levels, by, len(probe)))
    found.cost["passes"] += world_size() * scanner.passes()  # the dense outputs
    started = saved = time.perf_counter()
    scanned = solved_in_turn(missing, scanner.measure)
    for unit, result in track(scanned, len(missing), "scanning", quiet or rank() > 0):
        found.solved[unit.name], found.measured[unit.name] = result.solved, result.measured
        found.predicted[unit.name], found.note = result.predicted, found.note or result.note
        found.cost["solve_s"] += result.solve_s
        found.cost["passes"] += result.passes
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
    predicted: dict[float, float]
    note: str
    solve_s: float
    passes: float


class _Scanner:
    """Measures units, in their order; what a backward pass tells of several is kept until their turn."""

    def __init__(
        self, solver: Solver, units: Sequence[Unit], probe: Probe, levels: Sequence[float] | None, by: str
    ) -> None:
        self.solver, self.levels, self.by, self.note = solver, levels, by, ""
        own = units[rank() :: world_size()]  # as they are dealt out
        self.parts = {part[0].name: part for part in parts_of(solver.graph, own, by)}
        self.whole = self.few = Restart(solver.graph, probe)
        if (few := few_triples(len(probe), by)) < len(probe):
            calls = [probe.calls[i * len(probe) // few] for i in range(few)]
            self.few = Restart(solver.graph, replace(probe, calls=calls))
        self.candidates: dict[str, dict[Pattern, Candidate]] = {}
        self.predicted: dict[str, dict[float, float]] = {}
        self._counted = 0.0

    def passes(self) -> float:
        """The whole probe through the whole denoiser, in multiples, since this was last asked."""
        runs: float = self.whole.stages_run
        if self.few is not self.whole:
            runs += self.few.stages_run * len(self.few.probe) / len(self.whole.probe)
        before, self._counted = self._counted, runs / len(self.solver.graph.stages)
        return self._counted - before

    def measure(self, unit: Unit) -> _Measured:
        """All levels of one unit."""
        solve_s = self._begin(self.parts[unit.name]) if unit.name in self.parts else 0.0
        self.few.advance(unit.stage)
        candidates, predicted = self.candidates.pop(unit.name), self.predicted.pop(unit.name, {})
        measured = self._errors(unit, candidates, self.by if predicted else FORWARD)
        largest = max(measured, default=0.0)
        if predicted and not predicted[largest] and measured[largest]:  # something hides its effect from gradients
            measured, predicted = self._errors(unit, candidates, FORWARD), {}
        solved = {removed(pattern): candidate.error for pattern, candidate in candidates.items()}
        return _Measured(solved, measured, predicted, self.note, solve_s, self.passes())

    def _begin(self, part: Sequence[Unit]) -> float:
        """Solve the units of a part, and predict their errors; seconds of solving."""
        if part[0].stage > self.few.first:
            self.solver.forget()
        started = time.perf_counter()
        for unit in part:
            levels = {*levels_of(unit, SOLVED), *measured_levels(unit, self.levels)}
            patterns = sorted(levels | {*measured_levels(unit, self.levels, self.by)}, key=removed)
            candidates = self.solver.candidates(unit.members, patterns)
            self.candidates[unit.name] = dict(zip(patterns, candidates, strict=True))
        solve_s = time.perf_counter() - started
        if self.by == BACKWARD and not self.note:
            self.whole.advance(part[0].stage)
            try:
                errors = predicted_errors(
                    self.whole,
                    {name: list(found.values()) for name, found in self.candidates.items()},
                    vectors_of(part, len(self.whole.probe)),
                )
            except NotDifferentiable as error:
                self.note = f"errors were measured at all shares, not predicted from gradients: {error}"
            else:
                for name, found in errors.items():
                    self.predicted[name] = dict(zip(map(removed, self.candidates[name]), found, strict=True))
        return solve_s

    def _errors(self, unit: Unit, candidates: Mapping[Pattern, Candidate], by: str) -> dict[float, float]:
        """The output errors that are measured."""
        errors = {}
        for pattern in measured_levels(unit, self.levels, by):
            edits = Edits()
            try:
                candidates[pattern].apply(edits, self.solver.graph)
                errors[removed(pattern)] = min(self.few.error(), BROKEN)
            finally:
                edits.undo()
        return errors


def _fingerprint(
    solver: Solver, units: Sequence[Unit], triples: int, prompts: str, levels: Sequence[float] | None, by: str
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
        **{name: value for name in ("compared", "refit_steps") if (value := getattr(options, name)) is not None},
        "triples": triples,
        "prompts": prompts,
        "levels": None if levels is None else list(levels),
        "by": by,
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
                "note": found.note,
                "units": {
                    name: {
                        "solved": _pairs(found.solved[name]),
                        "measured": _pairs(errors),
                        "predicted": _pairs(found.predicted[name]),
                    }
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
        solved, measured, predicted = (
            {name: {s: float(e) for s, e in unit[kind]} for name, unit in content["units"].items()}
            for kind in ("solved", "measured", "predicted")
        )
        return Sensitivity(
            dict(content["fingerprint"]),
            solved,
            measured,
            predicted,
            int(content["triples"]),
            {key: float(value) for key, value in content["cost"].items()},
            str(content["note"]),
        )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{store / FILE} is damaged: {brief(error)}; delete it and scan again") from None
