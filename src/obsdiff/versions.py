"""Versions that numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("obsdiff", "torch", "diffusers", "transformers", "lightning", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
