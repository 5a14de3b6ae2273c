"""Outputs that cannot be written are refused before anything is pruned, recorded or drawn."""

import shutil

import pytest

from obsdiff.errors import UserError
from obsdiff.export.recovered import write_recovered
from obsdiff.paths import user_path
from tests.training.common import arguments, fit


@pytest.fixture(scope="module")
def finished(pipe_folder, tmp_path_factory):
    """The output of a short recovery of adapters."""
    output = tmp_path_factory.mktemp("finished") / "run"
    fit(pipe_folder, output, "--model.trained.lora_rank=2", steps=2)
    return output


def refused(capsys, pipe_folder, output, *extra, **options):
    """The line that a fit is refused with."""
    with pytest.raises(SystemExit) as stop:
        fit(pipe_folder, output, *extra, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def evaluated(capsys, subcommand, pipe_folder, output, *extra):
    """The last line of ``validate`` or ``predict``, which is refused."""
    from obsdiff.cli.train import main

    with pytest.raises(SystemExit) as stop:
        main([subcommand, *arguments(pipe_folder, output, *extra)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("part", ["checkpoints", "samples", "recovered", "logs"])
def test_a_file_where_a_folder_should_be(part, pipe_folder, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / part).write_text("mine")
    line = refused(capsys, pipe_folder, output)
    assert part in line and "not a folder" in line
    assert not (output / "pruned").exists() and (output / part).read_text() == "mine"


def test_a_folder_where_the_references_should_be(pipe_folder, tmp_path, capsys):
    (tmp_path / "references.safetensors").mkdir()
    assert "references.safetensors is a folder" in refused(capsys, pipe_folder, tmp_path)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("part", ["pruned", "recovered", "statistics"])
def test_a_recording_inside_what_is_replaced_as_a_whole(part, pipe_folder, tmp_path, capsys):
    folder = tmp_path / part / "trajectories"
    line = refused(capsys, pipe_folder, tmp_path, images=False, folder=folder)
    assert f"--data.folder {folder} is inside --model.output {tmp_path / part}" in line
    assert not folder.exists()


def test_an_earlier_result_is_refused_before_anything_is_recorded(finished, pipe_folder, tmp_path, capsys):
    folder = tmp_path / "trajectories"
    line = refused(capsys, pipe_folder, finished, "--model.trained.lora_rank=2", steps=2, images=False, folder=folder)
    assert "a recovered run already" in line
    assert not folder.exists()


def test_predictions_that_cannot_be_written(finished, pipe_folder, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "predictions").write_text("mine")
    found = evaluated(capsys, "predict", pipe_folder, output, "--model.trained.lora_rank=2", "--ckpt_path=last")
    assert "predictions is not a folder" in found


def test_adapters_of_another_weight_are_not_evaluated(finished, pipe_folder, capsys):
    options = ("--model.trained.lora_rank=2", "--ckpt_path=last", "--model.trained.lora_alpha=99")
    found = evaluated(capsys, "validate", pipe_folder, finished, *options)
    assert "adapters were trained with other settings: trained.lora_alpha (16.0 there, 99.0 here)" in found


@pytest.mark.parametrize("subcommand", ["validate", "predict"])
def test_nothing_to_draw(subcommand, finished, pipe_folder, capsys):
    options = ("--model.trained.lora_rank=2", "--ckpt_path=last", "--model.evaluation.num_images=0")
    assert "num_images is 0" in evaluated(capsys, subcommand, pipe_folder, finished, *options)


def test_validations_further_apart_than_an_epoch(pipe_folder, tmp_path, capsys):
    line = refused(capsys, pipe_folder, tmp_path, "--trainer.val_check_interval=100000")
    assert "val_check_interval is 100000, and an epoch has 4311 batches" in line
    assert not (tmp_path / "pruned").exists()


def test_overfitting_is_refused(pipe_folder, tmp_path, capsys):
    assert "use trainer.limit_train_batches" in refused(capsys, pipe_folder, tmp_path, "--trainer.overfit_batches=2")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.slow
def test_stopping_early_on_an_unknown_figure(pipe_folder, tmp_path, capsys):
    stopping = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/acc"]
    validating = ["--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null"]
    assert "`val/acc` which is not available" in refused(capsys, pipe_folder, tmp_path, *stopping, *validating)


def test_the_home_folder_of_checkpoints_and_recordings(finished, pipe_folder, tmp_path, monkeypatch, capsys):
    from obsdiff.data.images import ImageCaptionDataModule
    from obsdiff.data.trajectories import TrajectoryDataModule

    monkeypatch.setenv("HOME", str(finished.parent))
    options = ("--model.trained.lora_rank=2", "--ckpt_path=~/run/checkpoints/last.ckpt")
    fit(pipe_folder, "~/run", *options, steps=2)
    assert "finished" in capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\n")
    assert TrajectoryDataModule("tiny", "~/kept", str(prompts)).folder == user_path("~/kept", "data.folder")
    assert ImageCaptionDataModule("~/images").source == str(finished.parent / "images")


@pytest.mark.slow
def test_a_result_that_another_run_wrote_meanwhile_is_kept(finished, pipe_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished / "pruned", output / "pruned")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def slower(*args):
        shutil.copytree(finished / "recovered", output / "recovered")
        return write_recovered(*args)

    monkeypatch.setattr("obsdiff.callbacks.export.write_recovered", slower)
    line = refused(capsys, pipe_folder, output, steps=3)
    assert "recovered holds a finished run already" in line and "the finished run lies in" in line
    theirs, mine = (finished / "recovered" / "report.json").read_text(), list(tmp_path.glob("obsdiff-recovered-*"))
    assert (output / "recovered" / "report.json").read_text() == theirs
    assert [(folder / "report.json").is_file() for folder in mine] == [True]


def test_interrupted_after_pruning(pipe_folder, finished):
    from obsdiff.cli.train_arguments import last_checkpoint

    (finished / "checkpoints").rename(finished / "aside")
    assert f"the pruned pipeline in {finished / 'pruned'} is kept" in last_checkpoint(finished)
    (finished / "aside").rename(finished / "checkpoints")


def test_metadata_that_does_not_serve(tmp_path):
    from PIL import Image

    from obsdiff.data.images import ImageCaptionDataModule

    Image.new("L", (16, 16)).save(tmp_path / "one.png")
    data = ImageCaptionDataModule(str(tmp_path), batch_size=1)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metadata\.jsonl is empty"):
        data.setup("fit")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../one.png", "caption": "a"}\n')
    with pytest.raises(UserError, match=r"Invalid metadata file_name '\.\./one\.png'"):
        data.setup("fit")


def in_a_trainer(pipe_folder, output, *callbacks):
    """A trainer and what it trains, without a command line."""
    from lightning import Trainer

    from obsdiff.data.digits import DigitsDataModule
    from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions
    from obsdiff.training.recovery import Recovery

    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    pruning = PruningOptions(pattern="unstructured:0.5", spare_blocks=[], calibration=CalibrationOptions(num_prompts=2))
    module = Recovery(str(pipe_folder), str(output), pruning, evaluation=EvaluationOptions(num_images=0))
    trainer = Trainer(
        max_steps=2, accelerator="cpu", devices=1, callbacks=list(callbacks), enable_checkpointing=False, **options
    )
    return trainer, {"model": module, "datamodule": DigitsDataModule(batch_size=4)}


@pytest.mark.slow
def test_a_checkpoint_is_not_loaded_without_a_trainer(pipe_folder, tmp_path):
    trainer, what = in_a_trainer(pipe_folder, tmp_path)
    trainer.fit(**what)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(UserError, match="set up by its Trainer"):
        type(what["model"]).load_from_checkpoint(
            tmp_path / "two.ckpt", pipeline=str(pipe_folder), output=str(tmp_path), weights_only=True
        )


def test_two_averages_are_refused(pipe_folder, tmp_path):
    from obsdiff.callbacks.ema import EMA

    trainer, what = in_a_trainer(pipe_folder, tmp_path, EMA(0.5), EMA(0.9))
    with pytest.raises(UserError, match="more than one EMA"):
        trainer.fit(**what)
    assert not (tmp_path / "pruned").exists()
