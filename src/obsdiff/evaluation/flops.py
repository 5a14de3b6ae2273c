"""FLOPs of one denoiser call, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.conditioning import segment_lengths
from obsdiff.models.families import find_family
from obsdiff.models.wiring import denoiser_of


def example_inputs(
    denoiser: nn.Module,
    text_length: int,
    batch: int = 1,
    device: str = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random denoiser arguments of the model's own default size, from its family's row."""
    config: Any = denoiser.config
    inputs = {}
    for name, dimensions in find_family(denoiser).inputs:
        shape = [text_length if d == "text_length" else int(config[d]) for d in dimensions]
        inputs[name] = torch.randn(batch, *shape, device=device, dtype=dtype)
    return inputs


def denoiser_flops(pipe: Any, call: Mapping[str, Any]) -> int:
    """FLOPs (two per multiply-add, attention included) of one call of the denoiser with one image, without guidance.

    Counted by torch's ``FlopCounterMode`` on a copy without weights. Zeros inside dense tensors count in full: no
    dense kernel skips them.
    """
    return shrunk_flops(pipe, call, {"layers": {}, "attributes": {}})


def shrunk_flops(pipe: Any, call: Mapping[str, Any], shapes: Mapping[str, Any]) -> int:
    """Like :func:`denoiser_flops`, if the denoiser had ``shapes`` (:func:`obsdiff.pruning.surgery.shrunk_shapes`)."""
    from torch.utils.flop_counter import FlopCounterMode

    from obsdiff.models.obsdiff_shrunk import apply_shapes

    denoiser: Any = denoiser_of(pipe)
    length = sum(segment_lengths(pipe, find_family(denoiser), call))
    with torch.device("meta"):
        copy = type(denoiser).from_config(denoiser.config)
        apply_shapes(copy, shapes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(**example_inputs(copy, length))
    return int(counter.get_total_flops())
