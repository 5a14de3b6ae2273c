"""Fidelity to the dense model, and intervals."""

from __future__ import annotations

import math
from typing import Any

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


def fidelity(dense: Tensor, pruned: Tensor) -> dict[str, Any]:
    """How far pruned images (n, c, h, w) in [0, 1] are from the dense ones of the same prompts and seeds.

    Returns:
        ``mse`` (mean over images) with ``mse_interval`` (95 % bootstrap over images), ``psnr`` in dB of that mse
        (None for identical images), ``ssim`` (None for images below 11 pixels). All are finite or None: without
        images, or if a pixel is not finite, all are None; in the second case ``not_finite`` counts such images.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    spoilt = int((~(finite_images(dense) & finite_images(pruned))).sum())
    if spoilt or not len(dense):
        nothing: dict[str, Any] = dict.fromkeys(("mse", "mse_interval", "psnr", "ssim"))
        return nothing | ({"not_finite": spoilt} if spoilt else {})
    per_image = (dense.double() - pruned.double()).square().flatten(1).mean(1)
    mse = float(per_image.mean())
    ssim = None
    if min(dense.shape[-2:]) >= 11:
        ssim = float(structural_similarity_index_measure(pruned, dense, data_range=1.0))
    return {
        "mse": mse,
        "mse_interval": list(bootstrap_interval(per_image)),
        "psnr": None if mse == 0 else -10 * math.log10(mse),
        "ssim": ssim,
    }


def finite_images(images: Tensor) -> Tensor:
    """Which images (n, c, h, w) have finite pixels only, bool (n,)."""
    return images.isfinite().flatten(1).all(1)
