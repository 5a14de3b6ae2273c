"""What a calibration pass can accumulate at a site; ``OBSERVERS`` is the table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.names import PRECISIONS
from obsdiff.obs.diagonal import Diagonal
from obsdiff.obs.hessian import BFloat16Gram, Gram, Int8Gram, TF32Gram


class Observer(Protocol):
    """Accumulates rows of something that a site shows, in parts that merge to the whole.

    The rows are the layers' inputs now. Rows of another kind need no other protocol: gradients of a layer's outputs
    (n = outputs, H of the loss), or the inputs of the dense and of the pruned model side by side (n = 2 · inputs, whose
    off-diagonal block is the cross moment). They need a hook that hands such rows to :meth:`add`.

    Attributes:
        gives: Needs of a method that it serves.
        precision: What rows are rounded to in products, a name of :data:`obsdiff.names.PRECISIONS`.
        weight_sum: Sum of the weights of all rows.
        num_tokens: Rows.
    """

    gives: ClassVar[frozenset[str]]
    precision: ClassVar[str]
    weight_sum: float
    num_tokens: int

    @classmethod
    def empty(cls, columns: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Of nothing yet: rows of ``columns`` entries, for each of ``groups`` (of a convolution)."""

    @classmethod
    def shapes(cls, groups: int, columns: int, device_type: str = "cpu") -> list[tuple[int, ...]]:
        """Of the sums of products, or of squares, that it holds on such a device, float32."""

    def add(self, x: Tensor, weight: float) -> None:
        """Add rows (groups, rows, columns) of one weight > 0."""

    def merge(self, other: Self) -> None:
        """Add another part."""

    def add_up(self) -> None:
        """Become the whole of the parts of all processes, on each of them; all must call it."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""

    def tensors(self) -> dict[str, Tensor]:
        """What a store keeps, besides the two numbers."""

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], weight_sum: float, num_tokens: int) -> Self:
        """What a store has kept; KeyError or ValueError if it is damaged."""

    def released(self) -> Self:
        """The same, which nobody else needs: it may be let go as it is read."""

    def of_columns(self, columns: Tensor) -> Self:
        """Of some of the entries alone (int64, rising)."""

    def is_finite(self) -> bool:
        """Whether every row was."""

    def power(self) -> Tensor:
        """Weighted mean square of each entry, float32 (groups, columns)."""


OBSERVERS: dict[str, type[Observer]] = {
    "diagonal": Diagonal,
    "gram": Gram,
    "gram in tf32": TF32Gram,
    "gram in bfloat16": BFloat16Gram,
    "gram in int8": Int8Gram,
}
"""What serves a need is looked for from the top: the cheapest of those that any device has, then the others."""
GRADIENTS: dict[str, float] = {"loss_gradient": 0.0, "large_loss_gradient": 0.05}
"""Needs that are gradients of the denoising loss instead of layer inputs (:mod:`obsdiff.pruning.gradients`): the share
of the largest loss that the loss at a time must exceed to count."""
GATES = "gates"  # learned on units (:mod:`obsdiff.pruning.gates`)
PASSES = frozenset({*GRADIENTS, GATES})
"""Needs that are no layer inputs: each is a pass of its own, whose result no store keeps."""


def observer_for(needs: Collection[str]) -> str:
    """The name of the cheapest observer that serves all ``needs``.

    Raises:
        UserError: There is none.
    """
    wanted = ({needs} if isinstance(needs, str) else set(needs)) - PASSES
    for name, observer in OBSERVERS.items():
        if wanted <= observer.gives:
            return name
    known = ("diagonal", "gram", *PRECISIONS)
    what = ", ".join(sorted(wanted - set(known))) or f"{' and '.join(sorted(wanted))} at once"
    raise UserError(f"nothing measures {what}; needs are of {', '.join((*known, *GRADIENTS, GATES))}")


def sums_held(observer: str, columns: int, groups: int = 1, device_type: str = "cpu") -> int:
    """How many float32 sums an observer holds of a site, on such a device."""
    return sum(map(math.prod, OBSERVERS[observer].shapes(groups, columns, device_type)))


def exact(observer: str) -> str:
    """The name of the observer of the same that rounds nothing."""
    return "gram" if rounding(observer) else observer


def rounding(observer: str) -> dict[str, str]:
    """What a fingerprint says of it; nothing where nothing is rounded, as stores of earlier versions do."""
    precision = OBSERVERS[observer].precision
    return {} if precision == "float32" else {"precision": precision}


def gradient_for(needs: Collection[str]) -> str | None:
    """Which of :data:`GRADIENTS` is among the needs, if any.

    Raises:
        UserError: More than one.
    """
    wanted = sorted(GRADIENTS.keys() & ({needs} if isinstance(needs, str) else set(needs)))
    if len(wanted) > 1:
        raise UserError(f"a calibration measures one gradient, not {' and '.join(wanted)}; calibrate for one of them")
    return wanted[0] if wanted else None
