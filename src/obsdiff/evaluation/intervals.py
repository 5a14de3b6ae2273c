"""How sure the mean of a few images is."""

from __future__ import annotations

import torch
from torch import Tensor

BOOTSTRAPS = 2000


def bootstrap_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of per-image values (n,), n at least 1."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (BOOTSTRAPS, len(values)), generator=generator)
    means = values.double()[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def finite_images(images: Tensor) -> Tensor:
    """Which images (n, c, h, w) have finite pixels only, bool (n,)."""
    return images.isfinite().flatten(1).all(1)
