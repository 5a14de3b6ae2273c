"""Timing calls, here or as a user will: in a new process that loads the dense and the smaller denoiser from files.

    python -m obsdiff.allocation.clock FOLDER

is that process (:func:`new_process` starts it). It imports little, since many of them are started.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.files import read_json, write_json

WARM_S, TIMED_S = 0.01, 0.02  # of each call's turn in a round: not counted, and counted
PROCESS_S, LEAST_ROUNDS = 10.0, 5  # a new process times for so long, and at least so often
CALL, SETTINGS, RESULT = "call.safetensors", "settings.json", "seconds.json"
Calls = Sequence[Callable[[], Any]]
Clock = Callable[[Calls], list[float]]
Trial = Callable[[Path], tuple[float, float]]


@torch.no_grad()
def time_calls(calls: Calls) -> list[float]:
    """Median seconds of each call in one round of short turns, so that a slow spell of the machine hits all alike.

    A turn repeats one call, as sampling does, and does not count its first ``WARM_S``: right after another model a call
    finds its weights out of the caches, which hides a part of what was saved (docs/results.md).
    """

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def turn(call: Callable[[], Any]) -> float:
        started, times = now(), list[float]()
        call()
        while (ended := now()) - started < WARM_S:
            call()
        while sum(times) < TIMED_S:
            call()
            begun, ended = ended, now()
            times.append(ended - begun)
        return statistics.median(times)

    return [turn(call) for call in calls]


def write_trial(folder: Path, dense: Any, smaller: Any, inputs: Mapping[str, Tensor]) -> None:
    """Put into ``folder`` what a trial needs: both denoisers, the arguments of a call, and how to time it.

    What is there already is kept, but for the smaller denoiser.
    """
    from safetensors.torch import save_file

    smaller.save_pretrained(folder / "smaller")
    if (folder / SETTINGS).exists():
        return
    dense.save_pretrained(folder / "dense")
    save_file({name: value.contiguous().cpu() for name, value in inputs.items()}, folder / CALL)
    parameter = next(dense.parameters())
    settings = {
        "device": str(parameter.device),
        "dtype": str(parameter.dtype),
        "threads": torch.get_num_threads(),
        "time_s": PROCESS_S,
    }
    write_json(folder / SETTINGS, settings)


def new_process(folder: Path) -> tuple[float, float]:
    """Seconds of one call of the denoisers in ``folder``, "dense" and "smaller", timed in turns by a new process.

    Raises:
        UserError: It failed, for example for want of memory.
    """
    command = [sys.executable, "-P", "-m", "obsdiff.allocation.clock", str(folder)]
    (folder / RESULT).unlink(missing_ok=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise UserError(
            "the process that times the dense and the shrunk denoiser failed (it needs room for both beside this "
            f"process): {said[-1]}"
        )
    dense_s, smaller_s = read_json(folder / RESULT, "the times of a trial")
    return dense_s, smaller_s


def run_trial(folder: Path) -> None:
    """What the new process does: load as a user would, time, write the seconds down."""
    from safetensors.torch import load_file

    settings = read_json(folder / SETTINGS, "the settings of a trial")
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
    call = {name: value.to(settings["device"]) for name, value in load_file(folder / CALL).items()}
    calls = [partial(_load(folder / name, dtype).to(settings["device"]), **call) for name in ("dense", "smaller")]
    time_calls(calls)  # allocations and kernels of the first calls are not what a sampling step costs
    started, rounds = time.perf_counter(), list[list[float]]()
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() - started < settings["time_s"]:
        rounds.append(time_calls(calls))
    dense_s = statistics.median(seconds[0] for seconds in rounds)
    share = statistics.median(smaller_s / dense_s for dense_s, smaller_s in rounds)
    write_json(folder / RESULT, [dense_s, share * dense_s])


def _load(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    from obsdiff.models import obsdiff_shrunk

    name = read_json(folder / "config.json", "a denoiser's config")["_class_name"]
    library = obsdiff_shrunk if name.startswith(obsdiff_shrunk.PREFIX) else diffusers
    return getattr(library, name).from_pretrained(folder, dtype=dtype).eval()


if __name__ == "__main__":
    run_trial(Path(sys.argv[1]))
