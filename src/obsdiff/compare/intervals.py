"""Intervals over seeds and prompts: what is drawn again is first the seeds, then the images within each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return not self.low <= value <= self.high


def mean_interval(values: Sequence[Tensor], seed: int = 0) -> Interval:
    """Of the mean over all images.

    Args:
        values: One value per image, (n,), for each seed.
        seed: Of the bootstrap.
    """
    table = torch.stack([each.double() for each in values])
    return _interval(float(table.mean()), _means([table], seed)[0])


def ratio_interval(values: Sequence[Tensor], others: Sequence[Tensor], seed: int = 0) -> Interval | None:
    """Of the ratio of two means, in pairs: both have the same seeds and images in every draw.

    Args:
        values, others: As for :func:`mean_interval`, of the same seeds, prompts and noise.
        seed: Of the bootstrap.

    Returns:
        None where the denominator is zero.
    """
    tables = [torch.stack([each.double() for each in side]) for side in (values, others)]
    above, below = tables
    if float(below.mean()) == 0:
        return None
    drawn_above, drawn_below = _means(tables, seed)
    return _interval(float(above.mean() / below.mean()), drawn_above / drawn_below.clamp_min(1e-300))


def _means(tables: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Means (draws,) of each table (seeds, images) over the same draws."""
    seeds, images = tables[0].shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(seeds, (DRAWS, seeds), generator=generator)
    within = torch.randint(images, (DRAWS, seeds, images), generator=generator)
    return [table[chosen[..., None], within].mean((1, 2)) for table in tables]


def _interval(value: float, draws: Tensor) -> Interval:
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(value, low, high)
