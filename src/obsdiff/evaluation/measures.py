"""Fidelity to the dense model, alignment with the prompt, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.errors import UserError
from obsdiff.evaluation.classifier import load_classifier
from obsdiff.evaluation.digits import digit_of_prompt, load_digits

BOOTSTRAPS = 2000


def check_measurable(prompts: Sequence[str], alignment: str | None) -> None:
    """See, before there are images, that they will be measurable.

    Args:
        prompts: Of the evaluation.
        alignment: "digits", or None where nothing reads the images.

    Raises:
        UserError: A prompt asks for no digit, or for several.
    """
    if alignment == "digits":
        _wanted_digits(prompts)


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


def digit_hits(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1.0 where the embedded classifier reads the digit the prompt asks for, 0.0 elsewhere, (n,).

    An image with pixels that are not finite shows no digit.

    Raises:
        UserError: A prompt asks for no digit, or for several.
    """
    wanted = torch.tensor(_wanted_digits(prompts))
    with torch.no_grad():
        read = load_classifier()(images * 2 - 1).argmax(1)
    return ((read == wanted) & finite_images(images)).float()


def digit_frechet(images: Tensor) -> float | None:
    """Fréchet distance of images in [0, 1] to the held-out scans, on the embedded classifier's 64 features.

    None if there are fewer than two images, or one has pixels that are not finite.
    """
    if len(images) < 2 or not bool(finite_images(images).all()):
        return None
    classifier = load_classifier()
    with torch.no_grad():
        return frechet_distance(classifier.features(images * 2 - 1), classifier.features(load_digits("test")[0]))


def _wanted_digits(prompts: Sequence[str]) -> list[int]:
    wanted = []
    for prompt in prompts:
        digit = digit_of_prompt(prompt)
        if digit is None:
            raise UserError(
                f"cannot measure alignment: prompt {prompt!r} names no digit (zero to nine), or several; name other "
                "evaluation prompts"
            )
        wanted.append(digit)
    return wanted
