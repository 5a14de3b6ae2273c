"""Timing calls, here or in a new process, ``python -m obsdiff.allocation.clock FOLDER``.

The new one loads the dense and the smaller denoiser from files, as a user will: a process that has done other things
before reads other shares (docs/results.md).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.files import read_json, write_json
from obsdiff.models import obsdiff_shrunk
from obsdiff.models.denoisers import dtype_of, parts_of

WARM_S, TURN_S = 0.01, 0.03  # of a call's turn in a round: not counted, and in all
PROCESS_S, LEAST_ROUNDS = 10.0, 5  # a new process times for so long, and at least so often
Calls = Sequence[Callable[[], Any]]


def _now() -> float:
    """Seconds that only rise; without an accelerator those that this thread runs."""
    if not torch.accelerator.is_available():
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def time_calls(calls: Calls) -> list[float]:
    """Median seconds of each call in one round of short turns, so that a slow spell of the machine hits all alike.

    A turn repeats one call, as sampling does, and does not count its first ``WARM_S``: right after another model a call
    finds its weights out of the caches, which hides a part of what was saved. Without an accelerator the seconds are
    those that this thread runs: on a busy machine the others spread by several times as much (docs/results.md).
    """

    def turn(call: Callable[[], Any]) -> float:
        times, started = list[float](), _now()
        ended = started
        while not times or ended - started < TURN_S:
            call()
            begun, ended = ended, _now()
            if begun - started >= WARM_S:
                times.append(ended - begun)
        return statistics.median(times)

    return [turn(call) for call in calls]


def call_of(parts: Mapping[str, Any], arguments: Mapping[str, Mapping[str, Any]]) -> Callable[[], Any]:
    """One call of each denoiser, all by the prefix of its names."""
    return lambda: [parts[prefix](**given) for prefix, given in arguments.items()]


def time_in_new_process(dense: nn.Module, smaller: nn.Module, arguments: Mapping[str, Any]) -> list[list[float]]:
    """Rounds of (dense, smaller) seconds of one call, timed by a new process that loads both denoisers from files.

    Raises:
        UserError: They cannot be written, or the process failed, for example for want of memory.
    """
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as folder:
        try:
            for which, denoiser in (("dense", dense), ("smaller", smaller)):
                for prefix, part in parts_of(denoiser).items():
                    part.save_pretrained(f"{folder}/{which}{prefix}")  # type: ignore[operator]  # of diffusers
            tensors: dict[str, Tensor] = {}
            settings = {
                "arguments": _described(arguments, tensors),
                "device": str(next(dense.parameters()).device),
                "dtype": str(dtype_of(dense)).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "time_s": PROCESS_S,
            }
            save_file(tensors, f"{folder}/arguments.safetensors")
            write_json(Path(folder, "settings.json"), settings)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write the denoisers to time to {folder}: {reason}; set TMPDIR") from None
        command = [sys.executable, "-P", "-m", "obsdiff.allocation.clock", folder]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
            raise UserError(
                "the process that times the dense and the shrunk denoiser failed (it needs room for both beside this "
                f"process): {said[-1]}"
            )
        return list(read_json(Path(folder, "rounds.json"), "the times of a process"))


_TENSOR = "@tensor"


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Arguments as JSON; their tensors go to ``tensors``, with their names left in their places."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _described(inner, tensors) for key, inner in value.items()}
    return [_described(inner, tensors) for inner in value] if isinstance(value, list | tuple) else value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The opposite of :func:`_described`, tuples as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _restored(inner, tensors) for key, inner in value.items()}
    return [_restored(inner, tensors) for inner in value] if isinstance(value, list) else value


def _time_files(folder: Path) -> None:
    """What the new process does."""
    settings = read_json(folder / "settings.json", "what to time")
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    tensors = load_file(folder / "arguments.safetensors")
    arguments = _restored(settings["arguments"], {name: tensor.to(device) for name, tensor in tensors.items()})
    torch.set_num_threads(settings["threads"])

    def load(at: Path) -> Any:
        name = read_json(at / "config.json", "a denoiser's config")["_class_name"]
        library: Any = obsdiff_shrunk if name.startswith(obsdiff_shrunk.PREFIX) else diffusers
        return getattr(library, name).from_pretrained(at, dtype=dtype).eval().to(device)

    denoisers = [{prefix: load(folder / f"{which}{prefix}") for prefix in arguments} for which in ("dense", "smaller")]
    calls = [call_of(parts, arguments) for parts in denoisers]
    time_calls(calls)  # allocations and kernels of the first calls are not what a sampling step costs
    started, rounds = _now(), list[list[float]]()
    while len(rounds) < LEAST_ROUNDS or _now() - started < settings["time_s"]:
        rounds.append(time_calls(calls))
    write_json(folder / "rounds.json", rounds)


if __name__ == "__main__":
    _time_files(Path(sys.argv[1]))
