"""The plots of a comparison's page: image error by pattern, and by what was spent for it."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from obsdiff.compare.options import CompareOptions
from obsdiff.compare.table import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "o^sDvP*X"
COLUMNS = 2  # panels beside each other


def draw_patterns(lines: Sequence[Line], options: CompareOptions) -> str:
    """Image error by pattern, one panel per recovery, with intervals: a picture as a data URL."""
    recipes = list(dict.fromkeys(line.recipe for line in lines))
    figure = _figure(11, 0.6 + 3.6 * len(recipes))
    panels = figure.subplots(len(recipes), 1, squeeze=False, sharey=True, sharex=True)[:, 0]
    colours = _colours(options)
    kinds = [(rule, *what) for rule in options.allocations for what in colours]
    for panel, recipe in zip(panels, recipes, strict=True):
        for at, (rule, *what) in enumerate(kinds):
            own = (recipe, rule, *what)
            found = [line for line in lines if (line.recipe, line.allocation, line.method, line.variant) == own]
            found = [line for line in found if line.mse is not None and line.mse.low > 0]
            if not found:
                continue
            shift = (at - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
            _mark(
                panel,
                [options.patterns.index(line.pattern) + shift for line in found],
                found,
                MARKERS[options.allocations.index(rule) % len(MARKERS)],
                colours[what[0], what[1]],
                ", ".join(filter(None, [*what, rule if len(options.allocations) > 1 else ""])),
            )
        panel.set_yscale("log")
        panel.set_ylabel(f"MSE to dense\n{recipe}")
        labels = [pattern.replace(" ", "\n") for pattern in options.patterns]  # a budget below its pattern
        panel.set_xticks(range(len(labels)), labels, fontsize=10 if len(labels) <= 6 else 7)
        panel.set_xlim(-0.5, len(options.patterns) - 0.5)
        panel.grid(axis="y", alpha=0.3)
        for border in range(1, len(options.patterns)):
            panel.axvline(border - 0.5, color="0.85", linewidth=1)
    panels[0].legend(fontsize=8, ncols=min(6, len(kinds)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _drawn(figure)


def draw_costs(lines: Sequence[Line], options: CompareOptions) -> str | None:
    """Image error by denoiser FLOPs spent, one panel per pattern: a picture as a data URL; None if nothing cost any.

    Calibration, scan, recording and training count. What cost nothing stands at the left border.
    """
    from matplotlib.ticker import NullFormatter

    spent = [line.flops for line in lines if line.flops > 0]
    if not spent:
        return None
    patterns = [pattern for pattern in options.patterns if any(line.pattern == pattern for line in lines)]
    rows = math.ceil(len(patterns) / COLUMNS)
    figure = _figure(11, 0.9 + 3 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).flatten()
    colours = _colours(options)
    settings = list(dict.fromkeys((line.recipe, line.allocation) for line in lines))
    border = min(spent) / 2
    for panel, pattern in itertools.zip_longest(panels, patterns):
        if pattern is None:
            panel.set_axis_off()
            continue
        for line in lines:
            if line.pattern == pattern and line.mse is not None and line.mse.low > 0:
                marker = MARKERS[settings.index((line.recipe, line.allocation)) % len(MARKERS)]
                _mark(panel, [max(line.flops, border)], [line], marker, colours[line.method, line.variant])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())  # its labels would stand on one another
        panel.set_title(pattern, fontsize=9)
        panel.set_ylabel("MSE to dense")
        panel.grid(alpha=0.3)
    for panel in panels[max(0, len(patterns) - COLUMNS) : len(patterns)]:
        panel.set_xlabel("denoiser FLOPs spent")
        panel.tick_params(labelbottom=True)
    named = [(", ".join(filter(None, what)), colour, "o") for what, colour in colours.items()]
    named += [(_setting(*what, options), "0.4", MARKERS[at % len(MARKERS)]) for at, what in enumerate(settings)]
    _legend(figure, named)
    return _drawn(figure)


def _setting(recipe: str, allocation: str, options: CompareOptions) -> str:
    return f"{recipe}, {allocation}" if len(options.allocations) > 1 else recipe


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _colours(options: CompareOptions) -> dict[tuple[str, str], Any]:
    """Of each method and variant."""
    from matplotlib import colormaps

    kinds = list(itertools.product(options.methods, list(options.variants) or [""]))
    palette: Any = colormaps["tab10" if len(kinds) <= 10 else "tab20"]
    return dict(zip(kinds, itertools.cycle(palette.colors), strict=False))


def _mark(panel: Any, places: Sequence[float], lines: Sequence[Line], marker: str, colour: Any, name: str = "") -> None:
    """Image errors with their intervals."""
    marks = [line.mse for line in lines if line.mse is not None]
    panel.errorbar(
        places,
        [mark.value for mark in marks],
        [[mark.value - mark.low for mark in marks], [mark.high - mark.value for mark in marks]],
        fmt=marker,
        color=colour,
        markersize=5,
        capsize=2,
        label=name or None,
    )


def _legend(figure: Figure, named: Sequence[tuple[str, Any, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)
        for name, colour, marker in named
    ]
    figure.legend(handles=handles, fontsize=8, ncols=min(6, len(handles)), loc="outside upper center")


def _drawn(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return data_url(stream.getvalue(), "png")


def data_url(content: bytes, kind: str) -> str:
    """An image as a page holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
