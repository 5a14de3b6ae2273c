"""Training wholly in another dtype than float32."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

# Adam divides by the root of the second moment plus this; float16 rounds anything below 6e-8 to zero, and squares of
# small gradients too, so that a weight whose gradient is zero would become 0 / 0
EPSILON = {torch.float16: 1e-4}


def adam_epsilon(dtype: torch.dtype) -> float:
    """What keeps Adam's division finite in weights of this dtype."""
    return EPSILON.get(dtype, 1e-8)


def keep_times(plugin: Any) -> None:
    """Let batches come as the data module made them, in ``bf16-true``, ``16-true`` and ``64-true`` too.

    Lightning would round everything in them first, times of 0 to 1000 to steps of 4 in bfloat16. Each denoiser is given
    its inputs in its own dtype anyway (:func:`obsdiff.models.calling.call_denoiser`), the times in float32.
    """
    if isinstance(plugin, HalfPrecision | DoublePrecision):
        vars(plugin)["convert_input"] = _as_it_is


def _as_it_is(batch: Any) -> Any:
    return batch
