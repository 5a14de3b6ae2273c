"""An error of one process ends all of them with one message, and soon."""

import os
import subprocess

import pytest

from tests.training.common import ROOT, arguments
from tests.training.test_several_processes import TORCHRUN


@pytest.mark.slow
@pytest.mark.parametrize("where, process", [("obsdiff.training.stage.prune_stage", 1)])
def test_an_error_of_one_process_ends_all_with_one_message(pipe_folder, tmp_path, where, process):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    extra = ("--trainer.strategy=ddp", "--trainer.devices=2", "--model.pruning.method=magnitude")
    args = ["fit", *arguments(pipe_folder, tmp_path / "run", *extra)]
    script = ROOT / "tests" / "training" / "one_fails.py"
    command = [*TORCHRUN, "--nproc-per-node=2", str(script), where, str(process), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert done.stderr.count("obsdiff train: the disk of this process is gone") == 1
    assert not (tmp_path / "run" / "recovered").exists()
