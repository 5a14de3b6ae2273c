"""FLOPs of one denoiser call, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from obsdiff.errors import UserError
from obsdiff.models.calling import call_denoiser, one_image
from obsdiff.models.calls import moved
from obsdiff.models.denoisers import device_of, dtype_of
from obsdiff.models.subject import Subject

META = torch.device("meta")


def denoiser_flops(subject: Subject, call: Mapping[str, Any]) -> int:
    """FLOPs (two per multiply-add, attention included) of one call of the denoiser with one image, without guidance.

    Counted by torch's ``FlopCounterMode`` on a copy without weights. Zeros inside dense tensors count in full: no
    dense kernel skips them. Of two denoisers, the mean.
    """
    return shrunk_flops(subject, call, {"tensors": {}, "attributes": {}})


def shrunk_flops(subject: Subject, call: Mapping[str, Any], shapes: Mapping[str, Any]) -> int:
    """Like :func:`denoiser_flops`, if the denoiser had ``shapes`` (:func:`obsdiff.models.graph.shapes_with`).

    Raises:
        UserError: It does not run without weights.
    """
    from obsdiff.models.obsdiff_shrunk import apply_shapes

    counts, several = [], len(subject.components) > 1
    for name, arguments in one_image(subject.pipe, call).items():
        model, prefix = subject.components[name], f"{name}." if several else ""
        shrunk = without_weights(model)
        own = {
            key: {inner.removeprefix(prefix): value for inner, value in described.items() if inner.startswith(prefix)}
            for key, described in shapes.items()
        }
        apply_shapes(shrunk, own)
        given = moved(arguments, META, dtype_of(model), torch.float32)
        try:
            counts.append(counted(partial(shrunk, **given)))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if any(own.values()):
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"the FLOPs of a smaller {type(model).__name__} cannot be counted, since it does not run without "
                    f"weights ({reason}); give a budget in parameters"
                ) from error
            counts.append(counted_in_full(partial(model, **arguments)))
    return round(sum(counts) / len(counts))


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of what ``call`` does."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def counted_in_full(call: Callable[[], Any]) -> int:
    """:func:`counted` where there are weights: attention as plain products, since fused ones count as none on CPUs."""
    with sdpa_kernel(SDPBackend.MATH):
        return counted(call)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode."""
    tensors = [*model.parameters(), *model.buffers()]
    weightless = {
        id(tensor): nn.Parameter(tensor.detach().to("meta", torch.float32), requires_grad=False)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(model, weightless).eval()


class FlopCounts:
    """FLOPs of a denoiser's calls by the shapes of their tensors, each shape counted once on a copy without weights.

    Args:
        denoiser: As it will run, adapters included; it is copied now.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._copy = without_weights(denoiser)
        self._denoiser = denoiser
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self, latents: Tensor, embeds: Mapping[str, Tensor], common: Mapping[str, Any] | None = None) -> int:
        """FLOPs of one call with tensors of these shapes."""
        key = (tuple(latents.shape), *((name, tuple(tensor.shape)) for name, tensor in sorted(embeds.items())))
        if key not in self._known:
            self._known[key] = self._count(latents, embeds, common or {})
        return self._known[key]

    def _count(self, latents: Tensor, embeds: Mapping[str, Tensor], common: Mapping[str, Any]) -> int:
        def call(count: Callable[..., int], model: nn.Module, device: torch.device) -> int:
            given = {name: tensor.to(device) for name, tensor in embeds.items()}
            shared = moved(dict(common), device, torch.float32, torch.float32)
            times = torch.zeros(len(latents), device=device)
            return count(lambda: call_denoiser(model, latents.to(device), times, given, shared))

        try:
            return call(counted, self._copy, META)
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
            TypeError,
        ):  # what it does depends on values, such as the lengths of prompts
            return call(counted_in_full, self._denoiser, device_of(self._denoiser))
