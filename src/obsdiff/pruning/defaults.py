"""What a method's row fills in where the request says nothing, and what a prune did otherwise than the row says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from obsdiff.criteria import find_method
from obsdiff.obs.observers import PASSES
from obsdiff.obs.pattern import KINDS, Hybrid, Pattern, Structured


def pattern_by(method: str, pattern: Pattern | Hybrid) -> Pattern | Hybrid:
    """The pattern with the method's own rounding of FFN widths, unless it has one, and of ``structured:RATIO`` the
    kinds that the method removes."""
    if isinstance(pattern, Hybrid):
        return replace(pattern, first=_units_by(method, pattern.first))
    return _units_by(method, pattern) if isinstance(pattern, Structured) else pattern


def _units_by(method: str, pattern: Structured) -> Structured:
    if pattern.multiple_of is not None or not pattern.cuts:
        return pattern
    row = find_method(method)
    kinds = row.cuts if pattern.everything else KINDS
    shares: Any = {kind: pattern.share(kind) if kind in kinds else 0.0 for kind in KINDS}
    return Structured(**shares, multiple_of=row.multiple_of, rank=pattern.rank, lowrank=pattern.lowrank)


def departures(method: str, measured: Mapping[str, Any] | None, packages: int) -> list[str]:
    """For people: how a calibration differs from the one that the method asks for.

    Args:
        method: Its name.
        measured: Fingerprint of the statistics; None: nothing was measured.
        packages: Calibration passes.
    """
    row = find_method(method)
    if measured is None or not row.needs - PASSES:  # no loss is weighted
        return []
    found = []
    if (weighting := measured.get("weighting")) != row.weighting:
        found.append(f"{method} asks for {row.weighting} timestep weights; the statistics have {weighting}")
    if packages < row.packages:
        found.append(f"{method} asks for {row.packages} calibration passes; there was {packages}")
    return found
