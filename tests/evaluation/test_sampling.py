"""Requests that cannot be drawn, images that are not finite, dropout, and files that are written whole."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from obsdiff import files
from obsdiff.allocation import stage
from obsdiff.cli.main import main
from obsdiff.errors import UserError
from obsdiff.evaluation import sampling
from obsdiff.evaluation.references import draw, sample_shared
from obsdiff.evaluation.sampling import check_request, image_files, sample, save_images
from obsdiff.export import run
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions

PROMPTS, SEEDS = ["the digit two", "a seven"], [5, 6]


def spoil(pipe, value=float("nan")):
    """A pipeline that can only draw NaN."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(value)
    return pipe


def test_an_image_that_is_not_finite_is_an_error_that_names_it(pipe):
    with pytest.raises(UserError, match=r"2 of 2 images .*not finite.*'the digit two', seed 5; try float32"):
        sample(spoil(pipe), PROMPTS, SEEDS)
    assert bool(sample(pipe, PROMPTS, SEEDS, allow_nonfinite=True).isnan().all())
    with pytest.raises(UserError, match="not finite"):
        sample_shared(pipe, PROMPTS, SEEDS, 2)
    assert bool(sample_shared(pipe, PROMPTS, SEEDS, 2, allow_nonfinite=True).isnan().all())
    with pytest.raises(UserError, match="not finite"):
        draw(pipe, PROMPTS, SEEDS, 2, None)
    assert bool(draw(pipe, PROMPTS, SEEDS, 2, "digits", allow_nonfinite=True).unguided.isnan().all())


def test_a_prune_stops_after_the_dense_images(pipe, tmp_path, monkeypatch):
    def calibrate(*_, **__):
        raise AssertionError("calibrates although the dense images are not finite")

    monkeypatch.setattr(stage, "calibrate", calibrate)
    options = PruneOptions(
        pipeline="tiny",
        output=str(tmp_path / "out"),
        calibration=CalibrationOptions(num_prompts=2),
        evaluation=EvaluationOptions(num_images=2),
    )
    with pytest.raises(UserError, match="not finite"):
        run.prune_run(spoil(pipe), options, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_models_in_train_mode_draw_as_in_eval_mode(pipe):
    assert pipe.text_encoder_3.config.dropout_rate > 0
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        model.eval()
    expected = sample(pipe, PROMPTS, SEEDS)
    pipe.text_encoder_3.train()
    pipe.transformer.train()
    assert torch.equal(sample(pipe, PROMPTS, SEEDS), expected)
    assert pipe.text_encoder_3.training and pipe.transformer.training and not pipe.vae.training
    with pytest.raises(UserError):
        sample(spoil(pipe), PROMPTS, SEEDS)
    assert pipe.text_encoder_3.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "the digit two"}, "prompts is one text"),
        ({"prompts": [], "seeds": []}, "no prompt"),
        ({"prompts": ["a", None]}, "a prompt is None"),
        ({"seeds": [1]}, "2 prompts and 1 seeds"),
        ({"seeds": [1, -1]}, "a noise seed is -1"),
        ({"seeds": [1, 2**63]}, "a noise seed is 9223372036854775808"),
        ({"seeds": [1, 1.5]}, "a noise seed is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"call": {"num_inference_steps": 0}}, "num_inference_steps is 0"),
        ({"call": {"num_inference_steps": -3}}, "num_inference_steps is -3"),
        ({"call": {"num_inference_steps": 2.5}}, "num_inference_steps is 2.5"),
        ({"call": {"num_inference_steps": 10**9}}, "num_inference_steps is 1000000000"),
        ({"call": {"guidance_scale": float("nan")}}, "guidance_scale is nan"),
        ({"call": {"guidance_scale": float("inf")}}, "guidance_scale is inf"),
        ({"call": {"guidance_scale": "2"}}, "guidance_scale is '2'"),
    ],
)
def test_requests_are_checked_before_anything_is_drawn(changes, message):
    """There is no pipeline at all."""
    with pytest.raises(UserError, match=re.escape(message)):
        sample(None, **{"prompts": PROMPTS, "seeds": SEEDS, **changes})


def test_the_ends_of_the_ranges_are_drawn(pipe):
    check_request(PROMPTS, [0, 2**63 - 1], 1, {"guidance_scale": None, "num_inference_steps": None})
    assert sample(pipe, ["", "a"], [0, 2**63 - 1], call={"num_inference_steps": 1}).shape == (2, 1, 16, 16)


def test_what_the_pipeline_refuses_is_one_line(pipe):
    with pytest.raises(UserError, match=r"tiny cannot draw with .*'height': 15.*divisible") as error:
        sample(pipe, PROMPTS, SEEDS, call={"height": 15})
    assert "\n" not in str(error.value)


def test_outputs_that_cannot_be_written_are_refused_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for output, count, message in (
        (tmp_path / "folder.png", 1, "is a folder"),
        (tmp_path / "file" / "a.png", 1, "is not a folder"),
        (tmp_path / "file" / "deep" / "a.png", 1, "is not a folder"),
        (tmp_path / "file", 2, "is not a folder"),
        (tmp_path / ("x" * 300 + ".png"), 1, "too long a name"),
        (tmp_path / "a\0b.png", 1, "null character"),
        ("/proc/nothing/a.png", 1, "cannot write /proc/nothing"),
    ):
        with pytest.raises(UserError, match=message):
            image_files(output, count, overwrite=True)
    with monkeypatch.context() as patch:  # the suite may run as root, who may write anywhere
        patch.setattr(
            files.tempfile,
            "NamedTemporaryFile",
            lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
        with pytest.raises(UserError, match="Permission denied"):
            image_files(tmp_path / "new" / "deep" / "a.png", 1, overwrite=False)
    assert image_files(tmp_path / "new" / "deep" / "a.png", 1, overwrite=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_the_file_before_it_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "n.png"
    save_images(torch.zeros(1, 1, 4, 4), [file])
    before = file.read_bytes()

    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match="No space left"):
            save_images(torch.ones(1, 1, 4, 4), [file])
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_images(torch.ones(1, 1, 4, 4), [file])
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "[a two, ' ']"], "empty prompt"),
        (["--prompt", "[]"], "no prompt given"),
        (["--prompt", "a two", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a two", "--seed", str(2**64)], "seed is "),
        (["--prompt", "a two", "--steps", "0"], "steps is 0"),
        (["--prompt", "a two", "--guidance_scale", ".nan"], "guidance_scale is nan"),
        (["--prompt", "a two", "--output", "/proc/nothing/a.png"], "cannot write /proc/nothing"),
    ],
)
def test_the_command_refuses_before_it_loads(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["sample", "digits-sd3", *options])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_the_command_writes_no_black_picture(pipe, capsys, monkeypatch, tmp_path):
    import obsdiff.pruning.folder

    monkeypatch.setattr(obsdiff.pruning.folder, "load_pipeline", lambda *_, **__: spoil(pipe))
    with pytest.raises(SystemExit) as left:
        main(["sample", "digits-sd3", "--prompt", "a two", "--output", str(tmp_path / "a.png")])
    assert left.value.code == 2 and "not finite" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert sampling.sample is sample
