"""A file of tensors that are written piece by piece, so that memory holds no whole one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """A tensor that comes in pieces.

    Attributes:
        dtype, shape: Of the whole.
        pieces: Gives its rows in their order, on the CPU, some at a time.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]


def write_columns(file: Path, columns: Mapping[str, Column]) -> None:
    """What ``safetensors.torch.save_file`` writes of the whole tensors, which it wants in memory.

    Args:
        file: Where.
        columns: By name.
    """
    order = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name))  # so that all lie aligned
    header, end = {}, 0
    for name in order:
        column, start = columns[name], end
        end += math.prod(column.shape) * column.dtype.itemsize
        header[name] = {"dtype": _called(column.dtype), "shape": list(column.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in columns[name].pieces():
                plain = piece.clone(memory_format=torch.contiguous_format)  # one number may have a stride of 0
                out.write(plain.reshape(-1).view(torch.uint8).numpy().data)


def _called(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    content = save({"x": torch.empty(0, dtype=dtype)})
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["x"]["dtype"])
