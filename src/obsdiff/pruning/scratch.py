"""The shape that a prune leaves, with weights as they are before any training: the small model from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.denoisers import parts_of, shrunk_of
from obsdiff.pruning.masks import apply_masks


@torch.no_grad()
def draw_weights(denoiser: nn.Module, masks: Mapping[str, Tensor], seed: int) -> None:
    """Give a pruned denoiser new weights, drawn as its class draws them, in place; what is pruned stays zero or gone.

    Modules that were cut are drawn for their own sizes; norms begin with ones.

    Args:
        denoiser: Of diffusers, or two of them.
        masks: Bool by layer (True = kept), of single weights.
        seed: Of the draw, which leaves torch's own generators as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for model in parts_of(denoiser).values():
            kind: Any = type(model)
            drawn = kind.from_config(dict(model.config))  # type: ignore[arg-type]
            _draw_cut(drawn, shrunk_of(model) or {})
            model.load_state_dict(drawn.state_dict())
    weights: list[Tensor] = [denoiser.get_parameter(f"{name}.weight") for name in masks]
    apply_masks(weights, [mask.to(weight) for weight, mask in zip(weights, masks.values(), strict=True)])


def _draw_cut(model: nn.Module, shrunk: Mapping[str, Any]) -> None:
    """Draw the tensors that a shrunk class makes as zeros."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in shrunk.get("tensors", {})):
        module: Any = model.get_submodule(owner)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:  # the norms of diffusers
            nn.init.ones_(module.weight)
