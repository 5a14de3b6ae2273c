"""Train, but die (kill -9) at the n-th call of one function. Usage: killed.py MOMENT train.py's arguments..."""

import os
import signal
import sys
from importlib import import_module

# name: (module, attribute path, at which call, after the call instead of before it)
MOMENTS = {
    "calibration": ("obsdiff.obs.hessian", "Gram.add", 40, False),
    "statistics written": ("obsdiff.pruning.calibrate", "save_statistics", 1, True),
    "scanning": ("obsdiff.allocation.scan", "_Scanner.measure", 20, False),
    "solving": ("obsdiff.pruning.apply", "solve_site", 3, False),
    "reconstructing": ("obsdiff.pruning.reconstruct", "_train", 2, False),
    "pruned pipeline half written": ("obsdiff.training.stage", "write_pipeline", 1, True),
    "references": ("obsdiff.evaluation.references", "sample", 2, False),
    "first step": ("obsdiff.training.recovery", "loss_terms", 2, False),
    "later step": ("obsdiff.training.recovery", "loss_terms", 6, False),
    "checkpoint half written": ("torch", "save", 2, True),
    "checkpoint written": ("obsdiff.callbacks.checkpoint", "LastCheckpoint._keep", 2, True),
    "export half written": ("obsdiff.export.recovered", "write_pipeline_files", 1, True),
}


def arm(moment):
    module, path, at, after = MOMENTS[moment]
    owner = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    from obsdiff.cli.train import main

    arm(sys.argv[1])
    main(sys.argv[2:])
