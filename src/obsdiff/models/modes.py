"""Pipelines in inference mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(pipe: Any) -> Iterator[None]:
    """Every model of ``pipe`` in eval mode (no dropout), each submodule put back exactly as it was afterwards.

    Args:
        pipe: A pipeline; all its ``nn.Module`` components count, whatever they are called.
    """
    models = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
