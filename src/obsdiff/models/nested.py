"""Arguments and answers of models: tensors in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def each_tensor(value: Any, change: Callable[[Any], Any], kind: Any = Tensor) -> Any:
    """The same nested value with every tensor changed, or everything of another ``kind``."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(inner, change, kind) for inner in value)
    if isinstance(value, dict):
        return {key: each_tensor(inner, change, kind) for key, inner in value.items()}
    return value


def copied_to(value: Any, device: torch.device | str) -> Any:
    """The same nested value with copies of its tensors on a device: who is given it may write into it."""
    return each_tensor(value, lambda tensor: tensor.detach().to(device, copy=True))


def kept_once(value: Any, earlier: Sequence[Any]) -> Any:
    """The same nested value with copies of its tensors on the host; one that equals what stood in the same place of
    earlier values is that very tensor, as the embeddings of a prompt are at every step."""
    if isinstance(value, Tensor):
        for other in earlier:
            if isinstance(other, Tensor) and other.dtype == value.dtype and torch.equal(other, value.to(other.device)):
                return other
        return value.detach().to("cpu", copy=True)
    if isinstance(value, tuple | list):
        lists = [other for other in earlier if isinstance(other, tuple | list) and len(other) == len(value)]
        return type(value)(kept_once(inner, [other[i] for other in lists]) for i, inner in enumerate(value))
    if isinstance(value, dict):
        maps = [other for other in earlier if isinstance(other, dict)]
        return {key: kept_once(inner, [other.get(key) for other in maps]) for key, inner in value.items()}
    return value


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
