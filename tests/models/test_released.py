"""Text encoders and autoencoder out of memory: they come back when they are needed, and never wrong in silence."""

import shutil

import pytest
import torch

import obsdiff
from obsdiff.errors import UserError
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.content import RELEASED, component_hashes
from obsdiff.models.info import call_arguments
from obsdiff.models.released import back, doubles, lent, release, released, share
from obsdiff.models.subject import subject_of

PARTS = {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}


@pytest.fixture
def folder(pipe_folder, tmp_path):
    return shutil.copytree(pipe_folder, tmp_path / "pipeline")


@pytest.fixture
def loaded(folder):
    return obsdiff.load_pipeline(folder)


def held_bytes(pipe):
    """In parameters of all models but the denoiser."""
    models = (m for m in pipe.components.values() if isinstance(m, torch.nn.Module) and m is not pipe.transformer)
    return sum(p.untyped_storage().nbytes() for m in models for p in m.parameters())


def test_a_released_pipeline_draws_the_same_and_holds_nothing(loaded, images):
    wanted, hashes = images(loaded), component_hashes(loaded)
    release(loaded)
    assert released(loaded).keys() == PARTS and held_bytes(loaded) == 0
    for _ in range(2):  # the second time the prompts are known already
        assert torch.equal(images(loaded), wanted)
        assert released(loaded).keys() == PARTS and held_bytes(loaded) == 0
    assert component_hashes(loaded) == hashes
    release(loaded)
    assert component_hashes(loaded) == hashes


def test_parts_are_back_one_after_the_other(loaded, monkeypatch):
    release(loaded)
    there = []
    real_encode, real_decode = type(loaded).encode_prompt, type(loaded.vae).decode

    def encode(self, *args, **given):
        there.append(("encode", PARTS - released(self).keys()))
        return real_encode(self, *args, **given)

    def decode(self, *args, **given):
        there.append(("decode", PARTS - released(loaded).keys()))
        return real_decode(self, *args, **given)

    monkeypatch.setattr(type(loaded), "encode_prompt", encode)
    monkeypatch.setattr(type(loaded.vae), "decode", decode)
    with torch.inference_mode():  # as in Lightning's validation
        obsdiff.sample(loaded, ["a two"], [0])
    assert there == [("encode", PARTS), ("decode", {"vae"})]
    assert not any(p.is_inference() for name in PARTS for p in getattr(loaded, name).parameters())
    assert "encode_prompt" not in vars(loaded)


def test_using_a_released_model_fails(loaded):
    release(loaded)
    with pytest.raises(RuntimeError):
        loaded.vae.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises((RuntimeError, ValueError)):
        encode_prompts(loaded, ["a two"], call_arguments(loaded))
    with lent(loaded):
        encode_prompts(loaded, ["a two"], call_arguments(loaded))


def test_saved_and_shared_models_are_whole(loaded, folder, tmp_path, images):
    wanted = images(loaded)
    release(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    second = obsdiff.load_pipeline(folder, parts=doubles(loaded))
    assert held_bytes(second) == 0 and second.vae is not loaded.vae
    second.save_pretrained(tmp_path / "second")
    for name in ("saved", "second"):
        for part in PARTS:
            file = "diffusion_pytorch_model.safetensors" if part == "vae" else "model.safetensors"
            assert (tmp_path / name / part / file).stat().st_size == (folder / part / file).stat().st_size
    third = obsdiff.load_pipeline(folder)
    share(second, third)
    assert not released(second) and second.vae is third.vae
    assert torch.equal(images(second), wanted)


def test_the_pipelines_call_is_recorded_all_the_same(loaded, folder):
    release(loaded)
    wanted = subject_of(obsdiff.load_pipeline(folder)).call[""]
    found = subject_of(loaded).call[""]
    assert torch.equal(found["encoder_hidden_states"], wanted["encoder_hidden_states"])


def test_models_that_have_no_files_stay(pipe, images):
    wanted = images(pipe)
    release(pipe)
    assert not released(pipe) and torch.equal(images(pipe), wanted)


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_files_that_are_gone_or_changed_are_refused(loaded, folder, images, change):
    release(loaded)
    if change == "gone":
        shutil.rmtree(folder / "vae")
    else:
        other = obsdiff.load_pipeline(folder).vae
        torch.nn.init.normal_(other.decoder.conv_out.weight)
        other.save_pretrained(folder / "vae")
    said = "are gone; bring them back" if change == "gone" else "is not what it was when this run began"
    with pytest.raises(UserError, match=f"vae.*{said}"):
        images(loaded)
    assert RELEASED in vars(loaded.vae)
    with pytest.raises(UserError, match=said), back(loaded, ["vae"]):
        pass
