import math

import numpy as np
import pytest
import scipy.linalg
import torch

import obsdiff
from obsdiff.diffusion.flow import add_noise, loss_per_sample, sample_sigmas
from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.classifier import load_classifier
from obsdiff.embedded.digits import load_digits
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.intervals import bootstrap_interval
from obsdiff.evaluation.sampling import cycle_prompts, sample
from obsdiff.models.subject import subject_of
from tests.conftest import CALL, make_pipe


def test_frechet_distance_equals_the_textbook_formula():
    generator = np.random.default_rng(0)
    a, b = (
        generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)),
        generator.normal(1, 2, size=(150, 6)),
    )
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0.0, abs=1e-8)
    few = torch.tensor(a[:3])  # fewer samples than dimensions
    assert math.isfinite(frechet_distance(few, torch.tensor(b)))


def test_bootstrap_interval_covers_the_mean_at_its_rate():
    inside = 0
    for seed in range(100):
        values = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        low, high = bootstrap_interval(values, seed)
        inside += low <= 0 <= high
    assert 85 <= inside <= 100


def test_classifier_reads_the_held_out_scans():
    images, labels = load_digits("test")
    accuracy = float((load_classifier()(images).argmax(1) == labels).float().mean())
    assert accuracy >= 0.97


def test_digit_hits_and_frechet():
    images, labels = load_digits("test")
    from obsdiff.embedded.digits import DIGIT_WORDS

    prompts = [f"a picture of the digit {DIGIT_WORDS[label]}" for label in labels]
    unit = (images + 1) / 2
    assert float(READERS["digits"].hits(unit, prompts).mean()) >= 0.97
    assert float(READERS["digits"].hits(unit, prompts[1:] + prompts[:1]).mean()) < 0.3
    features, real = READERS["digits"].features, READERS["digits"].real()
    assert frechet_distance(features(unit), real) < 1e-6 < frechet_distance(features(torch.rand_like(unit)), real)
    with pytest.raises(UserError, match="names no digit"):
        READERS["digits"].hits(unit[:1], ["a horse"])


def test_flow_matching_reaches_data_and_noise():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(add_noise(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(3)), noise)
    assert torch.equal(loss_per_sample(noise - x0, x0, noise), torch.zeros(3))
    sigmas = sample_sigmas(1000, torch.Generator().manual_seed(0))
    assert float(sigmas.min()) > 0 and float(sigmas.max()) < 1 and abs(float(sigmas.mean()) - 0.5) < 0.05


def test_an_image_depends_on_its_own_seed_only(pipe):
    prompts = ["the digit two", "a seven", "the number one"]
    together = sample(pipe, prompts, [4, 5, 6], batch_size=3)
    alone = sample(pipe, prompts[1:2], [5], batch_size=1)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert cycle_prompts(prompts, 5) == [*prompts, *prompts[:2]]


def test_flops_equal_a_count_by_hand():
    """One block's linear layers counted by hand are part of the total, and shrinking lowers it by what was cut."""
    pipe = make_pipe()
    dense = denoiser_flops(subject_of(pipe), CALL)
    obsdiff.prune(pipe, "structured:heads=0,ffn=0.5", method="random")
    width, removed, tokens = 16, 32, 16 + 20
    assert dense - denoiser_flops(subject_of(pipe), CALL) == 2 * 2 * tokens * width * removed
