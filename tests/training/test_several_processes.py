"""Two gloo processes on the CPU: the same masks as one, and zeros that stay zeros under DDP and FSDP2."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import obsdiff
from obsdiff.cli.train import main
from obsdiff.errors import UserError
from obsdiff.training.sharding import check_mesh, check_shardable
from tests.training.common import ROOT, arguments, assert_zero, measurable, result

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
EMA = ("--ema=obsdiff.callbacks.ema.EMA", "--ema.decay=0.5")


def run_two(*args):
    run_on(2, *args)


def run_on(count, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={count}", *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_one_and_two_processes_prune_and_measure_alike(pipe_folder, tmp_path):
    run_two(ROOT / "tests" / "training" / "several.py", pipe_folder, tmp_path)
    prompts = obsdiff.load_prompts("digits-train", num=4)
    for pattern in ("unstructured:0.5", "structured:0.5"):
        pipe = obsdiff.load_pipeline(pipe_folder)
        report = obsdiff.prune(
            pipe, pattern, statistics=obsdiff.calibrate(pipe, prompts, batch_size=2), spare_blocks=[]
        )
        for rank in range(2):
            weights, masks = torch.load(tmp_path / f"{pattern}-{rank}.pt", weights_only=True)
            assert masks.keys() == report.masks.keys()
            assert all(torch.equal(masks[name], report.masks[name]) for name in masks)
            for name, tensor in pipe.transformer.state_dict().items():
                torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    measured, images, dense, prompts = measurable()
    alone = measured.measure(images, prompts, dense)
    for rank in range(2):
        together = json.loads((tmp_path / f"figures-{rank}.json").read_text())
        assert together.keys() == alone.keys() >= {"mse", "alignment", "frechet", "kid", "recall"}
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=1e-9), name
        assert (tmp_path / f"exchanged-{rank}").exists()  # what it checks of the exchange itself held


MESH = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"


def fsdp(count, shards="false"):
    """Weights split over so many processes."""
    own = "--trainer.strategy."
    sizes = (f"{own}data_parallel_size={count}", f"{own}tensor_parallel_size=1")
    return (MESH, *sizes, f"{own}save_distributed_checkpoint={shards}")


@pytest.mark.parametrize(
    ("sizes", "nodes", "weights", "message"),
    [
        ({}, 1, ["distill_output"], "data_parallel_size 4 --trainer.strategy.tensor_parallel_size 1"),
        ({}, 4, ["distill_output"], None),
        ({"data_parallel_size": 4, "tensor_parallel_size": 1}, 1, ["distill_output"], None),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, 1, ["distill_output"], "is 2, of 4 processes"),
        ({"data_parallel_size": 4, "tensor_parallel_size": 1}, 1, ["distill_jacobian"], "use --trainer.strategy ddp"),
    ],
)
def test_a_mesh_splits_over_all_processes(sizes, nodes, weights, message):
    strategy = ModelParallelStrategy(**sizes)
    strategy.num_nodes = nodes
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_mesh(strategy, 4, weights)
    check_mesh(DDPStrategy(), 4, weights)


def test_two_denoisers_are_not_split():
    two = SimpleNamespace(components={"transformer": None, "transformer_2": None})
    with pytest.raises(UserError, match="transformer and transformer_2 cannot be split together"):
        check_shardable(ModelParallelStrategy(), two)
    check_shardable(DDPStrategy(), two)


@pytest.mark.slow
def test_a_mesh_that_would_split_nothing_is_refused(pipe_folder, tmp_path):
    """Lightning's own sizes are those of tensor parallelism: every process would train alone."""
    split = (MESH, "--trainer.strategy.save_distributed_checkpoint=false", "--trainer.devices=2")
    given = arguments(pipe_folder, tmp_path / "run", *split)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(ROOT / "train.py"), "fit", *given]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    wanted = "--trainer.strategy.data_parallel_size 2 --trainer.strategy.tensor_parallel_size 1"
    assert done.returncode == 2 and wanted in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("--trainer.strategy=ddp",), fsdp(2)], ids=["ddp", "fsdp2"])
def test_zeros_survive_two_processes(pipe_folder, tmp_path, strategy):
    extra = (*strategy, "--trainer.devices=2", *EMA)
    run_two(ROOT / "train.py", "fit", *arguments(pipe_folder, tmp_path / "run", *extra))
    assert_zero(tmp_path / "run")


@pytest.mark.slow
def test_a_teacher_that_runs_is_split_over_processes(pipe_folder, tmp_path):
    """FSDP2 trains with half of the teacher on each process what DDP trains with all of it on both."""
    terms = ("--model.objective.distill_features=1", "--trainer.devices=2")
    look = "--trainer.callbacks+=tests.training.common.TeacherShare"
    for name, strategy in (("ddp", ("--trainer.strategy=ddp",)), ("fsdp", fsdp(2))):
        given = arguments(pipe_folder, tmp_path / name, *strategy, *terms, look, steps=3)
        run_two(ROOT / "train.py", "fit", *given)
    assert (tmp_path / "ddp" / "share").read_text() == "1.00"
    assert (tmp_path / "fsdp" / "share").read_text() == "0.50"
    found, wanted = result(tmp_path / "fsdp"), result(tmp_path / "ddp")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["true", "false"])
def test_checkpoints_resume_on_another_number_of_processes(pipe_folder, tmp_path, shards):
    """Two processes, then one, then two again; what the one trains is what it trains without any strategy."""
    run, options = tmp_path / "run", {"images": False, "folder": tmp_path / "traj"}
    extra = (*EMA, "--model.pruning.method=magnitude", "--model.evaluation.num_images=0")
    going_on = ("--model.resume_changed=true", "--ckpt_path=last")
    last = run / "checkpoints" / "last.ckpt"

    def fit_on(count, steps, *more):
        split = (*fsdp(count, shards), f"--trainer.devices={count}")
        given = arguments(pipe_folder, run, *extra, *split, *more, steps=steps, **options)
        run_on(count, ROOT / "train.py", "fit", *given)
        assert last.is_dir() is (shards == "true")
        assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]

    fit_on(2, 2)
    if shards == "false":
        shutil.copytree(run, tmp_path / "alone")
        main(["fit", *arguments(pipe_folder, tmp_path / "alone", *extra, *going_on, steps=4, **options)])
    fit_on(1, 4, *going_on)
    if shards == "false":
        found, wanted = result(run), result(tmp_path / "alone")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    fit_on(2, 6, *going_on)
    assert_zero(run)
    steps = optimizer_steps(last)
    assert steps and set(steps) == {6.0}


def optimizer_steps(checkpoint):
    """How often each parameter was moved, by the optimizer's own count."""
    if checkpoint.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(checkpoint, checkpoint.parent / "whole.pt")
        state = torch.load(checkpoint.parent / "whole.pt", weights_only=True)["optimizer_0"]["state"]
    else:
        state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    return [float(moved["step"]) for moved in state.values()]
