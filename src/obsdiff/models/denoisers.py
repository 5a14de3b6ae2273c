"""The denoisers of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from obsdiff.errors import UserError


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers or UNets of a pipeline, by their names in it.

    Raises:
        UserError: It has none, or a compiled one.
    """
    if not hasattr(pipe, "components"):
        raise UserError(f"a {type(pipe).__name__} is no pipeline; give a diffusers pipeline")
    found = {}
    for name in ("transformer", "unet", "transformer_2"):
        denoiser = getattr(pipe, name, None)
        if hasattr(denoiser, "_orig_mod"):
            raise UserError(
                f"the {name} is compiled, which hides its layers; use pipe.{name} = pipe.{name}._orig_mod, and compile "
                "again afterwards"
            )
        if isinstance(denoiser, nn.Module):
            found[name] = denoiser
    if not found:
        raise UserError(f"{type(pipe).__name__} has neither a transformer nor a unet; nothing to prune")
    return found


class Denoisers(nn.Module):
    """Two denoisers of one pipeline as one module; names inside begin with theirs in the pipeline."""


def joined(components: Mapping[str, nn.Module]) -> nn.Module:
    """The denoiser, or a module that holds both."""
    if len(components) == 1:
        return next(iter(components.values()))
    both = Denoisers()
    for name, module in components.items():
        both.add_module(name, module)
    both.train(all(module.training for module in components.values()))
    return both


def parts_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The models that names in a denoiser lead to, by the prefix of these names: "" for a single one."""
    if isinstance(denoiser, Denoisers):
        return {f"{name}.": module for name, module in denoiser.named_children()}
    return {"": denoiser}


def shrunk_of(denoiser: nn.Module) -> dict[str, Any] | None:
    """The ``shrunk`` entry of a denoiser's config (sizes of its cut tensors), or None if nothing was cut out of it."""
    config: Any = getattr(denoiser, "config", {})
    found: dict[str, Any] | None = config.get("shrunk")
    return found


def device_of(denoiser: nn.Module) -> torch.device:
    """Where a denoiser runs; its weights may rest elsewhere (:mod:`obsdiff.models.offload`)."""
    model = next(iter(parts_of(denoiser).values()))
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
