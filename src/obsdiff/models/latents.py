"""Images to what the denoiser works on: through the pipeline's autoencoder, normalised and laid out as it says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.families import find_family

_FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of images (n, c, h, w) in [-1, 1] as the denoiser is given them, drawn from the autoencoder's posterior
    and normalised as it says; the images themselves of a pipeline that has none.

    An autoencoder of videos is given videos of one frame.
    """
    if getattr(pipe, "vae", None) is None:
        return images
    family = find_family(*denoisers_of(pipe).values())
    pixels = images.to(pipe.vae.dtype)
    encoded = pipe.vae.encode(pixels.unsqueeze(2) if family.video else pixels)
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:  # Sana's has no spread
        drawn = encoded.latent
    else:
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        drawn = posterior.mean + posterior.std * noise
    laid_out = family.packed(pipe, _normalised(pipe.vae, drawn)) if family.packed else _normalised(pipe.vae, drawn)
    return laid_out


def _normalised(vae: Any, latents: Tensor) -> Tensor:
    """By statistics of each channel where the autoencoder has them (in buffers or in its configuration), of 2 x 2
    patches where it has a norm of them, else by a shift and a scale."""
    config = vae.config
    if (norm := getattr(vae, "bn", None)) is not None:
        patches = torch.nn.functional.pixel_unshuffle(latents, 2)
        shape = (1, -1, 1, 1)
        spread = torch.sqrt(norm.running_var.view(shape) + config.batch_norm_eps)
        return (patches - norm.running_mean.view(shape).to(patches)) / spread.to(patches)
    mean, std = (_statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and std is not None:
        return (latents - mean) * scale / std
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * scale


def _statistic(vae: Any, name: str, like: Tensor) -> Tensor | None:
    found = getattr(vae, name, None)
    found = vae.config.get(name) if found is None else found
    return None if found is None else torch.as_tensor(found).to(like).view(1, -1, *[1] * (like.dim() - 2))


def vae_factor(pipe: Any) -> int:
    """Pixels per latent along a side."""
    if (own := next((getattr(pipe, name) for name in _FACTORS if getattr(pipe, name, None)), None)) is not None:
        return int(own)
    vae: Any = getattr(pipe, "vae", None)
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def patch_of(pipe: Any) -> int:
    """Latents per token along a side: by the denoiser's configuration, or by the pipeline's packing of them."""
    config: Any = next(iter(denoisers_of(pipe).values())).config
    own = config.get("patch_size") or config.get("all_patch_size") or 1
    own = own[-1] if isinstance(own, list | tuple) else own
    vae: Any = getattr(getattr(pipe, "vae", None), "config", {})
    channels = vae.get("latent_channels") or vae.get("z_dim")
    packing = math.isqrt(int(config.get("in_channels") or 1) // int(channels)) if channels else 1
    return max(int(own), packing)
