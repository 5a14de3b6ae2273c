"""Run under torchrun by test_several_processes: what two processes prune and measure, left by each."""

import json
import sys
from pathlib import Path

import torch

import obsdiff
from obsdiff.ranks import rank
from tests.training.common import measurable

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo")
pipe = obsdiff.load_pipeline(folder)
prompts = obsdiff.load_prompts("digits-train", num=4)
for pattern in ("unstructured:0.5", "structured:0.5"):
    pipe = obsdiff.load_pipeline(folder)
    statistics = obsdiff.calibrate(pipe, prompts, batch_size=2)
    report = obsdiff.prune(pipe, pattern, statistics=statistics, spare_blocks=[])
    torch.save([pipe.transformer.state_dict(), report.masks], output / f"{pattern}-{rank()}.pt")
measured, images, dense, prompts = measurable()
measured.start()
mine = torch.arange(4) + 3 * rank()  # one image twice, as samplers deal them out
measured.update(mine, images[mine], [prompts[number] for number in mine.tolist()], dense[mine])
(output / f"figures-{rank()}.json").write_text(json.dumps(measured.figures()))
torch.distributed.destroy_process_group()
