"""Going on from a checkpoint with other settings, and kept things whose content changed under the same name."""

import shutil
from dataclasses import replace

import pytest
import torch

import obsdiff
from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.checkpoint import LastCheckpoint
from obsdiff.callbacks.ema import EMA
from obsdiff.data.digits import DigitsDataModule
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.errors import UserError
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions
from obsdiff.training.options import Objective, Optimization
from obsdiff.training.recovery import Recovery
from obsdiff.training.stage import request_in, request_of
from tests.training.test_plain_trainer import recovery, trainer


def run(pipe_folder, tmp_path, steps, data=None, callbacks=(), runner=None, resume=False, **changes):
    module = recovery(pipe_folder, tmp_path / "run", **changes)
    parts = [Budget(steps=steps), LastCheckpoint(tmp_path / "run" / "checkpoints", 1), *callbacks]
    started = trainer(tmp_path, enable_checkpointing=True, max_steps=-1, callbacks=parts, **(runner or {}))
    path = str(tmp_path / "run" / "checkpoints" / "last.ckpt") if resume else None
    started.fit(module, datamodule=data or DigitsDataModule(batch_size=4), ckpt_path=path)
    return started, module


def other(**changes):
    return Optimization(**{"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 1, **changes})


@pytest.fixture(scope="module")
def interrupted(pipe_folder, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    run(pipe_folder, folder, 2)
    return folder


CHANGES = [
    ({"objective": Objective(denoise=1.0, distill_output=1.0)}, "objective"),
    ({"optimization": other(lr=1e-2)}, r"optimization\.lr \(0\.001 there, 0\.01 here\)"),
    ({"optimization": other(schedule="constant")}, r"optimization\.schedule"),
    ({"optimization": other(betas=(0.9, 0.999))}, r"optimization\.betas"),
    ({"seed": 7}, r"seed \(0 there, 7 here\)"),
    ({"prompt_dropout": 0.5}, "prompt_dropout"),
    ({"data": DigitsDataModule(batch_size=8)}, r"data\.batch_size \(4 there, 8 here\)"),
    ({"data": DigitsDataModule(batch_size=4, seed=3)}, r"data\.seed"),
    ({"callbacks": [EMA(0.5)]}, r"ema\.decay \(None there, 0\.5 here\)"),
    ({"runner": {"accumulate_grad_batches": 2}}, r"trainer\.accumulate_grad_batches"),
]


@pytest.mark.parametrize(
    "changes, word",
    [pytest.param(*c, id=c[1], marks=() if i % 3 == 0 else pytest.mark.slow) for i, c in enumerate(CHANGES)],
)
def test_other_settings_are_named_and_refused(pipe_folder, interrupted, changes, word):
    with pytest.raises(UserError, match=word) as found:
        run(pipe_folder, interrupted, 4, resume=True, **changes)
    assert "--model.resume_changed true" in str(found.value) and "\n" not in str(found.value)


def test_a_raised_budget_is_no_difference(pipe_folder, interrupted, tmp_path):
    shutil.copytree(interrupted / "run", tmp_path / "run")
    started, _ = run(pipe_folder, tmp_path, 4, resume=True)
    assert started.global_step == 4


def test_other_settings_have_their_effect_when_asked_for(pipe_folder, interrupted, tmp_path):
    shutil.copytree(interrupted / "run", tmp_path / "run")
    changed = other(lr=1e-2, schedule="constant", weight_decay=0.3)
    with pytest.warns(UserWarning, match=r"optimization\.lr"):
        started, _ = run(pipe_folder, tmp_path, 4, resume=True, optimization=changed, resume_changed=True)
    [group] = started.optimizers[0].param_groups
    assert started.global_step == 4 and group["lr"] == 1e-2 and group["weight_decay"] == 0.3


def change(folder, name):
    """One weight of a component becomes another."""
    pipe = obsdiff.load_pipeline(folder)
    with torch.no_grad():
        next(getattr(pipe, name).parameters()).flatten()[0] += 1
    getattr(pipe, name).save_pretrained(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_dense_pipeline_that_changed_serves_nothing(pipe_folder, tmp_path, component):
    shutil.copytree(pipe_folder, tmp_path / "dense")
    run(tmp_path / "dense", tmp_path, 1)
    change(tmp_path / "dense", component)
    with pytest.raises(UserError, match=f"{component} of .*dense changed since"):
        run(tmp_path / "dense", tmp_path, 1)
    folders = str(tmp_path / "run" / "pruned"), str(tmp_path / "other")
    pruned = Recovery(*folders, objective=Objective(distill_output=1.0))
    with pytest.raises(UserError, match=f"{component} of .*dense changed since .* was pruned from it"):
        trainer(tmp_path).fit(pruned, datamodule=DigitsDataModule(4))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_prompts_that_changed_prune_again_only_when_asked(pipe_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    pruning = PruningOptions(
        pattern="unstructured:0.5",
        method="wanda",
        spare_blocks=[],
        calibration=CalibrationOptions(prompts=str(prompts), num_prompts=2),
    )

    def start(words, **changes):
        prompts.write_text(words)
        evaluation = EvaluationOptions(num_images=0)
        module = Recovery(str(pipe_folder), str(tmp_path / "run"), pruning, evaluation=evaluation, **changes)
        trainer(tmp_path, max_steps=1).fit(module, datamodule=DigitsDataModule(4))
        return module.start.content["transformer"]

    first = start("a two\na seven\n")
    assert start("a two\na seven\n") == first
    with pytest.raises(UserError, match="the content of the prompts changed since"):
        start("a nine\na one\n")


@pytest.mark.slow
def test_references_are_drawn_again_when_anything_upstream_changed(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.evaluation import references

    drawn = []
    real = references.draw
    monkeypatch.setattr(references, "draw", lambda *args, **more: drawn.append(1) or real(*args, **more))
    shutil.copytree(pipe_folder, tmp_path / "dense")
    evaluation = EvaluationOptions(num_images=1)

    def start():
        module = Recovery(str(tmp_path / "dense"), str(tmp_path / "run"), None, Objective(denoise=1.0),
                          evaluation=evaluation)  # fmt: skip
        trainer(tmp_path, max_steps=1).fit(module, datamodule=DigitsDataModule(4))
        return len(drawn)

    assert start() == 2 and start() == 2
    change(tmp_path / "dense", "vae")
    assert start() == 4


@pytest.mark.slow
def test_trajectories_of_a_pipeline_that_changed_are_refused_before_pruning(pipe_folder, tmp_path):
    shutil.copytree(pipe_folder, tmp_path / "dense")

    def data():
        return TrajectoryDataModule(
            str(tmp_path / "dense"), str(tmp_path / "traj"), "digits-train", num_prompts=4, batch_size=4
        )

    distil = {"objective": Objective(distill_output=1.0)}
    run(tmp_path / "dense", tmp_path, 1, data(), **distil)
    change(tmp_path / "dense", "text_encoder_2")
    with pytest.raises(UserError, match=r"trajectories in .* belong to another model .*: text_encoder_2"):
        module = recovery(tmp_path / "dense", tmp_path / "other", **distil)
        trainer(tmp_path).fit(module, datamodule=data())
    assert not (tmp_path / "other").exists()


def test_an_option_that_came_since_is_no_difference():
    """A run of an earlier version goes on where nothing asks for what that version did not have."""
    request = request_of("some-pipeline", PruningOptions(calibration=CalibrationOptions(num_prompts=7)))
    earlier = {**request, "calibration": {k: v for k, v in request["calibration"].items() if k != "precision"}}
    del earlier["fusion"]
    assert request_in({"request": earlier}) == request and request_in({}) == {}
    assert request_in({"request": {**earlier, "content": {"vae": "x"}}})["content"] == {"vae": "x"}
    asked = request_of("some-pipeline", PruningOptions(calibration=CalibrationOptions(num_prompts=7, precision="tf32")))
    assert request_in({"request": earlier}) != asked


def test_where_calls_wait_is_no_difference(tmp_path):
    """The result is the same to the bit; batches change the order of sums."""
    calibration = CalibrationOptions(streamed=True)
    request = request_of("some-pipeline", PruningOptions(calibration=calibration))
    away = request_of("some-pipeline", PruningOptions(calibration=replace(calibration, calls_on_disk=True)))
    assert away == request
    earlier = {**request, "calibration": {**request["calibration"], "calls_on_disk": True}}  # as it was kept once
    assert request_in({"request": earlier}) == request
    batches = request_of("some-pipeline", PruningOptions(calibration=replace(calibration, batch_size=2)))
    assert batches != request
