"""Run under torchrun by test_several_processes: prune on two processes and leave what each of them holds."""

import sys
from pathlib import Path

import torch

import obsdiff
from obsdiff.ranks import rank

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo")
pipe = obsdiff.load_pipeline(folder)
prompts = obsdiff.load_prompts("digits-train", num=4)
for pattern in ("unstructured:0.5", "structured:0.5"):
    pipe = obsdiff.load_pipeline(folder)
    statistics = obsdiff.calibrate(pipe, prompts, batch_size=2)
    report = obsdiff.prune(pipe, pattern, statistics=statistics, spare_blocks=[])
    torch.save([pipe.transformer.state_dict(), report.masks], output / f"{pattern}-{rank()}.pt")
torch.distributed.destroy_process_group()
