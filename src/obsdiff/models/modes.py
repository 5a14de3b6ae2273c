"""Models measured as they are used: in eval mode, whatever mode their owner left them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(owner: Any) -> Iterator[None]:
    """Eval mode (no dropout) for a module, or for every model of a pipeline, and each submodule's own mode again
    afterwards."""
    parts = [owner] if isinstance(owner, nn.Module) else owner.components.values()
    modes = [(m, m.training) for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
