"""The diagonal of H alone: for methods that need no more, at a cost linear in the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from torch import Tensor

from obsdiff.obs.hessian import Centred


class Diagonal(Centred):
    """Variances and means per channel; :attr:`comoment` is ``Σ α (x − μ)²``, (groups, n)."""

    gives = frozenset({"diagonal"})

    @classmethod
    def shape(cls, groups: int, columns: int) -> tuple[int, ...]:
        return groups, columns

    def accumulate(self, u: Tensor, weight: float) -> None:
        self.comoment += weight * u.square_().sum(1)

    def about(self, centre: Tensor) -> Tensor:
        return self.comoment + self.weight_sum * (self.centre - centre).float().square()

    def variances(self) -> Tensor:
        return self.comoment

    def of_columns(self, columns: Tensor) -> Self:
        kept = columns.to(self.comoment.device)
        return replace(self, comoment=self.comoment[:, kept], centre=self.centre[:, kept], disposable=True)
