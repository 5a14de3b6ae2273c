"""What a comparison ends in: ``results.jsonl``, ``report.md`` and a self-contained ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from obsdiff.compare.cells import ONE_SHOT, LeftOut
from obsdiff.compare.intervals import Interval
from obsdiff.compare.options import CompareOptions
from obsdiff.compare.pictures import data_url, draw_costs, draw_patterns
from obsdiff.compare.table import WHAT, Row, dense_of, lines_of
from obsdiff.export.summary import amount, memory
from obsdiff.files import write_text
from obsdiff.progress import duration

RESULTS, MARKDOWN, PAGE = "results.jsonl", "report.md", "report.html"
INCIDENTAL = ("jobs", "devices", "part", "shown")  # options that change no figure


def write_report(options: CompareOptions, rows: Sequence[Row], left_out: Sequence[LeftOut], cells: Path) -> None:
    """Write the three files, each whole.

    Args:
        options: Of the comparison.
        rows: All rows that are there, failed ones too.
        left_out: Combinations that cannot be.
        cells: The folder that their images lie in.
    """
    output = Path(options.output)
    write_text(output / RESULTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    variants = list(options.variants) or [""]
    order = [options.patterns, [ONE_SHOT, *options.recipes], options.allocations, options.methods, variants]
    lines = sorted(
        lines_of(rows, options.compared_with),
        key=lambda line: [names.index(getattr(line, what)) for names, what in zip(order, WHAT, strict=True)],
    )
    by_pattern = {pattern: [line for line in lines if line.pattern == pattern] for pattern in options.patterns}
    shown = {
        "options": options,
        "axis": options.compared_with[0],
        "reference": options.compared_with[1],
        "settings": settings_text(options),
        "patterns": by_pattern,
        # columns that say something
        "smaller": {
            pattern: any(line.mean("flops", "pruned") != line.mean("flops", "dense") for line in lines_of_it)
            for pattern, lines_of_it in by_pattern.items()
        },
        "ranked": any(line.top5 is not None for line in lines),
        "failed": [row for row in rows if row["error"] is not None],
        "left_out": left_out,
        "one_shot": ONE_SHOT,
        "versions": versions_of(rows),
        "dense": dense_of(lines[0].rows) if lines else None,
        "n": sum(lines[0].rows[at]["evaluation"]["n"] for at in range(len(lines[0].rows))) if lines else 0,
    }
    environment = Environment(
        loader=PackageLoader("obsdiff.compare", "templates"),
        autoescape=lambda name: str(name).endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "interval": interval_text,
        "percent": lambda value: "" if value is None else percent_text(value),
        "number": lambda value: "" if value is None else f"{value:.3g}",
        "amount": lambda value: "" if value is None else amount(float(value)),
        "memory": lambda value: "" if value is None else memory(float(value)),
        "duration": duration,
        "picture": lambda name: _embedded(cells / name, "png"),
    }
    write_text(output / MARKDOWN, environment.get_template(MARKDOWN).render(shown))
    plots = {
        "image error of each method by pattern": draw_patterns(lines, options) if lines else None,
        "image error by denoiser FLOPs spent": draw_costs(lines, options) if lines else None,
    }
    plots = {what: plot for what, plot in plots.items() if plot is not None}
    write_text(output / PAGE, environment.get_template(PAGE).render(shown, plots=plots))


def settings_text(options: CompareOptions) -> str:
    """The configuration that repeats the comparison, as YAML."""
    kept = {key: _plain(value) for key, value in asdict(options).items() if key not in INCIDENTAL}
    return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100))


def _plain(value: Any) -> Any:
    """Without what was left at its default of None, which says nothing."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return value


def versions_of(rows: Sequence[Row]) -> list[str]:
    """Which versions the rows were made with; one line each where there are several."""
    return list(dict.fromkeys(", ".join(f"{key} {value}" for key, value in row["versions"].items()) for row in rows))


def interval_text(interval: Interval | None) -> str:
    """A value and, in brackets, its interval."""
    if interval is None:
        return ""
    if interval.low == interval.high:
        return f"{interval.value:.3g}"
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def percent_text(interval: Interval | float) -> str:
    """The same in percent."""
    if isinstance(interval, Interval):
        if interval.low == interval.high:
            return f"{interval.value:.1%}"
        return f"{interval.value:.1%} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{interval:.1%}"


def _embedded(file: Path, kind: str) -> str:
    return data_url(file.read_bytes(), kind)
