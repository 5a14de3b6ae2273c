"""Memory that computing takes, counted as it is computed: on real tensors, or on the meta device from shapes alone."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Live(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, and forgets them as they are freed.

    What was there before (weights, arguments) and what an operation needs within itself (packed operands of a product)
    is not counted.

    Args:
        unknown: What stands for a value that code asks of a tensor without values; None refuses, as torch does. Text
            encoders ask whether a mask leaves anything out, to do without it.

    Attributes:
        now: Bytes that are alive.
        peak: The most that were.
        made: All that were made, whether alive still or not.
        operations: How many ran.
    """

    def __init__(self, unknown: int | None = None) -> None:
        super().__init__()
        self.unknown = unknown
        self.now = self.peak = self.made = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and self.unknown is not None:
            return self.unknown
        given = (args, dict(kwargs or {}))
        before: set[int] = set()
        tree_map_only(Tensor, lambda x: before.add(x.untyped_storage()._cdata), given)
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        tree_map_only(Tensor, lambda x: self._see(x, before), result)
        return result

    def _see(self, x: Tensor, before: set[int]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or key in before:  # a view, or written in place
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Attention on the meta device as fused kernels do it: what they keep for the backward pass, and gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention on the meta device without the matrix of queries by keys, which torch would make there.

    A mode for torch functions would not be seen by what a backward pass computes once more.
    """
    own = functional.scaled_dot_product_attention

    @functools.wraps(own)
    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.is_meta and query.dim() == 4:
            result: Tensor = _Attention.apply(query, key, value)
            return result
        return own(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


@contextmanager
def counting(unknown: int | None = None, fused: bool = True) -> Iterator[Live]:
    """Counts what is made inside.

    Args:
        unknown: As for :class:`Live`.
        fused: Whether attention on the meta device counts as a fused kernel does it.
    """
    live = Live(unknown)
    with _fused_attention() if fused else nullcontext(), live:
        yield live


def live_in(call: Callable[[], Any], unknown: int | None = None) -> Live:
    """What ``call`` makes, without gradients; on the meta device attention counts as a fused kernel does it."""
    with torch.no_grad(), counting(unknown) as live:
        result = call()
        del result
    return live
