"""Evaluating and exporting: without dropout, and never at the price of the finished recovery."""

import json

import pytest
import torch

import obsdiff
from obsdiff.callbacks.export import Export
from obsdiff.data.digits import DigitsDataModule
from obsdiff.errors import UserError
from obsdiff.pruning.options import EvaluationOptions
from tests.training.test_plain_trainer import recovery, trainer

ONE = EvaluationOptions(num_images=2)


class Watch(Export):
    """Sees in which mode the denoiser is after the result is written."""

    def on_train_end(self, runner, module):
        super().on_train_end(runner, module)
        self.training = {part.training for part in module.denoiser.modules()}


def test_images_are_drawn_in_eval_mode_and_training_goes_on_in_train_mode(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.evaluation import references

    modes = []
    real = references.sample

    def watched(pipe, *args, **kwargs):
        models = (pipe.transformer, pipe.vae, pipe.text_encoder)
        modes.append({part.training for model in models for part in model.modules()})
        return real(pipe, *args, **kwargs)

    monkeypatch.setattr(references, "sample", watched)
    watch = Watch()
    runner = trainer(tmp_path, callbacks=[watch], limit_val_batches=0)
    runner.fit(recovery(pipe_folder, tmp_path / "run", evaluation=ONE), datamodule=DigitsDataModule(4))
    assert len(modes) == 6 and all(found == {False} for found in modes)  # dense, pruned, recovered; with and without
    assert watch.training == {True}


def test_figures_that_are_not_finite_do_not_lose_the_recovery(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.training import recovery as module

    real = module.draw

    def spoilt(*args, **options):
        images = real(*args, **options)
        images.guided[0, 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(module, "draw", spoilt)
    runner = trainer(tmp_path, callbacks=[Export()], limit_val_batches=0)
    with pytest.warns(UserWarning, match="not finite"):
        runner.fit(recovery(pipe_folder, tmp_path / "run", evaluation=ONE), datamodule=DigitsDataModule(4))
    folder = tmp_path / "run" / "recovered"
    figures = json.loads((folder / "report.json").read_text())["evaluation"]
    assert figures["recovered"]["mse"] is None and figures["recovered"]["frechet"] is None
    assert figures["pruned"]["mse"] > 0 and figures["recovered"]["not_finite"] > 0
    assert "not finite" in (folder / "report.md").read_text()
    assert bool(torch.isfinite(obsdiff.sample(obsdiff.load_pipeline(folder), ["a two"], [0])).all())


def test_an_evaluation_that_fails_does_not_lose_the_recovery(pipe_folder, tmp_path, monkeypatch):
    module = recovery(pipe_folder, tmp_path / "run", evaluation=ONE)

    def failing():
        raise UserError("no images today")

    monkeypatch.setattr(module, "draw_all", failing)
    runner = trainer(tmp_path, callbacks=[Export()], limit_val_batches=0)
    with pytest.warns(UserWarning, match="written without figures: no images today"):
        runner.fit(module, datamodule=DigitsDataModule(4))
    assert (tmp_path / "run" / "recovered" / "pipeline").is_dir()
