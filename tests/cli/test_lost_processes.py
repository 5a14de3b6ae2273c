"""``obsdiff prune`` under torchrun where one process fails or is killed: all end soon, each that can with one line, and
the next run goes on from what was solved."""

import json
import os
import subprocess
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from obsdiff.cli.main import main
from tests.cli.test_commands import QUICK, ROOT, UNSEEN
from tests.training.test_several_processes import TORCHRUN, run_two

LOST = "obsdiff prune: another process of this run has ended (its own line says why, unless it was killed)"
MEASURING, SOLVING = "obsdiff.pruning.collect.Collector.begin", "obsdiff.pruning.apply.solve_site"


def options_for(pipe_folder):
    more = ["--pattern", "unstructured:0.6", "--calibration.streamed", "true", "--calibration.batch_size", "1"]
    return ["--pipeline", str(pipe_folder), *QUICK, *UNSEEN, *more]


def lose(*args, process=1):
    """What is said by two processes, of which one is lost, torchrun's own words left out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    what, where, call, *rest = map(str, args)
    command = [*TORCHRUN, "--nproc-per-node=2", str(ROOT / "tests" / "cli" / "one_is_lost.py")]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, what, where, call, str(process), *rest], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0 and time.perf_counter() - started < 120
    return done.stderr


def damage(kept):
    """Take one file away, and put one of another request, which differs, in the place of another."""
    first, second, *_ = sorted(kept.glob("*.safetensors"))
    first.unlink()
    with safe_open(second, framework="pt") as file:
        said = file.metadata()
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(second).items()}
    save_file(tensors, second, {**said, "key": "of another request"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "where", "call", "process"),
    [
        ("error", MEASURING, 5, 1),  # of its six calls for the first stage
        ("kill", MEASURING, 9, 0),  # in the second stage
        ("error", SOLVING, 5, 1),
        ("defect", SOLVING, 5, 1),
    ],
)
def test_trouble_of_one_process_ends_all(pipe_folder, tmp_path, what, where, call, process):
    output = tmp_path / "out"
    said = lose(what, where, call, *options_for(pipe_folder), "--output", output, process=process)
    lines = sorted(line for line in said.splitlines() if line.startswith("obsdiff prune: "))
    message = "obsdiff prune: the disk of this process is gone"
    if what == "error" and where == SOLVING:
        assert lines == [message, message]  # solves are shared, and so are their errors
    else:
        other = lines[0]
        assert other.startswith(f"{LOST}; nothing was written to {output}")
        assert lines[1:] == ([message] if what == "error" else [])
    assert said.count("Traceback") == 1 + (what == "defect")  # of torchrun, and of the defect
    assert f"[rank{1 - process}]: Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.solved"]
    kept = [path.name for path in (tmp_path / ".out.solved").iterdir() if path.name != "solved.json"]
    assert bool(kept) == (call != 5 or where == SOLVING) and all(name.endswith(".safetensors") for name in kept)


@pytest.mark.slow
def test_a_prune_that_lost_a_process_goes_on_from_what_is_whole(pipe_folder, tmp_path):
    """Killed while it solves; then one of the kept files is gone, another one is of another request."""
    options = options_for(pipe_folder)
    said = lose("kill", SOLVING, 4, *options, "--output", tmp_path / "out")
    kept = tmp_path / ".out.solved"
    assert f"what was solved is kept in {kept}, the same command goes on from there" in said
    there = len(list(kept.glob("*.safetensors")))
    assert there == 6  # three rounds of two, and nothing of the fourth
    damage(kept)
    run_two(ROOT / "prune.py", *options, "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert f"{there - 2} of its solves were taken over" in " ".join(notes)
    main(["prune", *options, "--output", str(tmp_path / "one")])
    one, two = (load_file(tmp_path / name / "masks.safetensors") for name in ("one", "out"))
    assert one.keys() == two.keys() and all(torch.equal(mask, two[name]) for name, mask in one.items())
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / weights) for name in ("one", "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
