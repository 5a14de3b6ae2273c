"""What a user switches off stays off, and what a user brings is kept."""

import json

import lightning
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.checkpoint import LastCheckpoint
from obsdiff.callbacks.ema import EMA
from obsdiff.callbacks.export import Export
from obsdiff.callbacks.mask import MaskEnforcement
from obsdiff.callbacks.samples import SampleGrid
from obsdiff.cli.train import command_line, main
from obsdiff.data.digits import DigitsDataModule
from obsdiff.pruning.options import EvaluationOptions

ROOT_OPTIONS = ("--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=-1")


class OwnMasks(MaskEnforcement):
    pass


class OwnAverage(EMA):
    pass


def options(pipe_folder, output, *extra):
    return [
        *ROOT_OPTIONS,
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--budget.steps=2",
        "--model=obsdiff.training.recovery.Recovery",
        f"--model.pipeline={pipe_folder}",
        f"--model.output={output}",
        "--model.pruning.method=magnitude",
        "--model.pruning.spare_blocks=[]",
        "--model.objective.denoise=1",
        "--model.evaluation.num_images=2",
        "--data=obsdiff.data.digits.DigitsDataModule",
        "--data.batch_size=4",
        *extra,
    ]


def trainer_of(*args):
    return command_line()(args=options("digits-sd3", "out", *args), run=False).trainer


def kinds(trainer, *wanted):
    return [type(callback) for callback in trainer.callbacks if isinstance(callback, wanted)]


def test_what_a_recovery_gets_by_itself():
    trainer = trainer_of()
    found = kinds(trainer, MaskEnforcement, Budget, SampleGrid, Export, ModelCheckpoint)
    assert found == [MaskEnforcement, Budget, SampleGrid, Export, LastCheckpoint]
    [logger] = trainer.loggers
    assert isinstance(logger, TensorBoardLogger) and logger.log_dir == "out/logs/"


def test_what_is_switched_off_stays_off():
    assert trainer_of("--trainer.logger=false").loggers == []
    assert kinds(trainer_of("--trainer.enable_checkpointing=false"), ModelCheckpoint) == []
    trainer = trainer_of("--trainer.fast_dev_run=true")
    assert kinds(trainer, MaskEnforcement, Budget) == [MaskEnforcement, Budget]
    assert kinds(trainer, SampleGrid, Export, ModelCheckpoint) == []
    assert not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


@pytest.mark.parametrize(
    "brought, kind",
    [
        ("lightning.pytorch.callbacks.ModelCheckpoint", ModelCheckpoint),  # without a folder, as Lightning's default
        (f"{__name__}.OwnMasks", MaskEnforcement),
        ("obsdiff.callbacks.mask.MaskEnforcement", MaskEnforcement),
        (f"{__name__}.OwnAverage", EMA),
    ],
)
def test_callbacks_that_the_user_brings_are_the_only_ones_of_their_kind(brought, kind):
    trainer = trainer_of(f"--trainer.callbacks+={brought}", "--ema=obsdiff.callbacks.ema.EMA")
    [found] = kinds(trainer, kind)
    assert f"{found.__module__}.{found.__qualname__}".endswith(brought.rpartition(".")[2])


@pytest.mark.parametrize(
    "logger, kind",
    [
        ("lightning.pytorch.loggers.CSVLogger", CSVLogger),
        ("lightning.pytorch.loggers.TensorBoardLogger", TensorBoardLogger),
    ],
)
def test_loggers_that_the_user_brings_are_kept(logger, kind, tmp_path):
    trainer = trainer_of(f"--trainer.logger={logger}", f"--trainer.logger.save_dir={tmp_path}")
    [found] = trainer.loggers
    assert type(found) is kind and str(found.save_dir) == str(tmp_path)


@pytest.mark.slow
def test_a_run_without_logs_and_checkpoints_writes_none(pipe_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off = ("--trainer.logger=false", "--trainer.enable_checkpointing=false")
    main(["fit", *options(pipe_folder, "run", *off)])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"config.yaml", "pruned", "references.safetensors", "recovered", "samples"}
    assert json.loads((tmp_path / "run" / "recovered" / "report.json").read_text())["recovery"]["steps"] == 2


def test_a_fast_development_run_writes_no_result(pipe_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *options(pipe_folder, "run", "--trainer.fast_dev_run=true")])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"pruned", "references.safetensors"}


def test_callbacks_that_a_user_gives_a_trainer_write_nothing_in_a_fast_development_run(pipe_folder, tmp_path):
    from tests.training.test_plain_trainer import recovery

    module = recovery(pipe_folder, tmp_path / "run", evaluation=EvaluationOptions(num_images=2))
    parts = [Budget(steps=2), SampleGrid(), Export(), LastCheckpoint(tmp_path / "run" / "checkpoints", 1)]
    trainer = lightning.Trainer(
        accelerator="cpu", fast_dev_run=True, callbacks=parts, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"pruned", "references.safetensors"}
