"""Training wholly in another dtype: it runs, masks stay exact, and the result is what was trained."""

import json

import pytest
import torch

import obsdiff
from obsdiff.diffusion.noising import FlowNoising
from obsdiff.models.calling import call_denoiser, drawing
from tests.training.common import assert_zero, fit, result
from tests.training.test_recovery import ALL_LOSSES, EMA

TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
QUICK = "--model.pruning.method=magnitude"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_run_in_another_dtype(pipe_folder, tmp_path, precision, monkeypatch):
    from obsdiff.training import recovery

    seen = []
    real = recovery.loss_terms

    def watched(student, teacher, weights, latents, times, *rest):
        seen.append((next(student.parameters()).dtype, next(teacher.parameters()).dtype, times))
        return real(student, teacher, weights, latents, times, *rest)

    monkeypatch.setattr(recovery, "loss_terms", watched)
    fit(pipe_folder, tmp_path / "run", *ALL_LOSSES, *EMA, QUICK, f"--trainer.precision={precision}", steps=3)
    assert_zero(tmp_path / "run")
    assert {(student, teacher) for student, teacher, _ in seen} == {(TRUE[precision], torch.float32)}
    assert all(times.dtype == torch.float32 for _, _, times in seen)
    kept = result(tmp_path / "run")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    if precision != "64-true":  # stored exactly as trained
        assert all(torch.equal(tensor, tensor.to(TRUE[precision]).float()) for tensor in kept.values())
    report = json.loads((tmp_path / "run" / "recovered" / "report.json").read_text())
    assert report["evaluation"]["recovered"]["mse"] is not None and report["recovery"]["loss"] > 0
    if precision == "16-true":
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


@pytest.mark.slow
def test_trajectories_and_checkpoints_in_half_precision(pipe_folder, tmp_path):
    extra = (
        "--trainer.precision=bf16-true",
        QUICK,
        "--model.overwrite=true",
        "--model.trained.lora_rank=2",
        "--model.objective.distill_output=1",
    )
    fit(pipe_folder, tmp_path / "run", *extra, steps=2, images=False, folder=tmp_path / "traj")
    fit(pipe_folder, tmp_path / "run", *extra, "--ckpt_path=last", steps=3, images=False, folder=tmp_path / "traj")
    assert_zero(tmp_path / "run")


def test_drawing_with_a_denoiser_in_another_dtype(pipe):
    wanted = obsdiff.sample(pipe, ["a two", "a seven"], [0, 1])
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        pipe.transformer.to(dtype)
        with drawing(pipe):
            drawn = obsdiff.sample(pipe, ["a two", "a seven"], [0, 1])
        torch.testing.assert_close(drawn, wanted, rtol=0, atol=tolerance)
        pipe.transformer.float()


def test_times_are_not_rounded(pipe):
    pipe.transformer.to(torch.bfloat16)
    told = []
    pipe.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    times = torch.tensor([601.25, 707.5])
    embeds = {"encoder_hidden_states": torch.randn(2, 20, 16), "pooled_projections": torch.randn(2, 16)}
    answer = call_denoiser(pipe.transformer, torch.randn(2, 4, 8, 8), times, embeds)
    assert answer.dtype == torch.bfloat16 and torch.equal(told[0], times)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a step
        from obsdiff.models.calling import default_dtype

        with default_dtype():
            drawn = FlowNoising().draw(5, torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(drawn, FlowNoising().draw(5, torch.Generator().manual_seed(0)))
