"""Figures are finite or None, whatever the images are; prompts that cannot be measured are found without images."""

import json
import math

import pytest
import torch

from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.digits import digit_of_prompt, digit_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS, check_measurable
from obsdiff.evaluation.measures import fidelity

DIGITS = READERS["digits"]
IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


def spoilt(value, image=2):
    images = IMAGES.clone()
    images[image, 0, 3, 5] = value
    return images


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_images_that_are_not_finite_have_no_fidelity(value):
    nothing = {"mse": None, "mse_interval": None, "psnr": None, "ssim": None, "not_finite": 1}
    assert fidelity(IMAGES, spoilt(value)) == fidelity(spoilt(value), IMAGES) == nothing
    assert fidelity(spoilt(value, 0), spoilt(value, 1))["not_finite"] == 2
    assert DIGITS.frechet(spoilt(value)) is None


def test_fidelity_of_few_and_small_images():
    assert fidelity(IMAGES[:0], IMAGES[:0]) == {"mse": None, "mse_interval": None, "psnr": None, "ssim": None}
    one = fidelity(IMAGES[:1], IMAGES[1:2])
    assert one["mse_interval"] == [one["mse"], one["mse"]] and math.isfinite(one["ssim"])
    for side in (10, 11):
        found = fidelity(IMAGES[..., :side, :side], 1 - IMAGES[..., :side, :side])
        assert (found["ssim"] is None) == (side == 10) and found["mse"] > 0
    black = torch.zeros(2, 3, 16, 16)
    same = fidelity(black, black)
    assert same == {"mse": 0.0, "mse_interval": [0.0, 0.0], "psnr": None, "ssim": 1.0}
    assert fidelity(black, black + 1)["mse"] == 1 and fidelity(black, black + 1)["psnr"] == 0
    json.dumps([one, same], allow_nan=False)


def test_an_image_that_is_not_finite_shows_no_digit():
    prompts = digit_prompts()[:10]
    images = torch.full((10, 1, 16, 16), NAN)
    assert DIGITS.hits(images, prompts).tolist() == [0.0] * 10  # whatever class the classifier falls on


def test_frechet_distance_needs_two_images():
    assert DIGITS.frechet(IMAGES[:0]) is None and DIGITS.frechet(IMAGES[:1]) is None
    assert math.isfinite(DIGITS.frechet(IMAGES[:2]))
    same = IMAGES[:1].expand(5, -1, -1, -1)
    assert math.isfinite(DIGITS.frechet(same))
    flat = torch.ones(5, 64)
    assert frechet_distance(flat, flat) == 0


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
