"""What all measures share: they see batches of images and keep a few numbers of each, so that several processes can
measure a part each and no image ever travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from obsdiff.evaluation.intervals import bootstrap_interval

Figures = dict[str, Any]  # by name: floats, intervals [low, high], or shares by group; None where there is no value


@dataclass
class Batch:
    """Some of the images that are measured.

    Attributes:
        numbers: Which they are, int64 (n,).
        images: (n, c, h, w) in [0, 1], finite.
        prompts: What they should show, n of them.
        dense: The dense pipeline's images of the same prompts and seeds, or None.
    """

    numbers: Tensor
    images: Tensor
    prompts: Sequence[str]
    dense: Tensor | None = None
    _features: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def features(self, extract: Callable[[Tensor], Tensor], dense: bool = False) -> Tensor:
        """Features (n, d) of the images, or of the dense ones; computed once, whatever number of measures ask."""
        key = (id(extract), dense)
        if key not in self._features:
            images = self.dense if dense else self.images
            assert images is not None
            self._features[key] = extract(images)
        return self._features[key]


class Measure(Metric):
    """A measure: :meth:`rows_of` says what is kept of each image, :meth:`figures` what all of it comes to.

    Attributes:
        columns: Names of the kept numbers where each is a figure by itself, of which a mean and an interval are
            reported; empty where only all images together have a figure.
    """

    full_state_update = False
    columns: tuple[str, ...] = ()
    numbers: list[Tensor]
    rows: list[Tensor]

    def __init__(self) -> None:
        # whether processes share the images is for the suite to say, which synchronises
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.add_state("numbers", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, batch: Batch) -> None:
        """Take in some images."""
        self.numbers.append(batch.numbers.to(self.device))
        self.rows.append(self.rows_of(batch).double().to(self.device))

    def compute(self) -> Tensor:
        """What was kept of all images of all processes, float64 (n, k), by the number of the image."""
        numbers, rows = dim_zero_cat(self.numbers).cpu(), dim_zero_cat(self.rows).cpu()
        # processes draw equally many, so that some images were drawn twice
        _, first = torch.unique(numbers, return_inverse=True)
        order = torch.empty(int(first.max()) + 1, dtype=torch.long)
        order[first] = torch.arange(len(first))
        return rows[order]

    def kept(self) -> Tensor:
        """The same; torchmetrics makes a single number of a single row with one."""
        return torch.as_tensor(self.compute()).reshape(-1, dim_zero_cat(self.rows).shape[1])

    def rows_of(self, batch: Batch) -> Tensor:
        """What is kept of a batch, (n, k)."""
        raise NotImplementedError

    def figures(self, rows: Tensor) -> Figures:
        """What rows (n, k) of all images come to."""
        found: Figures = {}
        for column, values in zip(self.columns, rows.T, strict=True):
            found[column] = float(values.mean())
            found[f"{column}_interval"] = list(bootstrap_interval(values))
        return found
