"""Prompts that a pipeline encodes by itself, as it does it, but once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from obsdiff.models.nested import copied_to, tensors_in

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
            kept_bytes = sum(tensor.nbytes for value in kept.values() for tensor in tensors_in(value))
            if kept_bytes + sum(tensor.nbytes for tensor in tensors_in(found)) > KEPT_BYTES:
                return found
            kept[key] = copied_to(found, "cpu")
        return copied_to(kept[key], pipe._execution_device)

    pipe.encode_prompt = remembered
    try:
        yield
    finally:
        del pipe.encode_prompt
