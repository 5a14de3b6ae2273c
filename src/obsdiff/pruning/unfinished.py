"""What calibrations that were cut off have left on the way to a store: of each process the sums over its prompts.

Sums are sums: a run on any number of processes goes on from all of them.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obsdiff.files import read_json, remove_folder
from obsdiff.pruning.statistics import INDEX, check_fingerprint, open_statistics
from obsdiff.ranks import rank, world_size

UNFINISHED = ".unfinished"  # added to a store's name for what a calibration has so far
_PROCESS = re.compile(r"(?:-(?P<rank>\d+)-of-(?P<count>\d+))?")


@dataclass
class Unfinished:
    """Where this process keeps what it has so far, and what it has taken over.

    Attributes:
        folder: Its own.
        merged: Others, whose sums are in its own from its next save on.
    """

    folder: Path
    merged: list[Path] = field(default_factory=list)

    def saved(self) -> None:
        """The own folder holds everything: the others would count prompts twice."""
        for folder in self.merged:
            remove_folder(folder, INDEX)
        self.merged.clear()


def own_unfinished(store: Path) -> Path:
    """Where this process keeps what it has so far."""
    part = "" if world_size() == 1 else f"-{rank()}-of-{world_size()}"
    return store.with_name(store.name + UNFINISHED + part)


def remove_unfinished(store: Path) -> None:
    """Remove what calibrations left on the way to a store that is finished now."""
    for folder in _folders(store):
        remove_folder(folder, INDEX)


def to_go_on_from(store: Path, fingerprint: Mapping[str, Any], quiet: bool) -> list[Path]:
    """Folders whose sums this process begins with: each of those that there are belongs to one process, and none counts
    a prompt that another one counts.

    Nobody may write before all processes have asked.

    Args:
        store: What is on the way.
        fingerprint: Of what is to be measured.
        quiet: Say nothing.

    Raises:
        UserError: One is damaged, or of other settings.
    """
    counted = {}
    for folder in _folders(store):
        if not (folder / INDEX).exists():
            continue
        found = open_statistics(folder)
        check_fingerprint(found.fingerprint, fingerprint, folder)
        if _process(store, folder)[1] > 1 and "prompts" not in read_json(folder / INDEX, "a statistics store"):
            _say(f"{folder}, of an earlier version, does not tell its prompts; they are measured again", quiet)
            continue
        counted[folder] = set(found.prompts)
    chosen: list[Path] = []
    covered: set[int] = set()
    for folder, prompts in sorted(counted.items(), key=lambda item: -len(item[1])):
        if covered.isdisjoint(prompts):
            chosen.append(folder)
            covered |= prompts
        elif not prompts <= covered:  # else it was merged, and its process killed before it was removed
            _say(f"{folder} counts prompts that others count, too; the rest of its prompts are measured again", quiet)
    if any(_process(store, folder)[1] != world_size() for folder in chosen):
        _say(f"going on from {len(covered)} prompts, measured by another number of processes", quiet)
    own = []
    for number, folder in enumerate(sorted(chosen)):
        at, count = _process(store, folder)
        if (at if count == world_size() else number % world_size()) == rank():  # a name of now is its process's alone
            own.append(folder)
    return own


def _folders(store: Path) -> list[Path]:
    beside = store.parent.glob(f"{glob.escape(store.name + UNFINISHED)}*")
    return sorted(path for path in beside if _PROCESS.fullmatch(_ending(store, path)))


def _ending(store: Path, folder: Path) -> str:
    return folder.name.removeprefix(store.name + UNFINISHED)


def _process(store: Path, folder: Path) -> tuple[int, int]:
    """Whose it is: number of the process, and how many there were."""
    match = _PROCESS.fullmatch(_ending(store, folder))
    assert match is not None
    return int(match["rank"] or 0), int(match["count"] or 1)


def _say(what: str, quiet: bool) -> None:
    if not quiet and rank() == 0:
        print(what, file=sys.stderr)
