"""The embedded classifier as the reader of images: the digits that prompts ask for, those seen, and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obsdiff.embedded.classifier import load_classifier
from obsdiff.embedded.digits import digit_of_prompt, load_digits
from obsdiff.errors import UserError


def wanted_digits(prompts: Sequence[str]) -> Tensor:
    """The digit each prompt asks for, int64 (n,).

    Raises:
        UserError: A prompt asks for no digit, or for several.
    """
    wanted = []
    for prompt in prompts:
        digit = digit_of_prompt(prompt)
        if digit is None:
            raise UserError(
                f"cannot measure alignment: prompt {prompt!r} names no digit (zero to nine), or several; name other "
                "evaluation prompts"
            )
        wanted.append(digit)
    return torch.tensor(wanted)


@torch.no_grad()
def read_digits(images: Tensor) -> Tensor:
    """The digit seen in each of the images (n, c, h, w) in [0, 1], int64 (n,)."""
    return load_classifier()(images * 2 - 1).argmax(1)


@torch.no_grad()
def digit_features(images: Tensor) -> Tensor:
    """The classifier's features (n, 64) of images (n, c, h, w) in [0, 1]."""
    return load_classifier().features(images * 2 - 1)


@torch.no_grad()
def held_out_features() -> Tensor:
    """The classifier's features (360, 64) of the held-out scans."""
    return load_classifier().features(load_digits("test")[0])
