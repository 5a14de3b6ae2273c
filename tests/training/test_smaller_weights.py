"""Options that save memory: other optimizers, a LoRA on bfloat16 weights, a teacher in bfloat16."""

import json

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.training.checks import check_objective, check_optimization, check_trained
from obsdiff.training.optimizers import optimizer_of, schedule_of
from obsdiff.training.options import Objective, Optimization, Trained
from tests.training.common import assert_same, assert_zero, fit, result
from tests.training.test_recovery import refused

QUICK = ("--model.pruning.method=magnitude", "--model.evaluation.num_images=2")
PATH, ARGUMENTS = "--model.optimization.optimizer", "--model.optimization.arguments"


def weights():
    return [torch.nn.Parameter(torch.ones(3))]


def test_the_optimizer_is_adamw_unless_another_is_named():
    made = optimizer_of(Optimization(lr=0.1, betas=(0.5, 0.6)), weights())
    assert type(made) is torch.optim.AdamW
    wanted = {"lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.01, "eps": 1e-8, "foreach": True}
    assert {key: made.defaults[key] for key in wanted} == wanted and not made.defaults["fused"]
    fused = optimizer_of(Optimization(arguments={"fused": True}), weights())
    assert fused.defaults["fused"] and not fused.defaults["foreach"]
    other = Optimization(optimizer="torch.optim.SGD", weight_decay=0.1, arguments={"momentum": 0.5})
    made = optimizer_of(other, weights())
    assert type(made) is torch.optim.SGD and made.defaults["momentum"] == 0.5 and made.defaults["weight_decay"] == 0.1


def test_the_schedule_goes_by_what_is_done():
    optimizer = optimizer_of(Optimization(lr=1.0, warmup_steps=2), weights())
    schedule = schedule_of(optimizer, Optimization(lr=1.0, warmup_steps=2), lambda step: step / 4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    wanted = [0.5, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5, 0]
    assert rates == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    "options, said",
    [
        (Optimization(optimizer="AdamW"), "cannot be imported"),
        (Optimization(optimizer="no.such.Thing"), "cannot be imported"),
        (Optimization(optimizer="torch.nn.Linear"), "is no torch optimizer"),
        (
            Optimization(optimizer="torch.optim.SGD", betas=(0.5, 0.5)),
            r"betas is \(0.5, 0.5\), and torch.optim.SGD has none",
        ),
        (Optimization(arguments={"lr": 1.0}), "give it as model.optimization.lr"),
        (Optimization(arguments={"momentum": 1.0}), "has momentum, which torch.optim.AdamW does not take"),
        (Optimization(arguments={"fused": True, "foreach": True}), "AdamW cannot be made with"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        check_optimization(options)


def test_dtypes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"teacher_dtype is int8; it must be float32 or bfloat16"):
        check_objective(Objective(distill_output=1.0, teacher_dtype="int8"))
    with pytest.raises(UserError, match="frozen_dtype is half; it must be float32 or bfloat16"):
        check_trained(Trained(lora_rank=2, frozen_dtype="half"))
    with pytest.raises(UserError, match=r"give model\.trained\.lora_rank"):
        check_trained(Trained(frozen_dtype="bfloat16"))
    assert check_objective(Objective(distill_output=1.0, teacher_dtype="bfloat16")) == {"distill_output": 1.0}


@pytest.mark.slow
def test_a_fused_run_resumes_and_lightnings_optimizer_is_refused(pipe_folder, tmp_path, capsys):
    options = {"images": False, "folder": tmp_path / "traj"}
    fused = (*QUICK, f"{ARGUMENTS}={{fused: true}}", "--model.optimization.schedule=constant")
    fit(pipe_folder, tmp_path / "whole", *fused, steps=4, **options)
    fit(pipe_folder, tmp_path / "parts", *fused, steps=2, **options)
    line = refused(capsys, pipe_folder, tmp_path / "parts", *QUICK, "--ckpt_path=last", steps=4, **options)
    assert "optimization.arguments ({'fused': True} there, None here)" in line
    fit(pipe_folder, tmp_path / "parts", *fused, "--ckpt_path=last", steps=4, **options)
    assert_zero(tmp_path / "parts")
    assert_same(result(tmp_path / "parts"), result(tmp_path / "whole"))
    line = refused(capsys, pipe_folder, tmp_path / "run", "--optimizer=torch.optim.SGD", "--optimizer.lr=1", **options)
    assert "--model.optimization.optimizer" in line and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lora_in_float32_on_weights_in_bfloat16(pipe_folder, tmp_path, monkeypatch, precision):
    from obsdiff.training import recovery

    seen = []
    real = recovery.loss_terms

    def watched(student, *rest):
        seen.append({(p.requires_grad, p.dtype) for p in student.parameters()})
        return real(student, *rest)

    monkeypatch.setattr(recovery, "loss_terms", watched)
    extra = (
        *QUICK,
        "--model.trained.lora_rank=2",
        f"--trainer.precision={precision}",
        "--ema=obsdiff.callbacks.ema.EMA",
    )
    options = {"images": False, "folder": tmp_path / "traj"}
    fit(pipe_folder, tmp_path / "run", *extra, "--model.trained.frozen_dtype=bfloat16", steps=3, **options)
    assert seen == [{(True, torch.float32), (False, torch.bfloat16)}] * 3
    assert_zero(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    state = {name.removeprefix("denoiser."): t for name, t in {**saved["state_dict"], **saved["ema"]}.items()}
    written, layer = result(tmp_path / "run"), "transformer_blocks.0.ff.net.2"
    change = state[f"{layer}.lora_B.recovery.weight"] @ state[f"{layer}.lora_A.recovery.weight"] * 16 / 2
    base = state[f"{layer}.base_layer.weight"].float()
    torch.testing.assert_close(written[f"{layer}.weight"], base + change * (base != 0))
    assert float(change.abs().max()) > 0


@pytest.mark.slow
def test_a_teacher_in_bfloat16(pipe_folder, tmp_path, monkeypatch):
    from obsdiff.training import recovery

    dtypes, losses = [], []
    real = recovery.loss_terms

    def watched(student, teacher, *rest):
        terms = real(student, teacher, *rest)
        dtypes.append((next(student.parameters()).dtype, next(teacher.parameters()).dtype))
        losses.append(float(sum(terms.values())))
        return terms

    monkeypatch.setattr(recovery, "loss_terms", watched)
    terms = ("--model.objective.distill_features=0.1", "--model.objective.distill_jacobian=0.1")
    for name, extra in (("float32", ()), ("bfloat16", ("--model.objective.teacher_dtype=bfloat16",))):
        fit(pipe_folder, tmp_path / name, *QUICK, *terms, *extra, "--model.objective.distill_output=1", steps=2)
    assert dtypes == [(torch.float32, torch.float32)] * 2 + [(torch.float32, torch.bfloat16)] * 2
    assert losses[0] == pytest.approx(losses[2], rel=0.02) and losses[0] != losses[2]
    report = json.loads((tmp_path / "bfloat16" / "recovered" / "report.json").read_text())
    assert report["evaluation"]["recovered"]["mse"] is not None
