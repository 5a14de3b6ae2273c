"""A pipeline handed over in train mode, dropout on, is measured in eval mode and comes back as it was."""

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.restart import Restart
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.record import open_trajectories, record_trajectories
from tests.conftest import make_pipe
from tests.obs.same import same_sums


def training_pipe():
    """Dropout in the denoiser and in the text encoders, all modes on but two submodules'."""
    pipe = make_pipe()
    pipe.text_encoder_2.config.attention_dropout = 0.5
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        part.train()
    pipe.transformer.transformer_blocks[1].eval()
    return pipe


def modes(pipe):
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3, pipe.vae)
    return [module.training for part in parts for module in part.modules()]


@pytest.fixture
def pair():
    """The same pipeline in eval mode and in train mode; whose modes are as before at the end."""
    train = training_pipe()
    before = modes(train)
    assert len(set(before)) == 2
    yield make_pipe(), train
    assert modes(train) == before


def test_calibration(pair, prompts):
    found, expected = (obsdiff.calibrate(pipe, prompts[:2]) for pipe in reversed(pair))
    for name in expected:
        assert same_sums(found.sites[name], expected.sites[name])


def test_calibration_that_fails(pair, prompts, monkeypatch):
    monkeypatch.setattr("obsdiff.pruning.calibrate.track", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        obsdiff.calibrate(pair[1], prompts[:2])


def test_recording(pair, prompts, tmp_path):
    expected, found = (
        (record_trajectories(pipe, prompts[:2], tmp_path / str(i)), open_trajectories(tmp_path / str(i)))[1]
        for i, pipe in enumerate(pair)
    )
    assert torch.equal(found.latents, expected.latents)
    assert all(torch.equal(found.embeds[name], expected.embeds[name]) for name in expected.embeds)


def test_probing(pair, prompts):
    outputs = []
    for pipe in pair:
        call = call_arguments(pipe)
        probe = record_probe(subject_of(pipe), encode_prompts(pipe, prompts[:2], call), Settings(call), 4)
        restart = Restart(subject_of(pipe).graph, probe)
        restart.advance(1)
        assert restart.error() == pytest.approx(0.0, abs=1e-12)
        outputs.append(torch.cat(restart.dense))
    assert torch.equal(*outputs)
