"""Run under torchrun by test_one_process_fails: a recovery in which one process alone meets an error.

Usage: one_fails.py MODULE.FUNCTION PROCESS train.py's arguments..."""

import sys
from importlib import import_module

from obsdiff.cli.train import main
from obsdiff.errors import UserError
from obsdiff.ranks import rank

if __name__ == "__main__":
    path, name = sys.argv[1].rsplit(".", 1)
    module, process = import_module(path), int(sys.argv[2])
    real = getattr(module, name)

    def failing(*args, **kwargs):
        if rank() == process:
            raise UserError("the disk of this process is gone")
        return real(*args, **kwargs)

    setattr(module, name, failing)
    main(sys.argv[3:])
