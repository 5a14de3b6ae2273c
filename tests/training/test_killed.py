"""kill -9 at any moment, then the same command (with --ckpt_path last once there is a checkpoint): the same weights."""

import signal
from importlib import import_module
from pathlib import Path

import pytest

from tests.training.common import arguments, assert_same, fit_elsewhere, result
from tests.training.killed import MOMENTS

LATE = ("later step", "checkpoint half written", "checkpoint written", "export half written")
OWN = "reconstructing"  # has a test of its own
SETTINGS = ("--ema=obsdiff.callbacks.ema.EMA", "--ema.decay=0.5", "--model.pruning.allocation=measured")


@pytest.fixture(scope="module")
def uninterrupted(pipe_folder, tmp_path_factory):
    """Results of whole runs by pattern."""
    found = {}

    def run(pattern):
        if pattern not in found:
            output = tmp_path_factory.mktemp("whole") / "run"
            fit_elsewhere("fit", *arguments(pipe_folder, output, *SETTINGS, pattern=pattern))
            found[pattern] = result(output)
        return found[pattern]

    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_moment_waits_for_is_there(moment):
    module, path, *_ = MOMENTS[moment]
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [name for name in MOMENTS if name != OWN])
def test_a_killed_run_goes_on_to_the_same_weights(pipe_folder, tmp_path, uninterrupted, moment):
    pattern = "structured:0.5" if moment == "later step" else "unstructured:0.5"
    args = arguments(pipe_folder, tmp_path / "run", *SETTINGS, pattern=pattern)
    killed = fit_elsewhere(moment, "fit", *args, script=Path(__file__).with_name("killed.py"), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "recovered").exists()
    resume = ["--ckpt_path=last"] if (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() else []
    assert bool(resume) == (moment in LATE)  # before the first checkpoint, the same command goes on by itself
    fit_elsewhere("fit", *args, *resume)  # on as many threads as the uninterrupted run
    assert_same(result(tmp_path / "run"), uninterrupted(pattern))


@pytest.mark.slow
def test_a_reconstruction_that_was_killed_goes_on_with_the_next_stage(pipe_folder, tmp_path):
    """Four processes; what was finished is gone with the run that it was for."""
    extra = ["--model.pruning.method=magnitude", "--model.pruning.reconstruction.steps=5"]
    extra += ["--model.pruning.reconstruction.triples=12", "--model.pruning.reconstruction.batch_size=2"]
    whole, broken = (arguments(pipe_folder, tmp_path / name, *extra, steps=1) for name in ("whole", "broken"))
    fit_elsewhere("fit", *whole)
    killed = fit_elsewhere(OWN, "fit", *broken, script=Path(__file__).with_name("killed.py"), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    stages = tmp_path / "broken" / "reconstruction"
    assert sorted(path.name for path in stages.iterdir()) == ["000.safetensors", "reconstruction.json"]
    fit_elsewhere("fit", *broken)
    assert not stages.exists()
    assert_same(result(tmp_path / "broken"), result(tmp_path / "whole"))
