"""The same masks on a GPU as on the CPU, by every way of calibrating; and what only a GPU shows."""

import json

import pytest
import torch

import obsdiff
from obsdiff.allocation.fitting import plan_from_configs, plan_loaded
from obsdiff.cli.main import main
from obsdiff.memory import is_out_of_memory, peak_memory_bytes
from obsdiff.models.subject import subject_of
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.pattern import NM, Unstructured
from obsdiff.obs.precision import offers
from obsdiff.obs.select import SORTED, count_each, drop_lowest
from obsdiff.obs.sweep import sweep
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions
from tests.conftest import make_pipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_masks_agree_with_the_cpu(prompts, pattern):
    masks = []
    for device in ("cpu", "cuda"):
        pipe = make_pipe().to(device)
        report = obsdiff.prune(pipe, pattern, statistics=obsdiff.calibrate(pipe, prompts))
        masks.append(report.masks)
    agree = [float((masks[0][name] == masks[1][name]).float().mean()) for name in masks[0]]
    assert min(agree) > 0.98  # rounding may swap near ties


def test_half_precision_calibrates(prompts):
    pipe = make_pipe().to("cuda", torch.float16)
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=obsdiff.calibrate(pipe, prompts))
    assert report.mean_layer_error < 0.5


def test_products_in_tf32(prompts):
    if not offers("tf32", torch.device("cuda")):
        pytest.skip("no tensor cores for it")
    assert not offers("bfloat16", torch.device("cuda"))
    exact, rounded = (obsdiff.calibrate(make_pipe().to("cuda"), prompts, needs=n) for n in (["gram"], ["gram", "tf32"]))
    changed = 0
    for name in exact:
        one, other = (statistics.site(name).hessian() for statistics in (exact, rounded))
        assert float((one - other).norm() / one.norm()) < 1e-3
        changed += not torch.equal(one, other)
    assert changed > 0
    errors = [obsdiff.prune(make_pipe().to("cuda"), "2:4", statistics=s).mean_layer_error for s in (exact, rounded)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_stage_by_stage_too(prompts, pattern):
    masks = []
    for device in ("cpu", "cuda"):
        pipe = make_pipe().to(device)
        masks.append(obsdiff.prune(pipe, pattern, statistics=obsdiff.stream(pipe, prompts)).masks)
    agree = [float((masks[0][name] == masks[1][name]).float().mean()) for name in masks[0]]
    assert min(agree) > 0.98


def test_a_calibration_waits_for_the_device_once_a_call(prompts, monkeypatch):
    waits = []
    wait = torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: (waits.append(given), wait(*given)))
    statistics = obsdiff.calibrate(make_pipe().to("cuda"), prompts, steps=3, batch_size=len(prompts))
    assert 0 < statistics.time_s["forward_only"] < statistics.time_s["calibrate"]
    assert len(waits) < len(statistics.sites)  # 3 calls; twice for each site of each call would be many


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_a_sweep_agrees_with_the_cpu(pattern):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 312, generator=generator) @ torch.randn(312, 312, generator=generator)
    weight, factor = torch.randn(5000, 312, generator=generator), upper_factor(x.T @ x / len(x))[0]
    [(one, mask)] = sweep([weight], factor, [pattern], even=False)
    [(other, other_mask)] = sweep([weight.cuda()], factor.cuda(), [pattern], even=False)
    assert float((mask == other_mask.cpu()).float().mean()) > 0.999
    assert float((one - other.cpu()).norm() / one.norm()) < 0.01


@pytest.mark.parametrize("size", [1000, SORTED + 1])
def test_a_selection_is_that_of_the_cpu(size):
    scores = (torch.rand(size, generator=torch.Generator().manual_seed(0)) * 1000).round()  # many are equal
    assert torch.equal(drop_lowest(scores.cuda(), size // 3).cpu(), drop_lowest(scores, size // 3))
    halves = [(scores < 500).cuda(), (scores < 10).cuda()]
    assert count_each(halves) == [int(half.sum()) for half in halves]


def test_more_than_the_device_has_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(raised.value)


def test_a_measured_prune_and_a_recovery_by_the_command_line(pipe_folder, tmp_path):
    main(
        ["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "pruned"), "--device", "cuda",
         "--pattern", "unstructured:0.5", "--scan.by", "backward", "--calibration.num_prompts", "4",
         "--reconstruction.steps", "2", "--reconstruction.batch_size", "4", "--evaluation.num_images", "4"]
    )  # fmt: skip
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert report["evaluation"]["pruned"]["mse"] > 0 and report["device"].startswith("cuda")
    main(
        ["train", "fit", "--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.max_epochs=-1",
         "--trainer.precision=bf16-mixed", "--budget.steps=3", "--model=obsdiff.training.recovery.Recovery",
         f"--model.pipeline={tmp_path / 'pruned'}", f"--model.output={tmp_path / 'run'}", "--model.pruning=null",
         "--model.objective.distill_output=1", "--model.evaluation.num_images=2",
         "--data=obsdiff.data.trajectories.TrajectoryDataModule", f"--data.pipeline={pipe_folder}",
         f"--data.folder={tmp_path / 'traj'}", "--data.prompts=digits-train", "--data.num_prompts=4",
         "--data.batch_size=4"]
    )  # fmt: skip
    assert (tmp_path / "run" / "recovered" / "report.json").exists()


def test_blocks_that_take_turns_are_solved_on_the_device(prompts):
    there, pipe = make_pipe().to("cuda"), obsdiff.offload(make_pipe(), "cuda")
    wanted = obsdiff.prune(there, "unstructured:0.5", statistics=obsdiff.stream(there, prompts))
    found = obsdiff.prune(pipe, "unstructured:0.5", statistics=obsdiff.stream(pipe, prompts))
    assert all(torch.equal(found.masks[name], mask) for name, mask in wanted.masks.items())
    blocks = pipe.transformer.transformer_blocks
    assert sum(next(block.parameters()).is_cuda for block in blocks) <= 1


@pytest.mark.parametrize(("streamed", "offload"), [(False, False), (True, False), (True, True)])
def test_the_device_holds_what_was_planned(streamed, offload):
    """On a model whose weights and Hessians outweigh what CUDA itself takes."""
    pipe = obsdiff.load_pipeline("emoji-sd3", device="cpu" if offload else "cuda")
    pipe = obsdiff.offload(pipe, "cuda") if offload else pipe
    calibration = CalibrationOptions(num_prompts=32, batch_size=32, streamed=streamed)
    asked = PruneOptions(
        pipeline="emoji-sd3", output="-", pattern="unstructured:0.5", allocation="uniform", calibration=calibration,
        evaluation=EvaluationOptions(num_images=0), offload=offload,
    )  # fmt: skip
    planned = (plan_from_configs(asked, "cuda") if offload else plan_loaded(subject_of(pipe), asked)).memory
    torch.cuda.reset_peak_memory_stats()
    prompts = obsdiff.load_prompts("emoji-train", num=32)
    found = (obsdiff.stream if streamed else obsdiff.calibrate)(pipe, prompts, batch_size=32)
    obsdiff.prune(pipe, "unstructured:0.5", statistics=found)
    assert 0.8 < planned.device_bytes / peak_memory_bytes("cuda") < 1.2
