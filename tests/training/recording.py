"""Run under torchrun by test_recording_together: two processes record, and the second dies (kill -9) once it has
written so many shards. Usage: recording.py PIPELINE FOLDER SHARDS"""

import os
import signal
import sys
from pathlib import Path

import torch

import obsdiff
from obsdiff.pruning.kept import KeptParts
from obsdiff.pruning.record import record_trajectories
from obsdiff.ranks import rank
from tests.training.test_recording_together import PROMPTS

source, folder, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo")
written: list[int] = []
real = KeptParts.write


def deadly(*args, **given):
    real(*args, **given)
    written.append(1)
    if rank() == 1 and len(written) == last:
        os.kill(os.getpid(), signal.SIGKILL)


setattr(KeptParts, "write", deadly)  # noqa: B010
record_trajectories(obsdiff.load_pipeline(source), PROMPTS, folder, batch_size=1)
(folder.parent / f"drawn-{rank()}").write_text(str(len(written)))
torch.distributed.destroy_process_group()
