"""The embedded pipeline of emoji: genuine, small, and draws what it is asked for."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

import obsdiff
from obsdiff.bench.emoji import main, measure_emoji
from obsdiff.data.prompts import load_prompts
from obsdiff.embedded.autoencoder import mean_squared_error, psnr_db
from obsdiff.embedded.emoji import load_emoji
from obsdiff.models.info import info_of

ASSET = Path(__file__).parents[2] / "data" / "assets" / "emoji-sd3"


@pytest.fixture(scope="module")
def pipe():
    return obsdiff.load_pipeline("emoji-sd3")


def test_it_is_small_and_genuine(pipe):
    assert type(pipe) is StableDiffusion3Pipeline and type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.vae) is AutoencoderKL and len(pipe.transformer.transformer_blocks) == 8
    assert 3_000_000 <= sum(parameter.numel() for parameter in pipe.transformer.parameters()) <= 8_000_000
    assert sum(path.stat().st_size for path in ASSET.rglob("*") if path.is_file()) <= 12_000_000
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        assert all(bool(torch.isfinite(parameter).all()) for parameter in part.parameters())


def test_its_habits_name_the_emoji(pipe):
    info = info_of(pipe)
    assert info.alignment == "emoji"
    assert dict(info.prompts) == {"calibration": "emoji-train", "evaluation": "emoji-heldout"}


def test_its_autoencoder_keeps_pictures(pipe):
    assert psnr_db(mean_squared_error(pipe.vae, load_emoji().images()[::10])) >= 26


def test_its_words_are_whole(pipe):
    words = sorted({word for name in load_emoji().names for word in name.split()})
    split = [word for word in words if len(pipe.tokenizer.tokenize(word)) != 1]
    assert not [word for word in split if not any(sign.isdigit() for sign in word)]
    assert not [word for word in words if len(pipe.tokenizer_3.tokenize(word)) != 1]


def test_it_draws_what_held_out_wordings_ask_for(pipe):
    measured, images = measure_emoji(pipe, load_prompts("emoji-heldout")[:48])
    assert images.shape == (48, 3, 32, 32)
    for key, least in (("top1", 0.9), ("top5", 0.95), ("pixels_top1", 0.9), ("pixels_top5", 0.95)):
        assert measured[key]["share"] >= least, key
    assert sum(group["n"] for group in measured["groups"].values()) == 48


def test_the_command_writes_figures_and_a_grid(tmp_path, capsys):
    main(["--num", "2", "--output", str(tmp_path / "found.json"), "--grid", str(tmp_path / "grid.png")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["n"] == 2 and (tmp_path / "grid.png").stat().st_size > 1000
    assert "top1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--pipeline", str(tmp_path / "nothing"), "--output", str(tmp_path / "other.json")])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
