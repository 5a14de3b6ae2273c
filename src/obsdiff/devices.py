"""Devices by name: which there are, and which one to take."""

from __future__ import annotations

import re

from obsdiff.errors import UserError

KNOWN = ("cpu", "cuda", "mps", "xpu")


def check_device_name(name: str | None) -> None:
    """Refuse what is no device's name, without importing torch.

    Raises:
        UserError: It is none, or none that computes (such as meta).
    """
    if name is not None and not re.fullmatch(rf"({'|'.join(KNOWN)})(:[0-9]{{1,4}})?", name):
        raise UserError(f"unknown device {name[:80]!r}; give cpu, cuda, cuda:NUMBER or mps")


def choose_device(name: str | None, float64: bool = True) -> str:
    """The device that was named, or the best one that is there: cuda, then mps (unless ``float64`` is needed, which it
    lacks), then cpu.

    Raises:
        UserError: The named one is not there.
    """
    import torch

    check_device_name(name)
    if name is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() and not float64 else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return name
    there = {
        "cuda": torch.cuda.device_count if torch.cuda.is_available() else lambda: 0,
        "mps": lambda: int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count,
    }[kind]()
    if int(number or 0) >= there:
        count = f"{there} {kind} device{'' if there == 1 else 's'}" if there else f"no {kind} device"
        raise UserError(f"device {name!r} is not there; torch finds {count} on this machine")
    return name
