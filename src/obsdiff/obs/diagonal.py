"""The diagonal of H alone: for methods that need no more, at a cost linear in the inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from torch import Tensor

from obsdiff.obs.hessian import Centred


class Diagonal(Centred):
    """Variances and means per channel; :attr:`comoment` is ``Σ α (x − μ)²``, one part (groups, n)."""

    gives = frozenset({"diagonal"})

    @classmethod
    def shapes(cls, groups: int, columns: int, device_type: str = "cpu") -> list[tuple[int, ...]]:
        return [(groups, columns)]

    def accumulate(self, u: Tensor, weight: float) -> None:
        self.comoment[0] += weight * u.square_().sum(1)

    def about(self, centre: Tensor) -> list[Tensor]:
        return [self.variances() + self.weight_sum * (self.centre - centre).float().square()]

    def variances(self) -> Tensor:
        return self.comoment[0]

    def of_columns(self, columns: Tensor) -> Self:
        kept = columns.to(self.centre.device)
        return replace(self, comoment=[self.variances()[:, kept]], centre=self.centre[:, kept], disposable=True)
