"""Memory of this process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


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
