"""Which way to calibrate is chosen where one pass of all sites does not fit."""

import json
from dataclasses import replace
from functools import cache

import pytest

from obsdiff.allocation import fitting
from obsdiff.allocation.fitting import plan_from_configs
from obsdiff.cli.main import main
from obsdiff.errors import UserError
from obsdiff.export.memory_report import full_plan
from obsdiff.files import write_json
from obsdiff.models.info import INFO_FILE, info_of
from obsdiff.pruning.masks import load_masks
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions
from tests.conftest import make_pipe

LAYERS = "transformer_blocks.*.ff*.net.2"  # many columns and few rows: Hessians outweigh weights that change


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "wide"
    pipe = make_pipe(blocks=6, head_dim=16)
    pipe.save_pretrained(folder)
    write_json(folder / INFO_FILE, info_of(pipe).to_json())
    return folder


@pytest.fixture
def options(wide):
    return PruneOptions(
        pipeline=str(wide),
        output="unused",
        pattern="unstructured:0.5",
        allocation="uniform",
        include=[LAYERS],
        calibration=CalibrationOptions(num_prompts=2, steps=1, batch_size=1),
        evaluation=EvaluationOptions(num_images=0),
    )


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The process counts for nothing, so that limits are of what is pruned."""
    monkeypatch.setattr(fitting, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(fitting, "RUN_BYTES", 0)
    monkeypatch.setattr(fitting, "products_per_s", cache(lambda device: 1e11))


def calibrating(options, **changes):
    return replace(options, calibration=replace(options.calibration, **changes))


def taken(options):
    return plan_from_configs(options, "cpu").memory.host_bytes


def test_a_streamed_calibration_comes_before_packages(options):
    streamed = calibrating(options, streamed=True)
    least = taken(streamed)
    assert least < taken(options)
    found = plan_from_configs(replace(options, host_memory=least), "cpu")
    assert found.options == replace(streamed, host_memory=least) and found.memory.host_bytes == least
    text = full_plan(found)
    assert "chosen to fit: --calibration.streamed true\n" in text and ", stage by stage;" in text
    less = plan_from_configs(replace(options, host_memory=least - 1), "cpu")
    assert less.options.calibration == replace(streamed.calibration, calls_on_disk=True)
    assert less.chosen == "--calibration.streamed true --calibration.calls_on_disk true"
    whole = plan_from_configs(replace(options, host_memory="1GB"), "cpu")
    assert whole.options.calibration == options.calibration and "chosen" not in full_plan(whole)


def test_a_denoiser_that_forms_no_chain_is_calibrated_in_packages(options, monkeypatch):
    def opened(*source):
        subject = open_unloaded(*source)
        blocks = subject.pipe.transformer.transformer_blocks
        blocks[1] = blocks[0]
        return subject

    open_unloaded = fitting.open_unloaded
    monkeypatch.setattr(fitting, "open_unloaded", opened)
    several = taken(calibrating(options, packages=4))
    assert several < taken(options)
    found = plan_from_configs(replace(options, host_memory=several), "cpu")
    count = found.options.calibration.packages
    assert 1 < count <= 4 and not found.options.calibration.streamed
    told = f"--calibration.packages {count} (not stage by stage: this SD3Transformer2DModel runs a block more than once"
    assert f"chosen to fit: {told} in a call)\n" in full_plan(found)
    with pytest.raises(UserError, match="runs a block more than once in a call; calibrate in packages"):
        plan_from_configs(calibrating(options, streamed=True), "cpu")


def test_a_method_that_needs_the_denoiser_whole_is_calibrated_in_packages(options):
    asked = replace(options, method="diff-pruning", refit=True)
    several = taken(calibrating(asked, packages=6))
    found = plan_from_configs(replace(asked, host_memory=several), "cpu")
    assert found.options.calibration.packages > 1 and not found.options.calibration.streamed
    assert "(not stage by stage: method diff-pruning goes by large_loss_gradient of the whole denoiser)" in found.chosen


def test_who_says_how_gets_that_or_hears_of_stages(options):
    least = taken(calibrating(options, streamed=True))
    asked = replace(calibrating(options, packages=1), host_memory=least)
    with pytest.raises(UserError, match=r"fit: --calibration.streamed true in place of --calibration.packages \("):
        plan_from_configs(asked, "cpu")
    measured = replace(options, allocation="measured", host_memory=least)
    with pytest.raises(UserError, match=r"What would fit: --allocation uniform --calibration.streamed true \("):
        plan_from_configs(measured, "cpu")


def test_stages_are_named_together_with_weights_on_the_disk(options):
    asked = calibrating(replace(options, dtype="bfloat16"), packages=1)
    away = calibrating(replace(asked, weights_on_disk=True), packages=None, streamed=True, calls_on_disk=True)
    least = taken(away)
    assert least < taken(calibrating(asked, packages=None, streamed=True, calls_on_disk=True))
    assert least < taken(replace(away, calibration=asked.calibration))
    told = r"fit: --calibration.streamed true --weights_on_disk true in place of --calibration.packages \("
    with pytest.raises(UserError, match=told):
        plan_from_configs(replace(asked, host_memory=least), "cpu")


def test_a_run_does_what_was_chosen(options, tmp_path, capsys):
    least = taken(calibrating(options, streamed=True))
    given = ["prune", "--pipeline", options.pipeline, "--pattern", options.pattern, "--allocation", "uniform"]
    given += ["--include", f"['{LAYERS}']", "--calibration.num_prompts", "2", "--calibration.steps", "1"]
    given += ["--calibration.batch_size", "1", "--evaluation.num_images", "0"]
    main([*given, "--output", str(tmp_path / "chosen"), "--host_memory", str(least)])
    said = capsys.readouterr().err
    assert "chosen to fit: --calibration.streamed true\n" in said and "guidance 2.0, stage by stage; " in said
    main([*given, "--output", str(tmp_path / "asked"), "--calibration.streamed", "true"])
    chosen, asked = (json.loads((tmp_path / way / "report.json").read_text()) for way in ("chosen", "asked"))
    assert chosen["calibration"] == asked["calibration"] and chosen["calibration"]["streamed"]
    assert chosen["layer_error"] == asked["layer_error"]
    assert "chosen to fit" not in capsys.readouterr().err
    assert load_masks(tmp_path / "chosen" / "masks.safetensors").keys()
