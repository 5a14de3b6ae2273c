"""FLOPs of one denoiser call, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.calling import call_denoiser
from obsdiff.models.conditioning import segment_lengths
from obsdiff.models.families import find_family
from obsdiff.models.wiring import denoiser_of


def example_inputs(
    denoiser: nn.Module,
    text_length: int,
    batch: int = 1,
    device: str = "meta",
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Random denoiser arguments from its family's row, of latents (height, width) of ``size`` or the model's own."""
    config: Any = denoiser.config
    family, inputs = find_family(denoiser), {}
    for name, dimensions in family.inputs:
        shape = [text_length if d == "text_length" else int(config[d]) for d in dimensions]
        if name == family.sample and size is not None:
            shape[-2:] = size
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
        shrunk = type(denoiser).from_config(denoiser.config)
        apply_shapes(shrunk, shapes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shrunk(**example_inputs(shrunk, length, size=latent_size(pipe, call)))
    return int(counter.get_total_flops())


def latent_size(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents of a call: as it names them in pixels, else the denoiser's own."""
    own: Any = denoiser_of(pipe).config
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    height, width = (
        int(call[side]) // factor if call.get(side) else int(own["sample_size"]) for side in ("height", "width")
    )
    return height, width


class FlopCounts:
    """FLOPs of a denoiser's calls by the shapes of their tensors, each shape counted once on a copy without weights.

    Args:
        denoiser: As it will run, adapters included; it is copied now.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        weightless = {
            id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else tensor.to("meta")
            for tensor in tensors
        }
        self._copy = copy.deepcopy(denoiser, weightless).eval()
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self, latents: Tensor, embeds: Mapping[str, Tensor]) -> int:
        """FLOPs of one call with tensors of these shapes."""
        from torch.utils.flop_counter import FlopCounterMode

        key = (tuple(latents.shape), *((name, tuple(tensor.shape)) for name, tensor in sorted(embeds.items())))
        if key not in self._known:
            given = {name: torch.empty(tensor.shape, device="meta") for name, tensor in embeds.items()}
            sample, times = (torch.empty(shape, device="meta") for shape in (latents.shape, latents.shape[:1]))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call_denoiser(self._copy, sample, times, given)
            self._known[key] = int(counter.get_total_flops())
        return self._known[key]
