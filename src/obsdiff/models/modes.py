"""Models measured as they are used: in eval mode, whatever mode their owner left them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(owner: Any) -> Iterator[None]:
    """Eval mode (no dropout) for a module, or for every model of a pipeline; each submodule's own mode comes back
    exactly as it was."""
    parts = [owner] if isinstance(owner, nn.Module) else vars(owner).values()
    modes = [(module, module.training) for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
