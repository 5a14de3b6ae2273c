"""How far the distribution of images is from that of real ones, in the features of one extractor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.diffusion.frechet import factor_of, frechet_between
from obsdiff.evaluation.measures.base import Batch, Figures, Measure

NEIGHBOURS = 3  # of precision and recall, as published
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as published
PART = 1000  # features whose distances to all others are in memory at once: 50,000 by 50,000 are 20 GB


@dataclass(frozen=True)
class Real:
    """What is known of real images.

    Attributes:
        features: Of each, (m, d); None where only their moments are known.
        mean: Of the features, float64 (d,).
        factor: Of their covariance, float64 (r, d).
    """

    features: Tensor | None
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Real:
        """Of features (m, d)."""
        return cls(features, features.double().mean(0), factor_of(features))


class Distribution(Measure):
    """A figure of all features together; none of fewer than two images.

    Args:
        name: What it is called.
        extract: Images (n, c, h, w) in [0, 1] to features (n, d).
        real: What the features are compared with; asked for when it is needed.
    """

    def __init__(self, name: str, extract: Callable[[Tensor], Tensor], real: Callable[[], Real]) -> None:
        super().__init__()
        self.name, self.extract, self.real = name, extract, real

    def rows_of(self, batch: Batch) -> Tensor:
        return batch.features(self.extract)

    def figures(self, rows: Tensor) -> Figures:
        return self.of(rows) if len(rows) > 1 else {}

    def of(self, features: Tensor) -> Figures:
        """The figures of features (n, d), n at least 2."""
        raise NotImplementedError


class Frechet(Distribution):
    """Fréchet distance (1706.08500 eq. 6): FID with Inception's features, FD-DINOv2 with DINOv2's (2306.04675)."""

    def of(self, features: Tensor) -> Figures:
        real = self.real()
        return {self.name: frechet_between(features.mean(0), factor_of(features), real.mean, real.factor)}


class KernelDistance(Distribution):
    """KID, the squared MMD with a cubic kernel over 100 subsets of at most 1,000 (1801.01401), by clean-fid."""

    def of(self, features: Tensor) -> Figures:
        import numpy
        from cleanfid.fid import kernel_distance

        real = self.real().features
        if real is None:
            return {}
        state = numpy.random.get_state()  # clean-fid draws its subsets from the global generator
        numpy.random.seed(0)
        try:
            return {self.name: kernel_distance(real.double().numpy(), features.numpy())}
        finally:
            numpy.random.set_state(state)


class PrecisionRecall(Distribution):
    """Improved precision and recall with 3 neighbours (1904.06991 eq. 1 and 2).

    The share of images within reach of real ones, and of real ones within reach of images."""

    def of(self, features: Tensor) -> Figures:
        real = self.real().features
        if real is None or min(len(real), len(features)) <= NEIGHBOURS:
            return {}
        real = real.double()
        precision, recall = _within(features, real), _within(real, features)
        return {self.name: precision, self.name.replace("precision", "recall", 1): recall}


class MeanDiscrepancy(Distribution):
    """CMMD (2401.09603 eq. 3 with a Gaussian kernel of sigma 10, times 1,000) of features of length 1."""

    def of(self, features: Tensor) -> Figures:
        real = self.real().features
        if real is None:
            return {}
        own, other = (torch.nn.functional.normalize(side.double(), dim=1) for side in (features, real))
        means = [_mean_kernel(a, b) for a, b in ((own, own), (other, other), (own, other))]
        return {self.name: CMMD_SCALE * (means[0] + means[1] - 2 * means[2])}


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    kernel = (torch.exp(-torch.cdist(part, b).square() / (2 * CMMD_SIGMA**2)) for part in a.split(PART))
    return sum(float(part.sum()) for part in kernel) / (len(a) * len(b))


def _within(these: Tensor, those: Tensor) -> float:
    """The share of ``these`` (n, d) that lie no further from one of ``those`` (m, d) than its third neighbour does."""
    # the first neighbour is itself
    radius = torch.cat([torch.cdist(part, those).kthvalue(NEIGHBOURS + 1, dim=1).values for part in those.split(PART)])
    within = [(torch.cdist(part, those) <= radius).any(1) for part in these.split(PART)]
    return float(torch.cat(within).double().mean())
