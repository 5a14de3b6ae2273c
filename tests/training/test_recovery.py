"""The real training command on a tiny pipeline: zeros stay zeros, resumed runs equal uninterrupted ones."""

import errno
import json

import pytest
import torch

import obsdiff
from obsdiff.cli.train import main
from tests.training.common import PATTERNS, arguments, assert_same, assert_zero, fit, result

EMA = ("--ema=obsdiff.callbacks.ema.EMA", "--ema.decay=0.5")
ALL_LOSSES = (
    "--model.objective.denoise=1",
    "--model.objective.distill_output=1",
    "--model.objective.distill_features=0.1",
)


@pytest.mark.parametrize(
    "pattern",
    [pattern if pattern == PATTERNS[0] else pytest.param(pattern, marks=pytest.mark.slow) for pattern in PATTERNS],
)
def test_a_run_leaves_a_pipeline_that_loads_and_a_whole_report(pipe_folder, tmp_path, pattern, images):
    measured = pattern != "2:4"
    rule = f"--model.pruning.allocation={'measured' if measured else 'uniform'}"
    fit(pipe_folder, tmp_path / "run", *ALL_LOSSES, rule, pattern=pattern)
    folder = tmp_path / "run" / "recovered"
    expected = {"pipeline", "pruning.json", "masks.safetensors", "report.json", "report.md", "samples.png"}
    expected |= {"ratios.png"} if measured else set()
    assert {path.name for path in folder.iterdir()} == expected
    report = json.loads((folder / "report.json").read_text())
    assert report["recovery"]["steps"] == 6
    for key in ("mse", "alignment", "frechet"):
        assert key in report["evaluation"]["pruned"] and key in report["evaluation"]["recovered"]
    assert report["budget"]["limit"] == {"steps": 6}
    assert set(report["budget"]["used"]) == {"calibration", "allocation", "solving", "recovery"}
    assert (report["allocation"] is not None) is measured
    assert (report["budget"]["used"]["allocation"]["denoiser_flops"] > 0) is measured
    assert report["budget"]["used"]["recovery"]["images"] == 24
    loaded = obsdiff.load_pipeline(folder)
    assert images(loaded).shape[0] == 2
    if pattern.startswith("structured"):
        assert report["parameters"]["pruned"] < report["parameters"]["dense"]
    else:
        assert_zero(tmp_path / "run")


@pytest.mark.slow
def test_zeros_survive_weight_decay_accumulation_bf16_and_averaging(pipe_folder, tmp_path):
    extra = ("--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed", *EMA, *ALL_LOSSES)
    fit(pipe_folder, tmp_path / "run", *extra)
    assert_zero(tmp_path / "run")


@pytest.mark.slow
def test_distillation_needs_no_images(pipe_folder, tmp_path):
    fit(pipe_folder, tmp_path / "run", images=False, folder=tmp_path / "traj")
    assert_zero(tmp_path / "run")


@pytest.mark.slow
def test_second_order_matching_trains(pipe_folder, tmp_path):
    fit(pipe_folder, tmp_path / "run", "--model.objective.distill_jacobian=0.1", steps=2)
    assert_zero(tmp_path / "run")


@pytest.mark.slow
def test_gradient_checkpointing_changes_memory_only(pipe_folder, tmp_path):
    losses = ("--model.objective.distill_features=1",)
    fit(pipe_folder, tmp_path / "plain", *losses, steps=2)
    fit(pipe_folder, tmp_path / "saving", *losses, "--model.trained.gradient_checkpointing=true", steps=2)
    plain, saving = result(tmp_path / "plain"), result(tmp_path / "saving")
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_result_is_the_average(pipe_folder, tmp_path):
    fit(pipe_folder, tmp_path / "run", *EMA, "--model.pruning.method=magnitude", images=False, folder=tmp_path / "traj")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    average, last = (
        {name.removeprefix("denoiser."): tensor for name, tensor in saved[part].items()}
        for part in ("ema", "state_dict")
    )
    written = result(tmp_path / "run")
    assert_same({name: written[name] for name in average}, average)
    assert any(not torch.equal(average[name], last[name]) for name in average)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("images", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(pipe_folder, tmp_path, pattern, images, monkeypatch):
    from obsdiff.training import recovery

    options = {"pattern": pattern, "images": images, "folder": tmp_path / "traj"}
    extra = (*EMA, *ALL_LOSSES[not images :], "--trainer.accumulate_grad_batches=2")
    fit(pipe_folder, tmp_path / "whole", *extra, **options)
    calls = []
    real = recovery.loss_terms

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:  # in the middle of the fourth step
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(recovery, "loss_terms", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pipe_folder, tmp_path / "parts", *extra, **options)
    fit(pipe_folder, tmp_path / "parts", *extra, "--ckpt_path=last", **options)
    assert_same(result(tmp_path / "parts"), result(tmp_path / "whole"))
    assert len(calls) > 8
    reports = [json.loads((tmp_path / run / "recovered" / "report.json").read_text()) for run in ("parts", "whole")]
    seen, wanted = (report["budget"]["used"]["recovery"] for report in reports)
    assert seen["steps"] == wanted["steps"] == 6 and seen["images"] == wanted["images"]


def test_lora_respects_the_mask_and_merging_changes_nothing(pipe_folder, tmp_path, images):
    from obsdiff.models.subject import subject_of
    from obsdiff.pruning.masks import load_masks
    from obsdiff.training.adapters import add_adapters, merge_adapters

    fit(pipe_folder, tmp_path / "run", "--model.trained.lora_rank=4", *EMA)
    assert_zero(tmp_path / "run")
    pipe = obsdiff.load_pipeline(tmp_path / "run" / "recovered")
    masks = load_masks(tmp_path / "run" / "recovered" / "masks.safetensors")
    denoiser = subject_of(pipe).denoiser
    torch.manual_seed(0)
    add_adapters(denoiser, list(masks), masks, rank=4, alpha=4.0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = images(pipe)
    merge_adapters(denoiser)
    torch.testing.assert_close(images(pipe), before, rtol=1e-4, atol=1e-4)
    for layer, kept in masks.items():
        assert bool((denoiser.get_submodule(layer).weight[~kept] == 0).all())


@pytest.mark.slow
def test_validate_test_and_predict_use_a_checkpoint(pipe_folder, tmp_path):
    fit(pipe_folder, tmp_path / "run", *EMA, steps=2)
    args = arguments(pipe_folder, tmp_path / "run", *EMA)
    for command in ("validate", "test", "predict"):
        main([command, *args, "--ckpt_path=last"])
    assert {path.name for path in (tmp_path / "run" / "predictions").iterdir()} == {"00000.png", "00001.png"}


def refused(capsys, pipe_folder, output, *extra, **options):
    """The one line that a refused run prints."""
    with pytest.raises(SystemExit) as stopped:
        fit(pipe_folder, output, *extra, **options)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obsdiff train:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_clear_refusals(pipe_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert "already cost" in refused(capsys, pipe_folder, run, "--budget.wall_s=0.0001")
    assert "another run" in wrong_checkpoint(capsys, pipe_folder, tmp_path)
    assert "other settings" in refused(capsys, pipe_folder, run, pattern="2:4")
    losses = ("--model.objective.denoise=1",)
    no_images = refused(capsys, pipe_folder, run, *losses, images=False, folder=tmp_path / "traj")
    assert "needs images" in no_images
    assert "fewer than one batch" in refused(capsys, pipe_folder, run, "--data.batch_size=100000")
    assert "matches no parameter" in refused(capsys, pipe_folder, run, "--model.trained.include=[nothing]")


def wrong_checkpoint(capsys, pipe_folder, tmp_path):
    fit(pipe_folder, tmp_path / "other", pattern="4:8", steps=1)
    path = tmp_path / "other" / "checkpoints" / "last.ckpt"
    return refused(capsys, pipe_folder, tmp_path / "run", f"--ckpt_path={path}")


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_checkpoint(pipe_folder, tmp_path, capsys, monkeypatch):
    from obsdiff.training import recovery

    calls = []
    real = recovery.loss_terms

    def spoilt(*args):
        calls.append(1)
        terms = real(*args)
        return {name: term * (float("nan") if len(calls) == 4 else 1) for name, term in terms.items()}

    monkeypatch.setattr(recovery, "loss_terms", spoilt)
    assert "not finite at step 3" in refused(capsys, pipe_folder, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved["state_dict"].values())


def test_a_full_disk_leaves_the_checkpoint_before(pipe_folder, tmp_path, capsys, monkeypatch):
    real, calls = torch.save, []

    def save(checkpoint, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(checkpoint, file)

    monkeypatch.setattr(torch, "save", save)
    line = refused(capsys, pipe_folder, tmp_path / "run")
    assert "No space left" in line and "--ckpt_path last" in line
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_masks_that_break_stop_the_run(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.callbacks.mask import MaskEnforcement

    monkeypatch.setattr(MaskEnforcement, "_after_step", lambda *_: None)
    with pytest.raises(RuntimeError, match="are not zero"):
        fit(pipe_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "recovered").exists()
