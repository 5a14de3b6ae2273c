"""Rows of a comparison as the lines that people read: means over seeds, intervals, and the ratio to one method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.compare.cells import ONE_SHOT
from obsdiff.compare.intervals import Interval, mean_interval, ratio_interval
from obsdiff.evaluation.evaluate import result_of

Row = Mapping[str, Any]
WHAT = ("pattern", "recipe", "allocation", "method", "variant")


@dataclass(frozen=True)
class DenseLine:
    """What the dense pipeline draws, means over seeds; None where nothing measured it.

    Attributes:
        alignment, top5, frechet: As in :class:`Line`; the interval of the distance is over seeds.
        parameters, flops: Of its denoiser, and of one call of it with one image.
        bytes: Of the pipeline's weights.
    """

    alignment: float | None
    top5: float | None
    frechet: Interval | None
    parameters: float | None
    flops: float | None
    bytes: float | None


@dataclass(frozen=True)
class Line:
    """One method, pattern, allocation, variant and recovery, over all seeds.

    Attributes:
        pattern, recipe, allocation, method, variant: What was done.
        rows: Of each seed, finished ones only.
        mse: To the dense images.
        ratio: Of the mse to that of the reference that is the same otherwise; None for the reference itself and where
            it is not there.
        alignment, top5: Share of images that show what was asked for; None where nothing reads them.
        perceptual: Mean distance in the reader's features, if it has such.
        layer_error: Mean relative output error of the pruned layers, before any training; None after it, or where
            nothing was measured.
        frechet: Mean over seeds; its interval draws seeds alone, each being the distance of a whole set of images.
        flops: Spent in denoisers on all of it, mean over seeds.
        wall_s: The same in seconds.
        remark: What should not be overlooked, or nothing.
    """

    pattern: str
    recipe: str
    allocation: str
    method: str
    variant: str
    rows: Sequence[Row]
    mse: Interval | None
    ratio: Interval | None
    alignment: Interval | None
    top5: Interval | None
    perceptual: float | None
    layer_error: float | None
    frechet: Interval | None
    flops: float
    wall_s: float
    remark: str = ""

    def mean(self, *path: str) -> float | None:
        """Of a figure of the rows, over seeds; None if one has none."""
        return _mean(self.rows, *path)


def lines_of(rows: Sequence[Row], reference: tuple[str, str]) -> list[Line]:
    """The lines, in the order in which their first rows come.

    Args:
        rows: Contents of finished and failed rows; failed ones are left out.
        reference: One of :data:`WHAT` and its value in the lines that the others are compared with.
    """
    held: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["error"] is None:
            held.setdefault(tuple(row[key] for key in WHAT), []).append(row)
    at, value = WHAT.index(reference[0]), reference[1]
    return [_line(what, found, held.get((*what[:at], value, *what[at + 1 :]), [])) for what, found in held.items()]


def _line(what: tuple[str, ...], rows: list[Row], others: list[Row]) -> Line:
    pattern, recipe, allocation, method, variant = what
    mse = _interval(rows, "mse")
    ratio = None
    if others and others is not rows and mse is not None and _interval(others, "mse") is not None:
        shared = [(row, other) for row in rows for other in others if row["seed"] == other["seed"]]
        if shared:
            ratio = ratio_interval(
                [_values(own, "mse") for own, _ in shared], [_values(ref, "mse") for _, ref in shared]
            )
    frechet, other = _over_seeds(rows, "frechet"), _over_seeds(others, "frechet")
    remark = ""
    if (
        ratio is not None
        and ratio.low > 1
        and frechet is not None
        and other is not None
        and frechet.value < other.value
    ):
        remark = "its Fréchet distance is lower although its images are further from the dense ones"
    costs = [cost for row in rows for cost in row["costs"].values()]
    return Line(
        pattern,
        recipe,
        allocation,
        method,
        variant,
        rows,
        mse,
        ratio,
        _interval(rows, "alignment"),
        _interval(rows, "alignment_top5"),
        _mean_of(_figures(rows, "distance")),
        _mean(rows, "layer_error") if recipe == ONE_SHOT else None,
        frechet,
        sum(cost["denoiser_flops"] for cost in costs) / len(rows),
        sum(cost["wall_s"] for cost in costs) / len(rows),
        remark,
    )


def dense_of(rows: Sequence[Row]) -> DenseLine:
    """What the rows of a line started from.

    Args:
        rows: Of each seed.
    """
    figures = [row["evaluation"]["dense"] for row in rows]
    mean = {name: _mean_of([found.get(name) for found in figures]) for name in ("alignment", "alignment_top5")}
    frechet = _interval_of([found.get("frechet") for found in figures])
    sizes = [_mean(rows, what, "dense") for what in ("parameters", "flops", "bytes")]
    return DenseLine(mean["alignment"], mean["alignment_top5"], frechet, *sizes)


def _values(row: Row, measure: str) -> Tensor:
    return torch.tensor(row["per_image"][measure], dtype=torch.float64)


def _interval(rows: Sequence[Row], measure: str) -> Interval | None:
    """None where a row was not measured so, or an image was not finite."""
    if any(measure not in row["per_image"] or None in row["per_image"][measure] for row in rows):
        return None
    return mean_interval([_values(row, measure) for row in rows])


def _figures(rows: Sequence[Row], name: str) -> list[Any]:
    """Of what came out, one for each seed."""
    return [result_of(row["evaluation"]).get(name) for row in rows]


def _over_seeds(rows: Sequence[Row], name: str) -> Interval | None:
    return _interval_of(_figures(rows, name))


def _interval_of(values: Sequence[Any]) -> Interval | None:
    """Over seeds; None if there is none, or one of them is."""
    if not values or None in values:
        return None
    return mean_interval([torch.tensor([value], dtype=torch.float64) for value in values])


def _mean_of(values: Sequence[Any]) -> float | None:
    """None if there is none, or one of them is."""
    return sum(values) / len(values) if values and None not in values else None


def _mean(rows: Sequence[Row], *path: str) -> float | None:
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = None if value is None else value.get(key)
        values.append(value)
    return _mean_of(values)
