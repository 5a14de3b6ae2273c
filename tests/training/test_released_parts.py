"""A recovery on trajectories holds its denoiser alone while it trains, and its result is none the worse for it."""

import lightning
import pytest
import torch

import obsdiff
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.models import released
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.training.options import Objective
from obsdiff.training.recovery import Recovery
from tests.training.common import assert_same, assert_zero, fit, result
from tests.training.test_plain_trainer import recovery, trainer

ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
QUICK = ("--model.pruning.method=magnitude", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null")


class Watch(lightning.Callback):
    """What is out of memory in each step, and what came back since the training began."""

    def __init__(self, monkeypatch):
        self.away, self.came, self.training = [], [], False
        real = released._fill

        def fill(model, name):
            self.came += [name] if self.training else []
            real(model, name)

        monkeypatch.setattr(released, "_fill", fill)

    def on_train_batch_start(self, runner, module, *_):
        self.training = True
        self.away.append(released.released(module.start.pipe).keys())

    def on_train_end(self, *_):
        self.training = False


def evaluated(pipe_folder, tmp_path, name):
    options = EvaluationOptions(num_images=2, prompts="digits-heldout")
    return recovery(pipe_folder, tmp_path / name, Recovery, objective=Objective(distill_output=1.0), evaluation=options)


def data(pipe_folder, tmp_path):
    return TrajectoryDataModule(str(pipe_folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4)


@pytest.mark.slow
def test_encoders_and_autoencoder_leave_and_only_what_draws_comes_back(pipe_folder, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    runner = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    for again in (False, True):  # then with the references of before: prompts are encoded once more
        watch.away.clear(), watch.came.clear()
        trainer(tmp_path, **runner, callbacks=[watch]).fit(
            evaluated(pipe_folder, tmp_path, "run"), datamodule=data(pipe_folder, tmp_path)
        )
        assert watch.away == [ENCODERS | {"vae"}] * 4
        assert watch.came.count("vae") == 2  # two validations of one batch
        assert set(watch.came) - {"vae"} == (ENCODERS if again else set())
        assert all(watch.came.count(name) == 1 for name in ENCODERS if again)


@pytest.mark.slow
def test_the_result_is_the_same(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.training import recovery as module
    from obsdiff.training import stage

    options = {"images": False, "folder": tmp_path / "traj", "steps": 4}
    fit(pipe_folder, tmp_path / "leaving", *QUICK, **options)
    for where, names in ((module, ("release",)), (stage, ("release", "share"))):
        for name in names:
            monkeypatch.setattr(where, name, lambda *_: None)
    fit(pipe_folder, tmp_path / "staying", *QUICK, **options)
    assert_zero(tmp_path / "leaving")
    assert_same(result(tmp_path / "leaving"), result(tmp_path / "staying"))
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for run in ("leaving", "staying")
        for folder in [tmp_path / run / "recovered" / "pipeline"]
    ]
    assert files[0] == files[1] and len(files[0]) == 5
    found = [obsdiff.load_pipeline(tmp_path / run / "recovered") for run in ("leaving", "staying")]
    assert torch.equal(*(obsdiff.sample(pipe, ["a two"], [0]) for pipe in found))


def test_images_are_trained_on_with_everything_there(pipe_folder, tmp_path):
    from obsdiff.data.digits import DigitsDataModule

    module = recovery(pipe_folder, tmp_path / "run", objective=Objective(denoise=1.0, distill_output=1.0))
    trainer(tmp_path, max_steps=1).fit(module, datamodule=DigitsDataModule(batch_size=4))
    assert not released.released(module.start.pipe)
