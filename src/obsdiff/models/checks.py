"""Layers that look right but do not run: what must hold before a denoiser is measured or pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.offload import Turn
from obsdiff.spill import in_turn

PLAIN = (nn.Linear, nn.Conv2d)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISERS = ("bitsandbytes", "torchao", "optimum", "gguf", "diffusers.quantizers", "transformers.integrations")
_QUANTISED = "quantised; load the pipeline without quantisation, prune it, and quantise the result"
_OFFLOADED = "call pipe.remove_all_hooks() and move the pipeline to its device"


@torch.no_grad()
def check_layers(denoiser: nn.Module, names: Sequence[str], times: Mapping[str, int]) -> None:
    """Refuse a denoiser in which one of the layers called ``names`` would be pruned without effect, or wrongly.

    Each must be a plain layer with finite weights of its own, and one call of the denoiser must read it exactly once.

    Args:
        denoiser: The model.
        names: Layers to be pruned.
        times: How often each layer ran in a call (:class:`obsdiff.models.tracing.Trace`).

    Raises:
        UserError: Naming the layer, what is odd about it, and what to do.
    """
    check_plain(denoiser, names)
    check_in_memory(denoiser)
    _check_untied(denoiser, names)
    for name in names:
        own = dict(denoiser.get_submodule(name).named_parameters(recurse=False))
        for what, tensor in zip(own, in_turn(own.values()), strict=True):
            total = tensor.sum(dtype=torch.float32)  # one pass; only an infinite sum needs a second look
            if not bool(torch.isfinite(total)) and not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"layer {name} has a non-finite {what} in the dense model; load the pipeline again, in float32 "
                    "or bfloat16"
                )
        if times.get(name, 0) == 0:
            raise UserError(
                f"layer {name} saw no input in a call of the denoiser: something else runs in its place; restore it, "
                "or exclude it"
            )
        if times[name] > 1:
            raise UserError(
                f"layer {name} is read {times[name]} times in one call of the denoiser, so its inputs are not those of "
                "one place; give each place a layer of its own, or exclude it"
            )


def check_in_memory(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose weights are elsewhere.

    Raises:
        UserError: Naming one.
    """
    for name, parameter in denoiser.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{name} is not in memory (meta device), the denoiser is offloaded; {_OFFLOADED}")


def check_plain(denoiser: nn.Module, names: Iterable[str]) -> None:
    """Refuse wrapped, quantised, compiled, offloaded or caching denoisers, and layers called ``names`` that are not
    plain ones with a floating-point weight of their own. Needs no run.

    Raises:
        UserError: Naming the layer and what to do.
    """
    kind = type(denoiser).__name__
    if getattr(denoiser, "is_quantized", False) or getattr(denoiser, "hf_quantizer", None) is not None:
        raise UserError(f"this {kind} is {_QUANTISED}")
    for name, module in denoiser.named_modules():
        where = f"{kind}, {name}" if name else kind
        if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
            raise UserError(
                f"{where} carries a LoRA adapter; call pipe.fuse_lora() and pipe.unload_lora_weights() first to keep "
                "its effect (or the second alone to drop it)"
            )
        if module._compiled_call_impl is not None:
            raise UserError(f"{where} is compiled, which hides its layers; prune before compiling")
        if not isinstance(getattr(module, "_hf_hook", None), Turn | None):
            raise UserError(f"{where} is offloaded by accelerate; {_OFFLOADED}")
        if getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            hooks = ", ".join(module._diffusers_hook.hooks)
            raise UserError(
                f"{where} has hooks of diffusers ({hooks}) that cache, skip or offload layers; disable them first "
                "(disable_cache(), or load the pipeline again)"
            )
        if getattr(module, "fused_projections", False):
            raise UserError(f"{where} has fused projections, which its own q, k and v no longer reach; unfuse them "
                            "(unfuse_qkv_projections()) first")  # fmt: skip
    for name in names:
        _check_plain_layer(name, denoiser.get_submodule(name))


def _check_plain_layer(name: str, layer: nn.Module) -> None:
    kind = type(layer)
    own = kind.__mro__[1] if hasattr(layer, "basis") else kind  # on a basis it is as plain: it has rows and a bias
    if own not in PLAIN:
        if kind.__module__.startswith(QUANTISERS):
            raise UserError(f"layer {name} is a {kind.__name__} of {kind.__module__.split('.')[0]}: {_QUANTISED}")
        raise UserError(
            f"layer {name} is a {kind.__name__}, not a plain Linear or Conv2d; put a plain layer in its place, or "
            "exclude it"
        )
    if "forward" in vars(layer):
        raise UserError(
            f"layer {name} has a forward of its own in place of {kind.__name__}'s; remove it, or exclude it"
        )
    weight = layer._parameters.get("weight")
    if weight is None:
        raise UserError(
            f"the weight of layer {name} is made anew at each call (weight norm, torch.nn.utils.prune); make it "
            "permanent first, with the remove function of what made it"
        )
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dtype not in FLOATS:
        held = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
        raise UserError(f"the weight of layer {name} is held as {held}: it is {_QUANTISED}")


def _check_untied(denoiser: nn.Module, names: Sequence[str]) -> None:
    """Refuse layers that share memory with any other parameter: pruned, they would be untied without a word."""
    chosen = set(names)
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in denoiser.named_parameters(remove_duplicate=False)
        if p.numel() > 0 and not p.is_meta and p.is_contiguous()
    )
    reach = ("", 0, "")  # of all spans so far, the one that ends last
    for device, start, end, name in spans:
        if device == reach[0] and start < reach[1]:
            pair = sorted((reach[2], name))
            if any(one.rpartition(".")[0] in chosen for one in pair):
                raise UserError(
                    f"{pair[0]} and {pair[1]} are tied (one tensor serves both), and pruning would untie them; give "
                    "each a copy of its own (nn.Parameter(p.detach().clone())), or exclude both"
                )
        if device != reach[0] or end > reach[1]:
            reach = (device, end, name)
