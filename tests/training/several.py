"""Run under torchrun by test_several_processes: what two processes prune and measure, left by each."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import obsdiff
from obsdiff.ranks import from_all, rank, solved_in_turn
from tests.training.common import measurable

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo")
pipe = obsdiff.load_pipeline(folder)
prompts = obsdiff.load_prompts("digits-train", num=4)
for pattern in ("unstructured:0.5", "structured:0.5"):
    pipe = obsdiff.load_pipeline(folder)
    statistics = obsdiff.calibrate(pipe, prompts, batch_size=2)
    report = obsdiff.prune(pipe, pattern, statistics=statistics, spare_blocks=[])
    torch.save([pipe.transformer.state_dict(), dict(report.masks)], output / f"{pattern}-{rank()}.pt")
measured, images, dense, prompts = measurable()
measured.start()
mine = torch.arange(4) + 3 * rank()  # one image twice, as samplers deal them out
measured.update(mine, images[mine], [prompts[number] for number in mine.tolist()], dense[mine])
(output / f"figures-{rank()}.json").write_text(json.dumps(measured.figures()))

# results of any make travel whole: nested, of any dtype and shape, views and empty ones
own = float(rank())
parts = {"mask": torch.tensor([True, bool(rank())]), "none": [torch.empty(0, 4)]}
sent = SimpleNamespace(a=torch.full((2, 3), own).T, b=parts)
sent.more = (torch.tensor(own, dtype=torch.bfloat16), "text", None, torch.full((5,), 3 + rank(), dtype=torch.uint8))
for source, found in enumerate(from_all(sent)):
    assert torch.equal(found.a, torch.full((3, 2), float(source))) and found.a.device.type == "cpu"
    assert found.b["mask"].tolist() == [True, bool(source)] and found.b["none"][0].shape == (0, 4)
    half, text, none, counts = found.more
    assert (half.dtype, float(half), text, none) == (torch.bfloat16, source, "text", None)
    assert counts.tolist() == 5 * [3 + source]
did: list[int] = []


def work(item: int) -> torch.Tensor:
    did.append(item)
    if item == 13:
        raise obsdiff.UserError("13 cannot be done")
    return torch.tensor(item**2)


done = {item: int(square) for item, square in solved_in_turn([3, 9, 1, 8, 5], work, cost=float)}
assert done == {item: item**2 for item in (3, 9, 1, 8, 5)}
assert did == ([9, 5, 1], [8, 3])[rank()]  # those of like cost at the same time
assert [item for item, _ in solved_in_turn([2, 7, 4], work)] == [2, 7, 4]
try:
    list(solved_in_turn([2, 13], work))
    raise AssertionError("13 was done")
except obsdiff.UserError as error:
    assert str(error) == "13 cannot be done"
(output / f"exchanged-{rank()}").touch()
torch.distributed.destroy_process_group()
