"""What of a denoiser is trained."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.training.options import Trained


def choose_trained(denoiser: nn.Module, masks: Mapping[str, Tensor], options: Trained) -> None:
    """Freeze all but what is trained, put adapters in, and switch to training.

    Args:
        denoiser: Changed in place.
        masks: Bool by layer (True = kept).
        options: What is trained.

    Raises:
        UserError: That would be nothing.
    """
    denoiser.requires_grad_(False)
    if options.lora_rank is not None:
        from obsdiff.training.adapters import add_adapters

        chosen = adapted_layers(denoiser, masks, options)
        add_adapters(denoiser, chosen, masks, options.lora_rank, options.lora_alpha)
        if options.frozen_dtype is not None:
            for parameter in denoiser.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(getattr(torch, options.frozen_dtype))
    else:
        for name in trained_parameters(denoiser, options):
            denoiser.get_parameter(name).requires_grad_(True)
    denoiser.train()
    if options.gradient_checkpointing:
        enable: Any = denoiser.enable_gradient_checkpointing
        enable()


def load_trained(
    denoiser: nn.Module, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], options: Trained
) -> None:
    """Give a freshly loaded denoiser the trained weights, adapters merged.

    Those in its dtype are shared with ``state`` and not copied, so that neither may be changed in place while the other
    is needed; no memory of what it was loaded with is left.

    Args:
        denoiser: Changed in place; its dtype and device stay.
        state: The whole state of the denoiser that was trained, adapters included.
        masks, options: As they were chosen by.
    """
    if options.lora_rank is not None:
        from obsdiff.training.adapters import add_adapters, merge_adapters

        adapted = [name.removesuffix(".base_layer.weight") for name in state if name.endswith(".base_layer.weight")]
        add_adapters(denoiser, adapted, masks, options.lora_rank, options.lora_alpha)
    own = {name: (tensor.device, tensor.dtype) for name, tensor in denoiser.state_dict().items()}
    fitting = {name: tensor.to(*own[name]) if name in own else tensor for name, tensor in state.items()}
    denoiser.load_state_dict(fitting, assign=True)
    if options.lora_rank is not None:
        merge_adapters(denoiser)


def check_selection(denoiser: nn.Module, options: Trained) -> None:
    """Refuse a selection that leaves nothing to train, before anything is pruned: pruning keeps the names.

    Raises:
        UserError: It does, or the denoiser cannot save memory so.
    """
    if not (trained_parameters if options.lora_rank is None else linear_layers)(denoiser, options):
        kind = "parameter" if options.lora_rank is None else "linear layer"
        raise UserError(f"model.trained.include {options.include} matches no {kind}; nothing to train")
    if options.gradient_checkpointing and not hasattr(denoiser, "enable_gradient_checkpointing"):
        raise UserError(f"{type(denoiser).__name__} has no gradient checkpointing; turn it off")


def trained_parameters(denoiser: nn.Module, options: Trained) -> list[str]:
    """Names of the parameters that are trained."""
    return _matching([name for name, _ in denoiser.named_parameters()], options.include)


def linear_layers(denoiser: nn.Module, options: Trained) -> list[str]:
    """Names of the linear layers that may get an adapter."""
    return _matching(
        [name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)], options.include
    )


def adapted_layers(denoiser: nn.Module, masks: Mapping[str, Tensor], options: Trained) -> list[str]:
    """Names of the layers that get an adapter: as asked, else all pruned ones, else all."""
    chosen = linear_layers(denoiser, options)
    pruned = [name for name in chosen if name in masks]
    return chosen if options.include else pruned or chosen


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
