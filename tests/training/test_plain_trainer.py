"""A recovery in a user's own trainer: zeros stay zeros without a word about callbacks."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from obsdiff.callbacks.ema import EMA, averaged_weights
from obsdiff.callbacks.mask import MaskEnforcement
from obsdiff.data.digits import DigitsDataModule
from obsdiff.errors import UserError
from obsdiff.pruning.options import EvaluationOptions, PruningOptions
from obsdiff.training.options import Objective, Optimization
from obsdiff.training.recovery import Recovery


def recovery(pipe_folder, output, kind=Recovery, **changes):
    options = {
        "objective": Objective(denoise=1.0),
        "optimization": Optimization(lr=1e-3, weight_decay=0.1, warmup_steps=1),
        "evaluation": EvaluationOptions(num_images=0),
        **changes,
    }
    pruning = PruningOptions(pattern="unstructured:0.5", method="magnitude", spare_blocks=[])
    return kind(str(pipe_folder), str(output), pruning, **options)


def trainer(tmp_path, **changes):
    options = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False, **changes}
    return lightning.Trainer(
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **options
    )


def came_back(module):
    """Layers with a masked weight that is not zero."""
    own = dict(module.denoiser.named_parameters())
    masks = module.named_masks()
    assert masks
    return [name for name, kept in masks.items() if bool((own[name][~kept] != 0).any())]


def fit(module, runner):
    before = None

    class Remember(lightning.Callback):
        def on_train_start(self, *_):
            nonlocal before
            before = {name: p.detach().clone() for name, p in module.denoiser.named_parameters()}

    runner.callbacks.append(Remember())
    runner.fit(module, datamodule=DigitsDataModule(batch_size=4))
    changed = [name for name, p in module.denoiser.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > len(before) // 2  # something was trained
    return module


@pytest.mark.parametrize("optimizer", ["its own", "a subclass's"])
def test_zeros_stay_zeros_in_a_plain_trainer(pipe_folder, tmp_path, optimizer):
    class Own(Recovery):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    kind = Recovery if optimizer == "its own" else Own
    runner = trainer(tmp_path)
    module = fit(recovery(pipe_folder, tmp_path / "run", kind), runner)
    assert came_back(module) == []
    assert sum(isinstance(callback, MaskEnforcement) for callback in runner.callbacks) == 1


def test_callbacks_of_the_user_are_kept(pipe_folder, tmp_path):
    class Mine(MaskEnforcement):
        pass

    mine, average = Mine(), EMA(decay=0.5)
    runner = trainer(tmp_path, callbacks=[average, mine])
    module = fit(recovery(pipe_folder, tmp_path / "run"), runner)
    assert [c for c in runner.callbacks if isinstance(c, MaskEnforcement | EMA)] == [average, mine]
    assert came_back(module) == []
    trained = {name: p.detach().clone() for name, p in module.denoiser.named_parameters()}
    with averaged_weights(runner, module):
        assert came_back(module) == []
        assert not all(torch.equal(p, trained[name]) for name, p in module.denoiser.named_parameters())


def test_a_checkpoint_of_a_plain_trainer_holds_zeros(pipe_folder, tmp_path):
    runner = trainer(tmp_path, enable_checkpointing=True)
    module = fit(recovery(pipe_folder, tmp_path / "run"), runner)
    saved = torch.load(runner.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    for name, kept in module.named_masks().items():
        assert bool((saved[f"denoiser.{name}"][~kept] == 0).all())


def test_nothing_holding_the_masks_is_refused(pipe_folder, tmp_path):
    class Careless(Recovery):
        def configure_callbacks(self):
            return []

    with pytest.raises(RuntimeError, match="nothing holds the masks"):
        trainer(tmp_path).fit(recovery(pipe_folder, tmp_path / "run", Careless), datamodule=DigitsDataModule(4))


def test_averaging_that_knows_no_pruning_is_refused_before_pruning(pipe_folder, tmp_path):
    runner = trainer(tmp_path, callbacks=[EMAWeightAveraging()])
    with pytest.raises(UserError, match=r"use obsdiff\.callbacks\.ema\.EMA"):
        runner.fit(recovery(pipe_folder, tmp_path / "run"), datamodule=DigitsDataModule(4))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_module_is_validated_trained_and_trained_again(pipe_folder, tmp_path):
    both = {"objective": Objective(distill_output=1.0, denoise=1.0), "evaluation": EvaluationOptions(num_images=1)}
    fit(recovery(pipe_folder, tmp_path / "run", **both), trainer(tmp_path))  # so that there is a pruned pipeline
    module = recovery(pipe_folder, tmp_path / "run", **both)
    [measured] = trainer(tmp_path).validate(module, datamodule=DigitsDataModule(batch_size=4))
    assert measured["val/mse"] > 0
    fit(module, trainer(tmp_path, precision="bf16-true"))
    again = fit(module, trainer(tmp_path, precision="bf16-true"))
    assert came_back(again) == []
