"""The one convention by which training and recording call a denoiser: latents, times, conditions by embeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.families import find_family
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.wiring import denoiser_of

NEGATIVE = "negative_"


def call_denoiser(denoiser: nn.Module, latents: Tensor, times: Tensor, embeds: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's answer to noisy ``latents`` (n, ...) at ``times`` (n,), told ``embeds`` (by pipeline name).

    It is given everything in its own dtype but the times, which half precision would round to steps of 2 to 4.
    """
    family, dtype = find_family(denoiser), dtype_of(denoiser)
    conditions = {argument: embeds[name].to(dtype) for argument, name in family.conditions}
    answer = denoiser(**{family.sample: latents.to(dtype), family.time: times}, **conditions, return_dict=False)
    return answer[0]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


@contextmanager
def default_dtype(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """What tensors are made in that name no dtype; Lightning changes it where everything is trained in another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def drawing(pipe: Any) -> Iterator[None]:
    """Let a pipeline draw whose denoiser is in training: without dropout and autocast, and though the denoiser is in
    another dtype than the pipeline's other parts (it is then given its own and answers in theirs)."""
    denoiser = denoiser_of(pipe)
    family, dtype = find_family(denoiser), dtype_of(denoiser)

    def cast(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inner = {k: v if k == family.time else _as(v, dtype) for k, v in given.items()}
        return tuple(_as(value, dtype) for value in args), inner

    def back(_: nn.Module, __: Any, answer: Any) -> Any:
        if isinstance(answer, tuple):
            return tuple(_as(value, outer) for value in answer)
        for key, value in answer.items():
            answer[key] = _as(value, outer)
        return answer

    outer = dtype_of(pipe.vae)
    hooks: list[Any] = []
    if dtype != outer:
        hooks = [denoiser.register_forward_pre_hook(cast, with_kwargs=True), denoiser.register_forward_hook(back)]
    try:
        with eval_mode(pipe), torch.autocast(pipe.device.type, enabled=False), default_dtype(), torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def drop_prompts(embeds: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Embeds with those of the negative prompt where ``dropped`` (bool (n,)), for classifier-free guidance."""
    return {
        name: torch.where(
            dropped.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device), embeds[NEGATIVE + name], tensor
        )
        for name, tensor in embeds.items()
        if not name.startswith(NEGATIVE)
    }


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of images (n, c, h, w) in [-1, 1], drawn from the autoencoder's posterior and normalised as it says."""
    posterior = pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return (posterior.mean + posterior.std * noise - shift) * pipe.vae.config.scaling_factor


class PromptEncoder:
    """Prompts to embeds through the pipeline's frozen text encoders; each distinct prompt is encoded once."""

    def __init__(self, pipe: Any, keep: int = 4096) -> None:
        self.pipe = pipe
        self.keep = keep
        self._known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeds of ``prompts``, negative ones included, on the CPU."""
        from obsdiff.models.conditioning import encode_prompts

        if len(self._known) + len(set(prompts)) > self.keep:
            self._known.clear()
        for prompt in set(prompts) - self._known.keys():
            # one at a time: in a batch the last bit would depend on which others are new, unlike in a resumed run
            encoded = encode_prompts(self.pipe, [prompt], call_arguments(self.pipe)).embeds
            self._known[prompt] = {name: tensor[0] for name, tensor in encoded.items()}
        names = self._known[prompts[0]]
        return {name: torch.stack([self._known[prompt][name] for prompt in prompts]) for name in names}
