"""Memory that computing takes, counted as it is computed: on real tensors, or on the meta device from shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
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


class _Fused(TorchFunctionMode):
    """Attention as fused kernels do it, with no matrix of queries by keys, which the meta device would make."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0] if args else given["query"], args[2] if len(args) > 2 else given["value"]
            if query.is_meta and query.dim() == 4:
                batch, heads, length, _ = query.shape
                return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        return function(*args, **given)


def live_in(call: Callable[[], Any], unknown: int | None = None) -> Live:
    """What ``call`` makes, without gradients; on the meta device attention counts as a fused kernel does it."""
    live = Live(unknown)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Fused())
        stack.enter_context(live)
        result = call()
        del result
    return live
