"""Data that do not fit the model are refused before pruning, naming both numbers."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from obsdiff.callbacks.budget import Budget
from obsdiff.data.digits import DigitsDataModule
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.errors import UserError
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.training.fits import check_embeds, check_images, check_latents
from obsdiff.training.options import Objective, Trained
from tests.conftest import make_pipe
from tests.training.test_plain_trainer import recovery, trainer


class Shapes(lightning.LightningDataModule):
    """Images of one shape; says so, or not."""

    def __init__(self, shape, says):
        super().__init__()
        self.shape = shape
        if says:
            self.image_shape = shape

    def train_dataloader(self):
        return DataLoader([{"image": torch.zeros(self.shape), "prompt": "a two"}] * 8, batch_size=4)


WRONG = [
    ((3, 16, 16), "3 channels, the autoencoder of .* takes 1"),
    ((1, 18, 16), "18 x 16 pixels, but .* takes multiples of 4"),
    ((1, 32, 32), "16 x 16, 8 patches a side; the position table of .* ends at 4"),
]


@pytest.mark.parametrize("shape, word", WRONG)
def test_images_that_do_not_fit_are_refused_before_pruning(pipe_folder, tmp_path, shape, word):
    with pytest.raises(UserError, match=word) as found:
        trainer(tmp_path).fit(recovery(pipe_folder, tmp_path / "run"), datamodule=Shapes(shape, says=True))
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


def test_images_that_nobody_spoke_of_are_refused_at_the_first_batch(pipe_folder, tmp_path):
    with pytest.raises(UserError, match=WRONG[0][1]):
        trainer(tmp_path).fit(recovery(pipe_folder, tmp_path / "run"), datamodule=Shapes((3, 16, 16), says=False))


def test_latents_and_embeds(pipe):
    check_images(subject_of(pipe), (1, 16, 16), "it")
    check_images(subject_of(pipe), (1, 8, 16), "it")
    check_latents(subject_of(pipe), (4, 8, 8), "it")
    for shape, word in (
        ((16, 8, 8), "16 channels, .* takes 4"),
        ((4, 7, 8), "7 x 8, .* multiples of 2"),
        ((4, 10, 8), "ends at 4"),
    ):
        with pytest.raises(UserError, match=word):
            check_latents(subject_of(pipe), shape, "it")
    with pytest.raises(UserError, match=r"width 32, .* takes 16"):
        check_embeds(subject_of(pipe), {"encoder_hidden_states": torch.zeros(1, 5, 32)}, "it")


def trajectories(folder, tmp_path):
    return TrajectoryDataModule(str(folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4)


def test_images_are_missed_before_anything_is_recorded(pipe_folder, tmp_path):
    with pytest.raises(UserError, match="needs images, and TrajectoryDataModule has none"):
        trainer(tmp_path).fit(recovery(pipe_folder, tmp_path / "run"), datamodule=trajectories(pipe_folder, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_trajectories_of_another_pipeline_are_refused_before_pruning(pipe_folder, tmp_path):
    wider = make_pipe(blocks=2)
    wider.save_pretrained(tmp_path / "other")
    data = trajectories(tmp_path / "other", tmp_path)
    data.guidance_scale, data.steps = 2.0, 2
    with pytest.raises(UserError, match=r"recorded from another pipeline: its .*transformer.* is not what"):
        module = recovery(pipe_folder, tmp_path / "run", objective=Objective(distill_output=1.0))
        trainer(tmp_path).fit(module, datamodule=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"trained": Trained(include=["nothing"])}, "matches no parameter"),
        ({"trained": Trained(include=["nothing"], lora_rank=2)}, "matches no linear layer"),
        ({"evaluation": EvaluationOptions(num_images=1, prompts="missing.txt")}, "not found"),
        ({"evaluation": EvaluationOptions(num_images=1, prompts="horses.txt")}, "names no digit"),
    ],
)
def test_what_else_would_end_a_run_after_pruning(pipe_folder, tmp_path, monkeypatch, changes, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "horses.txt").write_text("a horse\n")
    with pytest.raises(UserError, match=word):
        trainer(tmp_path).fit(recovery(pipe_folder, tmp_path / "run", **changes), datamodule=DigitsDataModule(4))
    assert not (tmp_path / "run").exists()


def test_a_budget_that_recording_used_up_is_refused_before_pruning(pipe_folder, tmp_path):
    module = recovery(pipe_folder, tmp_path / "run", objective=Objective(distill_output=1.0))
    runner = trainer(tmp_path, callbacks=[Budget(denoiser_flops=1000.0)])
    with pytest.raises(UserError, match="will cost"):
        runner.fit(module, datamodule=trajectories(pipe_folder, tmp_path))
    assert not (tmp_path / "run").exists()
