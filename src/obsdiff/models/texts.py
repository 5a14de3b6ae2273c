"""Prompts that a pipeline encodes by itself, as it does it, but once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

KEPT_BYTES = 2**31  # of what the text encoders gave; what is more is encoded again

_KEPT = "obsdiff_texts"  # on the pipeline: what its text encoders gave


@contextmanager
def texts_kept(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline's ``encode_prompt`` remembers, on the CPU and with the pipeline, what it gave: a second pass
    over the same batches of prompts does not run the text encoders. Arguments, defaults and templates stay its own."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        yield
        return
    kept: dict[str, Any] = vars(pipe).setdefault(_KEPT, {})

    @functools.wraps(encode)
    def remembered(*args: Any, **given: Any) -> Any:
        if any(isinstance(value, Tensor) for value in (*args, *given.values())):  # already encoded
            return encode(*args, **given)
        models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module) and "encoder" in name}
        states = [(name, id(m), next((p.dtype for p in m.parameters()), None)) for name, m in models.items()]
        key = repr((args, sorted(given.items()), states))
        if key not in kept:
            found = encode(*args, **given)
            kept_bytes = sum(tensor.nbytes for value in kept.values() for tensor in _tensors(value))
            if kept_bytes + sum(tensor.nbytes for tensor in _tensors(found)) > KEPT_BYTES:
                return found
            kept[key] = _on(found, "cpu")
        return _on(kept[key], pipe._execution_device)

    pipe.encode_prompt = remembered
    try:
        yield
    finally:
        del pipe.encode_prompt


def _on(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)  # the pipeline may write into its own
    return type(value)(_on(inner, device) for inner in value) if isinstance(value, tuple | list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
