"""Arguments and answers of models: tensors in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def each_tensor(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(inner, change) for inner in value)
    if isinstance(value, dict):
        return {key: each_tensor(inner, change) for key, inner in value.items()}
    return value


def copied_to(value: Any, device: torch.device | str) -> Any:
    """The same nested value with copies of its tensors on a device: who is given it may write into it."""
    return each_tensor(value, lambda tensor: tensor.detach().to(device, copy=True))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Its tensors, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
