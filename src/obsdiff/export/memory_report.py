"""A memory plan as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from obsdiff.allocation.fitting import CONTEXT_BYTES, Planned
from obsdiff.allocation.stage import measures
from obsdiff.numbers import bytes_text
from obsdiff.peaks import Peaks, host_parts
from obsdiff.progress import duration
from obsdiff.ranks import started_processes


def short_plan(planned: Planned) -> str:
    """Two lines for a run that is about to begin."""
    memory = planned.memory
    lines = []
    if memory.device is not None:
        most = memory.device_bytes + CONTEXT_BYTES
        lines.append(f"device memory: about {bytes_text(most)} while {memory.device.name}")
    parts = host_parts(memory.host, memory.on_host)
    lines.append(f"host memory: about {bytes_text(memory.host_bytes)} while {memory.host.name} ({_listed(parts)})")
    if planned.time is not None:
        lines[-1] += f"; about {duration(planned.time.total_s)}"
    if on_disk := memory.batches.on_disk:
        lines.append(f"recorded calls wait on the disk: {bytes_text(on_disk)}")
    if resting := memory.resting_bytes:
        lines.append(f"weights rest on the disk: {bytes_text(resting)}")
    return "\n".join(lines)


def full_plan(planned: Planned) -> str:
    """All that is known: what was chosen, each moment's parts, disk and time."""
    memory, batches = planned.memory, planned.memory.batches
    options = planned.options
    passes = len(batches.packages)
    how = "stage by stage" if batches.recorded else f"{passes} pass{'es' if passes > 1 else ''}"
    calibration = f"{planned.prompts} prompts x {planned.steps} steps in batches of {batches.prompts}, {how}"
    if not measures(options, None if options.statistics is None else Path(options.statistics)):
        calibration = "none"
    lines = [
        f"{options.pipeline}: {options.plan or options.pattern} by {options.method}, planned without weights",
        "",
        f"calibration: {calibration}; evaluation: 2 x {options.evaluation.num_images} images in batches of "
        f"{batches.images}",
        *([f"chosen to fit: {planned.chosen}"] if planned.chosen else []),
        "weights: " + ", ".join(f"{name} {bytes_text(size)}" for name, size in planned.shapes.weights.items()),
        "",
        *moment_table(memory),
        "",
        *most_lines(memory),
    ]
    store = f", statistics {bytes_text(memory.store_bytes)}" if memory.store_bytes else ""
    kept = f", solves and dense weights meanwhile {bytes_text(memory.kept_bytes)}" if memory.kept_bytes else ""
    calls = f", recorded calls meanwhile {bytes_text(batches.on_disk)}" if batches.on_disk else ""
    rest = f", resting weights meanwhile {bytes_text(memory.resting_bytes)}" if memory.resting_bytes else ""
    lines.append(f"disk: output {bytes_text(memory.output_bytes)}{store}{kept}{calls}{rest}")
    lines.append(f"time: {_time(planned)}")
    if started_processes() > 1:
        lines.append("note: memory is that of each process, what lies on the disk of all")
    lines += [f"note: {note}" for note in planned.notes]
    return "\n".join(lines)


def most_lines(memory: Peaks) -> list[str]:
    """The most on the device, where that is not the host, and on the host, and when."""
    lines = []
    if memory.device is not None:
        most = memory.device_bytes + CONTEXT_BYTES
        assumed = f"{bytes_text(CONTEXT_BYTES)} of context assumed with it"
        lines.append(f"device memory: {bytes_text(most)} while {memory.device.name} ({assumed})")
    return [*lines, f"host memory: {bytes_text(memory.host_bytes)} while {memory.host.name}"]


def _time(planned: Planned) -> str:
    if planned.time is None:
        return "unknown: the device is not on this machine"
    stages = {
        "calibrating": planned.time.calibrate_s,
        "scanning": planned.time.scan_s,
        "solving": planned.time.solve_s,
        "drawing": planned.time.draw_s,
    }
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items() if seconds)
    shared = (
        f" by {count} processes, if each computes as fast as one alone" if (count := started_processes()) > 1 else ""
    )
    return f"about {duration(planned.time.total_s)} on this machine{shared} ({listed})"


def moment_table(memory: Peaks) -> list[str]:
    """The largest moment of each kind, and its parts."""
    rows: dict[str, tuple[int, int, str]] = {}
    for moment in memory.moments:
        host = host_parts(moment, memory.on_host)
        device = 0 if memory.on_host else sum(moment.device.values())
        parts = _listed({**host, **({} if memory.on_host else moment.device)})
        kind = moment.name.split(" ", 1)[0] if moment.name.startswith("solving") else moment.name
        if kind not in rows or (device, sum(host.values())) > rows[kind][:2]:
            rows[kind] = device, sum(host.values()), parts
    width = max(map(len, rows))
    head = f"{'':<{width}}  " + ("" if memory.on_host else f"{'device':>9}  ") + f"{'host':>9}  parts"
    found = [head]
    for kind, (device, total, parts) in rows.items():
        own = "" if memory.on_host else f"{bytes_text(device):>9}  "
        found.append(f"{kind:<{width}}  {own}{bytes_text(total):>9}  {parts}")
    return found


def _listed(parts: Mapping[str, int]) -> str:
    """The parts, largest first, without those that do not matter."""
    most = max(sum(parts.values()), 1)
    some = sorted(((size, part) for part, size in parts.items() if size > most / 200), reverse=True)
    return ", ".join(f"{part} {bytes_text(size)}" for size, part in some)
