"""Figures are finite or None, whatever the images are; prompts that cannot be measured are found without images."""

import math

import pytest
import torch

from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.digits import digit_of_prompt, digit_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS, check_measurable

DIGITS = READERS["digits"]
IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


def spoilt(value, image=2):
    images = IMAGES.clone()
    images[image, 0, 3, 5] = value
    return images


def test_an_image_that_is_not_finite_shows_no_digit():
    prompts = digit_prompts()[:10]
    images = torch.full((10, 1, 16, 16), NAN)
    assert DIGITS.hits(images, prompts).tolist() == [0.0] * 10  # whatever class the classifier falls on


def test_the_distance_of_few_or_equal_features_is_finite():
    flat = torch.ones(5, 64)
    assert frechet_distance(flat, flat) == 0
    features = DIGITS.features(IMAGES[:1].expand(5, -1, -1, -1))
    assert math.isfinite(frechet_distance(features, DIGITS.real()))


def test_prompts_that_cannot_be_measured_are_found_without_images():
    check_measurable(["a horse", ""], None)
    check_measurable(digit_prompts(), "digits")
    for prompt in ("a horse", "the digit 7", "a two and a seven", "twenty-one", "sevens"):
        with pytest.raises(UserError, match=r"names no digit .zero to nine., or several"):
            check_measurable(["a seven", prompt], "digits")


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("one of them is a seven.", 7),
        ("Seven, by hand", 7),
        ('the digit "four"', 4),
        ("one", 1),
        ("the number one!", 1),
        ("a two, a real two", 2),
        ("someone wrote six", 6),
        ("a two and a one", None),
        ("twenty-one", None),
        ("", None),
    ],
)
def test_the_digit_of_a_prompt(prompt, digit):
    assert digit_of_prompt(prompt) == digit
