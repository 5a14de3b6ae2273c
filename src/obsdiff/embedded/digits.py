"""Handwritten digits with written prompts: scikit-learn's 1,797 real scans of 8 x 8 pixels.

Images are float32 in [-1, 1], shape (1, 16, 16): the scans resized bilinearly, so that an autoencoder has something
to compress. The split is fixed by ``SPLIT_SEED`` and shared by the pipeline, the classifier and every evaluation.
"""

from __future__ import annotations

import re

import torch

IMAGE_SIZE = 16
SPLIT_SEED = 0
NUM_TEST = 360

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_WORDINGS = (
    "a handwritten digit {}",
    "a handwritten {}",
    "the digit {}",
    "the number {}",
    "a scan of the digit {}",
    "a small picture of the number {}",
    "handwriting of the number {}",
    "a gray image showing a {}",
    "someone wrote the digit {}",
    "a {} written by hand",
    "one pen stroke drawing of the digit {}",
    "{}",
)
HELD_OUT_WORDINGS = (
    "a picture of the digit {}",
    "a small scan of a handwritten {}",
    "the number {} written by hand",
    "an image of the handwritten digit {}",
)


def digit_prompts(wordings: tuple[str, ...] = TRAIN_WORDINGS) -> list[str]:
    """All prompts of these wordings, digits running fastest, so that any first 10 k prompts are class-balanced."""
    return [wording.format(word) for wording in wordings for word in DIGIT_WORDS]


def digit_of_prompt(prompt: str) -> int | None:
    """The digit a prompt asks for: its last digit word; None if it has none, or asks for several.

    An earlier "one" may be a pronoun and does not count. Punctuation ends a word, a hyphen does not ("twenty-one").
    """
    found = [DIGIT_WORDS.index(word) for word in re.findall(r"[\w-]+", prompt.lower()) if word in DIGIT_WORDS]
    several = {digit for digit in found if digit != DIGIT_WORDS.index("one")} - set(found[-1:])
    return found[-1] if found and not several else None


def load_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of ``split`` ("train" or "test"): images (n, 1, 16, 16) in [-1, 1] and labels (n,) int64."""
    from sklearn.datasets import load_digits as load_scans

    scans = load_scans()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=IMAGE_SIZE, mode="bilinear", antialias=True)
    labels = torch.tensor(scans.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = {"test": order[:NUM_TEST], "train": order[NUM_TEST:]}[split]
    return images[chosen].clamp(-1, 1), labels[chosen]
