"""Run under torchrun by test_lost_processes: a prune in which something befalls one process alone.

Usage: one_is_lost.py WHAT MODULE.FUNCTION CALL PROCESS prune.py's arguments...; at the n-th CALL of the function that
process meets WHAT: "error" (for the user to mend), "defect", or "kill" (-9)."""

import os
import signal
import sys
from importlib import import_module

from obsdiff.cli.main import main
from obsdiff.errors import UserError
from obsdiff.ranks import rank


def befall(what):
    """Let it happen."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "error":
        raise UserError("the disk of this process is gone")
    raise ZeroDivisionError


def arm(what, path, at, process):
    *parents, name = path.split(".")
    try:
        owner = import_module(".".join(parents))
    except ModuleNotFoundError:  # a method
        owner = getattr(import_module(".".join(parents[:-1])), parents[-1])
    real, calls = getattr(owner, name), []

    def befallen(*args, **kwargs):
        if rank() == process:
            calls.append(1)
            if len(calls) == at:
                befall(what)
        return real(*args, **kwargs)

    setattr(owner, name, befallen)


if __name__ == "__main__":
    arm(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    main(["prune", *sys.argv[5:]])
