"""kill -9 at any moment, then --ckpt_path last: the same final weights as without."""

import signal
from pathlib import Path

import pytest

from tests.training.common import arguments, assert_same, fit_elsewhere, result
from tests.training.killed import MOMENTS

USUAL = ("solving", "later step", "export half written")


@pytest.fixture(scope="module")
def uninterrupted(pipe_folder, tmp_path_factory):
    """Results of whole runs by pattern."""
    found = {}

    def run(pattern):
        if pattern not in found:
            output = tmp_path_factory.mktemp("whole") / "run"
            fit_elsewhere("fit", *arguments(pipe_folder, output, *EMA, pattern=pattern))
            found[pattern] = result(output)
        return found[pattern]

    return run


EMA = ("--ema=obsdiff.callbacks.ema.EMA", "--ema.decay=0.5")


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in MOMENTS]
)
def test_a_killed_run_goes_on_to_the_same_weights(pipe_folder, tmp_path, uninterrupted, moment):
    pattern = "structured:0.5" if moment == "later step" else "unstructured:0.5"
    args = arguments(pipe_folder, tmp_path / "run", *EMA, pattern=pattern)
    killed = fit_elsewhere(moment, "fit", *args, script=Path(__file__).with_name("killed.py"), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "recovered").exists()
    fit_elsewhere("fit", *args, "--ckpt_path=last")  # on as many threads as the uninterrupted run
    assert_same(result(tmp_path / "run"), uninterrupted(pattern))
