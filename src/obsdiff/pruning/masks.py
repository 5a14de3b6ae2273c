"""Bit-packed masks in safetensors: one bit per weight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.pruning.plan import WEIGHT
from obsdiff.spill import Spill, Spilled


def pack(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 (⌈n / 8⌉,), the lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...] | list[int]) -> Tensor:
    """The inverse of :func:`pack`."""
    bits = np.unpackbits(packed.numpy(), count=torch.Size(shape).numel(), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(*shape)


class Masks(MutableMapping[str, Tensor]):
    """Bool masks by name, of any shape, on the CPU; each held in one bit an entry, and unpacked when it is read.

    Args:
        masks: Some to begin with.
        spill: Where the bits lie; None: in memory.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, spill: Spill | None = None) -> None:
        self._packed: dict[str, tuple[Tensor | Spilled, torch.Size]] = {}
        self._spill = spill
        self.update(masks or {})

    def _bits(self, name: str) -> Tensor:
        bits = self._packed[name][0]
        if isinstance(bits, Tensor):
            return bits
        assert self._spill is not None
        return self._spill.take(bits)

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._bits(name), self._packed[name][1])

    def __setitem__(self, name: str, mask: Tensor) -> None:
        bits = pack(mask)
        self._packed[name] = bits if self._spill is None else self._spill.put(bits), mask.shape

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def move_to_end(self, name: str) -> None:
        """Let a mask be the last one."""
        self._packed[name] = self._packed.pop(name)

    def __reduce__(self) -> Any:
        """Copies hold their bits in memory."""
        return Masks, (dict(self),)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """The bits of each (:func:`pack`), and their shapes."""
        return {name: self._bits(name) for name in self}, {name: list(self._packed[name][1]) for name in self}


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write masks by name; their shapes stand in the metadata."""
    packed, shapes = (masks if isinstance(masks, Masks) else Masks(masks)).packed()
    save_file(packed, path, {"shapes": json.dumps(shapes)})


def load_masks(path: Path) -> dict[str, Tensor]:
    """Read masks by name.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            if set(file.keys()) != shapes.keys():
                raise ValueError("its shapes are not those of its tensors")
            return {name: _unpacked(file.get_tensor(name), shape) for name, shape in shapes.items()}
    except (OSError, SafetensorError, RuntimeError, *MALFORMED) as error:
        raise UserError(f"cannot read masks from {path}: {brief(str(error))}; prune again") from None


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{brief(shape)} is no shape")
    if packed.dtype != torch.uint8 or packed.shape != (-(-math.prod(shape) // 8),):
        raise ValueError(f"a mask of shape {shape} does not have {tuple(packed.shape)} bytes of {packed.dtype}")
    return unpack(packed, shape)


def weight_masks(masks: Mapping[str, Tensor], shrunk: bool) -> dict[str, Tensor]:
    """Of a prune's masks those of single weights, by layer.

    Args:
        masks: By name, as a prune reports them.
        shrunk: Whether units were cut out: then those of single weights are called ``LAYER.weight``, beside those of
            units.
    """
    found = {name: mask for name, mask in masks.items() if not shrunk or name.endswith(WEIGHT)}
    return {name.removesuffix(WEIGHT): mask for name, mask in found.items()} if shrunk else found


def broken_masks(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Layers with a weight that is not exactly zero where its mask says so, or of another shape."""
    weights = {name: denoiser.get_parameter(f"{name}.weight").detach().cpu() for name in masks}
    fitting = {name: (weights[name], mask) for name, mask in masks.items() if weights[name].shape == mask.shape}
    broken = {name for name in masks if name not in fitting} | set(nonzero_outside(fitting))
    return [name for name in masks if name in broken]


def nonzero_outside(named: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Names of the weights that are not exactly zero (NaN included) somewhere their mask (True = kept) is False."""
    return [name for name, (weight, kept) in named.items() if bool((weight.ne(0) & ~kept).any())]


def apply_masks(weights: list[Tensor], factors: list[Tensor]) -> None:
    """Multiply each weight by its factor (1 = kept, 0 = pruned, of the same shape and dtype), in place and at once."""
    if weights:
        torch._foreach_mul_(weights, factors)
