"""LoRA that respects the mask: the effective weight is ``W + M ∘ ΔW`` in training, so merging changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from obsdiff.errors import UserError

NAME = "recovery"


class MaskedLoraLinear(LoraLinear):
    """peft's LoRA layer with a mask (True = kept) on what it adds; None adds everywhere."""

    mask: Tensor | None = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``M ∘ (scale · B A)``."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta if self.mask is None else delta * self.mask.to(delta.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """With the effective weight, as merged: the mask does not commute with B A, so the two small products of
        ordinary LoRA do not do."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        weight = base.weight + self.get_delta_weight(self.active_adapters[0]).to(base.weight.dtype)
        return nn.functional.linear(x, weight, base.bias)


def add_adapters(denoiser: nn.Module, layers: list[str], masks: Mapping[str, Tensor], rank: int, alpha: float) -> None:
    """Put a LoRA of ``rank`` on the named linear layers; only it is trainable afterwards.

    Args:
        denoiser: Changed in place.
        layers: Names of linear layers.
        masks: Bool by layer (True = kept); layers without one get an ordinary LoRA.
        rank: Of the update.
        alpha: Its scale is alpha / rank.

    Raises:
        UserError: There is no layer to adapt.
    """
    if not layers:
        raise UserError("no layer to put a LoRA on; widen --model.trained.include")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none")
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    inject_adapter_in_model(config, denoiser, adapter_name=NAME)
    for name, mask in masks.items():
        layer = denoiser.get_submodule(name)
        if isinstance(layer, MaskedLoraLinear):
            layer.mask = mask.to(layer.weight.device)


@torch.no_grad()
def merge_adapters(denoiser: nn.Module) -> None:
    """Add what the adapters learnt to the weights and take the adapters out."""
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, MaskedLoraLinear):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(denoiser, "peft_config"):
        del denoiser.peft_config
