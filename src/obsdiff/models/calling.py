"""The one convention by which training and recording call a denoiser: latents, times, conditions by embeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.diffusion.noising import Noising, noising_of
from obsdiff.errors import UserError
from obsdiff.models.families import find_family
from obsdiff.models.info import call_arguments

NEGATIVE = "negative_"


def call_denoiser(denoiser: nn.Module, latents: Tensor, times: Tensor, embeds: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's answer to noisy ``latents`` (n, ...) at ``times`` (n,), told ``embeds`` (by pipeline name)."""
    family = find_family(denoiser)
    conditions = {argument: embeds[name] for argument, name in family.conditions}
    answer = denoiser(**{family.sample: latents, family.time: times}, **conditions, return_dict=False)
    return answer[0]


def drop_prompts(embeds: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Embeds with those of the negative prompt where ``dropped`` (bool (n,)), for classifier-free guidance."""
    return {
        name: torch.where(
            dropped.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device), embeds[NEGATIVE + name], tensor
        )
        for name, tensor in embeds.items()
        if not name.startswith(NEGATIVE)
    }


def noising_of_pipeline(pipe: Any) -> Noising:
    """The noise process of the pipeline's own scheduler.

    Raises:
        UserError: Its prediction type is unknown.
    """
    try:
        return noising_of(pipe.scheduler.config, getattr(pipe.scheduler, "alphas_cumprod", None))
    except ValueError as error:
        raise UserError(f"cannot train with {type(pipe.scheduler).__name__}: {error}") from error


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
