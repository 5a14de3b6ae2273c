"""Two gloo processes share the recording of trajectories: the file of one, also after one of them was killed."""

import os
import subprocess

import pytest

import obsdiff
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.pruning.record import INDEX, TENSORS, open_trajectories, record_trajectories
from tests.training.common import ROOT, arguments
from tests.training.test_several_processes import TORCHRUN, run_two

PROMPTS = ["a seven", "the digit two", "three", "a photo of a zero", "nine"]


@pytest.mark.slow
def test_two_processes_share_a_recording(pipe_folder, tmp_path):
    """Killed, begun again by two, killed once more, finished by one."""
    script, folder = ROOT / "tests" / "training" / "recording.py", tmp_path / "kept"
    record_trajectories(obsdiff.load_pipeline(pipe_folder), PROMPTS, tmp_path / "alone", batch_size=1)
    alone = (tmp_path / "alone" / TENSORS).read_bytes()
    run_two(script, pipe_folder, folder, 0)
    assert (folder / TENSORS).read_bytes() == alone
    assert [(tmp_path / f"drawn-{rank}").read_text() for rank in range(2)] == ["2", "3"]
    assert open_trajectories(folder).processes == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--nproc-per-node=2", str(script), str(pipe_folder), str(tmp_path / "killed"), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and not (tmp_path / "killed").exists()
    left = len(list((tmp_path / ".killed.recording").glob("*.safetensors")))
    assert 2 <= left <= 4
    record_trajectories(obsdiff.load_pipeline(pipe_folder), PROMPTS, tmp_path / "killed", batch_size=1)
    assert (tmp_path / "killed" / TENSORS).read_bytes() == alone
    assert not (tmp_path / ".killed.recording").exists()


@pytest.mark.slow
def test_a_recovery_on_two_processes_records_together(pipe_folder, tmp_path):
    quick = ("--model.pruning.method=magnitude", "--model.evaluation.num_images=0", "--data.record_batch_size=1")
    options = {"images": False, "folder": tmp_path / "together", "steps": 1}
    given = arguments(pipe_folder, tmp_path / "run", "--trainer.strategy=ddp", "--trainer.devices=2", *quick, **options)
    run_two(ROOT / "train.py", "fit", *given)
    data = TrajectoryDataModule(
        str(pipe_folder), str(tmp_path / "alone"), "digits-train", num_prompts=4, record_batch_size=1
    )
    data.prepare_data()
    assert (tmp_path / "together" / TENSORS).read_bytes() == (tmp_path / "alone" / TENSORS).read_bytes()
    assert open_trajectories(tmp_path / "together").processes == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run", "together"]
    assert (tmp_path / "together" / INDEX).exists()
