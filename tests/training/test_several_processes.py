"""Two gloo processes on the CPU: the same masks as one, and zeros that stay zeros under DDP and FSDP2."""

import json
import os
import subprocess
import sys

import pytest
import torch

import obsdiff
from tests.training.common import ROOT, arguments, assert_zero, measurable

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def run_two(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*TORCHRUN, *map(str, args)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


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


FSDP = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.save_distributed_checkpoint=false",
)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(("--trainer.strategy=ddp",), id="ddp", marks=pytest.mark.slow), pytest.param(FSDP, id="fsdp2")],
)
def test_zeros_survive_two_processes(pipe_folder, tmp_path, strategy):
    extra = (*strategy, "--trainer.devices=2", "--ema=obsdiff.callbacks.ema.EMA", "--ema.decay=0.5")
    run_two(ROOT / "train.py", "fit", *arguments(pipe_folder, tmp_path / "run", *extra))
    assert_zero(tmp_path / "run")
