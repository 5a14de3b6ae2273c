"""Checkpoint files are written beside their target: neither a kill, a full disk nor TMPDIR can cost the one before."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from obsdiff.callbacks.checkpoint import WholeCheckpointIO
from obsdiff.errors import UserError

BIG = 500_000  # numbers, 2 MB


def run(code, path, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


HEAD = """
    import os, resource, signal, sys, threading, torch
    from obsdiff.callbacks.checkpoint import WholeCheckpointIO
    path, io = sys.argv[1], WholeCheckpointIO()
    io.save_checkpoint({"step": 1, "weights": torch.ones(500_000)}, path)
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (
            "full disk",
            """
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # a limit stands for a disk that fills up
    try:
        io.save_checkpoint({"step": 2, "weights": torch.ones(5_000_000)}, path)
    except Exception as error:
        print(type(error).__name__, error)
            """,
        ),
        pytest.param(
            "kill",
            """
    class Deadly:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGKILL)
    io.save_checkpoint({"weights": torch.ones(5_000_000), "last": Deadly()}, path)
            """,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_checkpoint_before_survives(tmp_path, how, code):
    done = run(HEAD + code, tmp_path / "last.ckpt", TMPDIR=str(tmp_path / "not there"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 1
    if how == "full disk":
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("UserError cannot write") and "File too large" in done.stdout
    else:
        assert done.returncode == -9
    WholeCheckpointIO().save_checkpoint({"step": 3}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_mistake_in_what_is_saved_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(Exception, match="pickle") as caught:
        WholeCheckpointIO().save_checkpoint({"step": lambda: 0}, tmp_path / "last.ckpt")
    assert not isinstance(caught.value, UserError) and not list(tmp_path.iterdir())
