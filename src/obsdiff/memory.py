"""Memory of this process, and what becomes of work that it does not hold."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from obsdiff.errors import UserError
from obsdiff.ranks import world_size

R = TypeVar("R")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
AT_ONCE_BYTES = {M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**17}
LARGE_AT_ONCE_BYTES = {M_MMAP_THRESHOLD: 2**22 + 1, M_TRIM_THRESHOLD: 2**26}
USUAL_BYTES = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}  # what glibc comes to by itself
KEPT_BYTES = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**29}
_current = USUAL_BYTES


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory held so far: allocated on a CUDA device, resident otherwise."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # getrusage counts what started this process before it became this one
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """What is resident now; where that cannot be read (no Linux), the most that ever was."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        return peak_memory_bytes()
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim_memory() -> None:
    """Give the system what is free: glibc keeps freed tensors below 32 MiB for the next ones of their size."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of it; other C libraries have none, and keep nothing that would have to be given back."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def freed_at_once(asked: bool = True, *, large: bool = False) -> Iterator[None]:
    """Meanwhile tensors of a megabyte and more come from the system and go back to it as they are freed, if ``asked``;
    if ``large``, only those above 4 MiB, which costs little time and leaves small holes.

    By itself glibc takes up to 32 MiB from what it keeps, and the holes in that add up to 100 MB and more to a peak, by
    chance. It goes on filling the holes that there are: this serves before a model is loaded. For pages that are asked
    for anew a small model pays up to 1.3 times the CPU time.
    """
    at_once = LARGE_AT_ONCE_BYTES if large else AT_ONCE_BYTES
    with _thresholds(at_once if asked else _current):
        yield


@contextmanager
def kept_meanwhile() -> Iterator[None]:
    """Meanwhile freed tensors below 32 MiB are kept for the next ones, 512 MiB at most, and go back at the end.

    By itself glibc gives the system what is free at the end of the heap above 64 MiB, so that each call of a denoiser
    and each solve asks for the same pages anew, a million of them in a small calibration. Within
    :func:`freed_at_once` it is that which holds.
    """
    try:
        with _thresholds(KEPT_BYTES if _current == USUAL_BYTES else _current):
            yield
    finally:
        trim_memory()


@contextmanager
def _thresholds(wanted: dict[int, int]) -> Iterator[None]:
    """glibc's ``malloc`` with other thresholds, bytes by option; nothing is changed in other C libraries, nor where
    whoever started the process set some."""
    option = _of_glibc("mallopt")
    own = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if option is None or own or wanted == _current:
        yield
        return

    def choose(thresholds: dict[int, int]) -> None:
        global _current
        _current = thresholds
        for given in thresholds.items():
            option(*given)

    before = _current
    choose(wanted)
    try:
        yield
    finally:
        choose(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory for a tensor, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def within_memory(work: Callable[[int], R], batch_size: int, what: str, hint: str) -> R:
    """Do something in batches, and where memory does not hold it once more in half of them.

    Args:
        work: Of a batch size; it leaves nothing behind when it fails, and its result does not depend on batches.
        batch_size: To begin with.
        what: For people, such as "pruning".
        hint: What else takes less memory.

    Raises:
        UserError: That does not fit either, or one of several processes failed (the others go on with what they have).
    """
    for size in (batch_size, batch_size // 2):
        try:
            return work(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:200]
            if size == batch_size // 2 or batch_size == 1 or world_size() > 1:
                raise UserError(f"out of memory while {what} in batches of {size}; {hint} ({said})") from error
        # here the error is gone, and with it what its traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory while {what} in batches of {size}; once more with {size // 2}", file=sys.stderr)
    raise AssertionError
