"""Recorded answers of the dense denoiser in the place of a teacher that runs: same losses, and what it saves."""

import functools
import gc
import weakref
from dataclasses import replace

import lightning
import pytest
import torch
from safetensors.torch import load_file

import obsdiff
from obsdiff.callbacks.budget import Budget
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.errors import UserError
from obsdiff.files import read_json, write_json
from obsdiff.models.calling import PromptEncoder
from obsdiff.models.subject import subject_of
from obsdiff.pruning.record import INDEX, TENSORS, open_trajectories, record_trajectories
from obsdiff.training.fits import has_answers
from obsdiff.training.options import Objective, Optimization
from obsdiff.training.recovery import Recovery
from tests.conftest import make_pipe
from tests.families.pipelines import PIPELINES
from tests.families.test_recovery import prompts_of, save
from tests.training.test_plain_trainer import recovery, trainer

OUTPUT, GUIDED = Objective(distill_output=1.0), Objective(distill_output=1.0, distill_guided=0.5)


class Taught(Recovery):
    """Runs the teacher, whatever was recorded."""

    def needs_teacher(self, dense):
        return True


class Losses(lightning.Callback):
    """Of every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, runner, *_):
        self.found.append({key: float(value) for key, value in runner.callback_metrics.items() if "loss" in key})


def losses(kind, folder, tmp_path, prompts, objective, dropout):
    """Of four steps, on a student that learns: a wrong aim in one of them shows in all that follow."""
    torch.manual_seed(0)  # of a DiT in training, which drops classes by itself
    watch = Losses()
    module = recovery(
        folder,
        tmp_path / kind.__name__,
        kind,
        objective=objective,
        prompt_dropout=dropout,
        optimization=Optimization(lr=1e-3, warmup_steps=0),
    )
    data = TrajectoryDataModule(str(folder), str(tmp_path / "traj"), prompts, num_prompts=3, batch_size=4)
    trainer(tmp_path, max_steps=4, callbacks=[watch]).fit(module, datamodule=data)
    assert len(watch.found) == 4
    return module, watch.found


CASES = [
    ("sd3", OUTPUT, 0.5),
    pytest.param("sd3", GUIDED, 0.0, marks=pytest.mark.slow),
    pytest.param("ddpm", OUTPUT, 0.5, marks=pytest.mark.slow),  # told nothing
    pytest.param("dit", OUTPUT, 0.5, marks=pytest.mark.slow),  # a learned variance; the negative rows come last
    ("wan22", GUIDED, 0.0),  # two denoisers, and the negative prompt has a call of its own
    pytest.param("z-image", OUTPUT, 0.5, marks=pytest.mark.slow),  # answers in a list
]


@pytest.mark.parametrize("name, objective, dropout", CASES)
def test_losses_are_those_of_a_teacher_that_runs(tmp_path, name, objective, dropout):
    folder, prompts = save(name, tmp_path / name), None
    if PIPELINES[name].text:
        prompts = str(tmp_path / "prompts.txt")
        (tmp_path / "prompts.txt").write_text("\n".join(prompts_of(PIPELINES[name])))
    kept, found = losses(Recovery, folder, tmp_path, prompts, objective, dropout)
    live, wanted = losses(Taught, folder, tmp_path, prompts, objective, dropout)
    assert kept.frozen.teacher is None and live.frozen.teacher is not None
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3) and mine["loss"] > 0
    own = live.frozen.counts[1]
    assert own is not None and kept.batch_flops < live.batch_flops


@pytest.fixture
def recorded(pipe_folder, tmp_path):
    """A data module and its recording."""
    data = TrajectoryDataModule(str(pipe_folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4)
    data.prepare_data()
    return data, open_trajectories(tmp_path / "traj")


def test_what_is_kept_is_kept_once(pipe_folder, tmp_path, recorded):
    """Embeds by prompt, not by step; the negative prompt's, which all share, in one row; and once for all runs."""
    data, recording = recorded
    stored = load_file(tmp_path / "traj" / TENSORS)
    for name, tensor in recording.embeds.items():
        assert tensor.shape == (4, *stored[f"embeds.{name}"].shape[1:])
        assert len(stored[f"embeds.{name}"]) == (1 if name.startswith("negative_") else 4)
    told = PromptEncoder(obsdiff.load_pipeline(pipe_folder))(data.prompts)
    assert told.keys() == recording.embeds.keys() >= {"negative_encoder_hidden_states"}
    for name, tensor in recording.embeds.items():
        torch.testing.assert_close(tensor, told[name])
    before = (tmp_path / "traj" / TENSORS).stat().st_mtime_ns
    other = TrajectoryDataModule(str(pipe_folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=2)
    assert not other.prepare_data_per_node  # one process of all, not one of each machine
    other.prepare_data()
    assert (tmp_path / "traj" / TENSORS).stat().st_mtime_ns == before


@pytest.mark.parametrize("extra", ["distill_features", "distill_jacobian"])
def test_what_needs_more_than_answers_runs_the_teacher(pipe_folder, tmp_path, recorded, extra):
    module = recovery(pipe_folder, tmp_path / "run", objective=Objective(distill_output=1.0, **{extra: 0.1}))
    trainer(tmp_path, max_steps=1).fit(module, datamodule=recorded[0])
    assert module.frozen.teacher is not None


def test_a_teacher_that_nobody_asks_is_neither_kept_nor_charged(pipe_folder, tmp_path, recorded):
    seen = []

    class Watched(Recovery):
        def needs_teacher(self, dense):
            seen.append(weakref.ref(dense.denoiser))
            return super().needs_teacher(dense)

        def on_train_start(self):
            gc.collect()
            assert seen[0]() is None

    budget = Budget(steps=2)
    module = recovery(pipe_folder, tmp_path / "run", Watched, objective=OUTPUT)
    trainer(tmp_path, max_steps=-1, callbacks=[budget]).fit(module, datamodule=recorded[0])
    assert module.frozen.counts[1] is None and len(seen) == 1
    one = module.frozen.flops[0] * 4
    assert budget.report()["used"]["recovery"]["denoiser_flops"] == 2 * 3 * one


def test_another_denoiser_is_no_teacher_of_these(pipe_folder, recorded):
    recording = recorded[1]
    pipe = obsdiff.load_pipeline(pipe_folder)
    assert has_answers(subject_of(pipe), recording)
    assert not has_answers(subject_of(pipe), None)
    assert not has_answers(subject_of(pipe), replace(recording, negative_answers=None))
    untold = {name: tensor for name, tensor in recording.embeds.items() if not name.startswith("negative_")}
    assert has_answers(subject_of(pipe), replace(recording, negative_answers=None, embeds=untold))
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1e-3
    assert not has_answers(subject_of(pipe), recording)
    assert not has_answers(subject_of(make_pipe(blocks=2)), recording)
    half = obsdiff.load_pipeline(pipe_folder, dtype="bfloat16")
    assert not has_answers(subject_of(half), recording)


def test_guidance_that_pauses_leaves_no_negative_answers(tmp_path):
    """Some pipelines do without guidance in their last steps; then dropped prompts need the teacher."""
    row = PIPELINES["lumina2"]
    pipe = row.build()
    kind = type(pipe)

    class Pausing(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args, **given):
            return super().__call__(*args, **given, cfg_trunc_ratio=0.5)

    Pausing.__name__ = kind.__name__
    pipe.__class__ = Pausing
    record_trajectories(pipe, prompts_of(row), tmp_path / "paused", batch_size=2)
    found = open_trajectories(tmp_path / "paused")
    assert found.negative_answers is None and found.answers.shape == found.latents.shape
    assert any(name.startswith("negative_") for name in found.embeds)
    assert not has_answers(subject_of(pipe), found)


def test_a_recording_without_answers_is_refused(pipe_folder, tmp_path, recorded):
    index = read_json(tmp_path / "traj" / INDEX, "a recording")
    write_json(tmp_path / "traj" / INDEX, {key: value for key, value in index.items() if key != "format"})
    module = recovery(pipe_folder, tmp_path / "run", objective=OUTPUT)
    with pytest.raises(UserError, match=r"earlier version, without answers; delete it and record again"):
        trainer(tmp_path).fit(module, datamodule=recorded[0])
    assert not (tmp_path / "run").exists()


def test_a_batch_without_its_answer_is_refused(pipe_folder, tmp_path, recorded):
    class Bare(TrajectoryDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            batch.pop("answer", None) if isinstance(batch, dict) else None
            return batch

    data = Bare(str(pipe_folder), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4)
    module = recovery(pipe_folder, tmp_path / "run", objective=OUTPUT)
    with pytest.raises(UserError, match="needs their answer; it has"):
        trainer(tmp_path).fit(module, datamodule=data)
