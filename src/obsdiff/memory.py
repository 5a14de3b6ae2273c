"""Memory of this process, and what becomes of work that it does not hold."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from obsdiff.errors import UserError
from obsdiff.ranks import world_size

R = TypeVar("R")


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory held so far: allocated on a CUDA device, resident otherwise."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries have none, and need none
        trim(0)


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
