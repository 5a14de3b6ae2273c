"""What a search by the clock has measured, kept in a file: one that was killed goes on from it."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.files import read_json, write_json
from obsdiff.ranks import from_rank, rank
from obsdiff.versions import versions

FILE = "latency.json"
FORMAT = 1


@dataclass
class Times:
    """Measurements by what was measured, in the order in which they were made.

    Attributes:
        store: Folder to keep them in; None: nowhere.
        fingerprint: Everything that they depend on, the machine among it.
        found: Per key a list of what was measured and the seconds that it took.
        earlier_s: What those measurements took in earlier runs that this one did not have to repeat.
    """

    store: Path | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    found: dict[str, list[tuple[list[float], float]]] = field(default_factory=dict)
    earlier_s: float = 0.0
    _asked: Counter[str] = field(default_factory=Counter)

    def measure(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        """Seconds of what ``key`` names: the nth call for a key gives its nth measurement, earlier runs' first."""
        known, nth = self.found.setdefault(key, []), self._asked[key]
        self._asked[key] += 1
        if nth < len(known):
            self.earlier_s += known[nth][1]
        else:
            started = time.perf_counter()
            seconds = measure()
            known.append((seconds, time.perf_counter() - started))
        return known[nth][0]

    def save(self) -> None:
        """Write all down, by the first of several processes.

        Raises:
            UserError: The folder cannot be written.
        """
        if self.store is None or rank() > 0:
            return
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "fingerprint": self.fingerprint, "found": self.found}
            write_json(self.store / FILE, content)
        except OSError as error:
            raise UserError(f"cannot write {self.store}: {error.strerror or error}; choose another folder") from error


def open_times(store: Path | None, depends_on: Mapping[str, Any], denoiser: torch.nn.Module) -> Times:
    """The measurements that ``store`` holds of the same things on this machine; none if they are of others.

    Args:
        store: Folder of a scan; None: nothing is kept.
        depends_on: The model and how it is called; JSON-able.
        denoiser: On the device where it is timed.

    Raises:
        UserError: The file is damaged.
    """
    parameter = next(denoiser.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else platform.machine()
    fingerprint = {
        **depends_on,
        "machine": platform.node(),
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype),
        "versions": versions(),
    }
    found = _read(store, fingerprint) if store is not None and rank() == 0 else {}
    return Times(store, fingerprint, from_rank(found))


def _read(store: Path, fingerprint: Mapping[str, Any]) -> dict[str, list[tuple[list[float], float]]]:
    if not (store / FILE).exists():
        return {}
    content = read_json(store / FILE, "times of denoisers")
    try:
        if content["format"] != FORMAT or content["fingerprint"] != fingerprint:
            return {}
        return {
            key: [([float(one) for one in seconds], float(took_s)) for seconds, took_s in measured]
            for key, measured in content["found"].items()
        }
    except MALFORMED as error:
        raise UserError(f"{store / FILE} is damaged: {brief(error)}; delete it and measure again") from None
