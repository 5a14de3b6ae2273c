"""How a pipeline's training noise goes on and what its denoiser is asked for, by prediction type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from obsdiff.diffusion import flow

PREDICTION_TYPES = ("flow", "epsilon", "v_prediction")


class Noising(Protocol):
    """A noise process with its target."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` times as the denoiser is told them, float32 (n,), on the CPU."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents of the shape of ``x0`` (n, ...)."""
        ...

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should answer, of the shape of ``x0``."""
        ...


@dataclass(frozen=True)
class FlowNoising:
    """Flow matching, logit-normal noise levels (SD3 2403.03206 eq. 19), shifted as the sampler shifts them (eq. 23)."""

    shift: float = 1.0

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        sigmas = flow.sample_sigmas(n, generator)
        return flow.NUM_TRAIN_TIMESTEPS * self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return flow.add_noise(x0, noise, times / flow.NUM_TRAIN_TIMESTEPS)

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0


@dataclass(frozen=True)
class DiffusionNoising:
    """Variance-preserving diffusion, ``x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε``, steps drawn uniformly (2006.11239 eq. 4, 14).

    Attributes:
        alphas_cumprod: ᾱ, float32 (steps,).
        velocity: The target is ``v = √ᾱ_t ε − √(1 − ᾱ_t) x₀`` (2202.00512 app. D) instead of ε.
    """

    alphas_cumprod: Tensor
    velocity: bool = False

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(len(self.alphas_cumprod), (n,), generator=generator).float()

    def _scales(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(x.device)[times.long()].view(-1, *[1] * (x.dim() - 1))
        return kept.sqrt().to(x), (1 - kept).sqrt().to(x)

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        signal, spread = self._scales(x0, times)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if not self.velocity:
            return noise
        signal, spread = self._scales(x0, times)
        return signal * noise - spread * x0


def noising_of(scheduler: Mapping[str, Any], alphas_cumprod: Tensor | None) -> Noising:
    """The noise process that a pipeline's scheduler belongs to.

    Args:
        scheduler: Its configuration.
        alphas_cumprod: Its ᾱ, or None if it has none (flow matching).

    Raises:
        ValueError: Its prediction type is none of :data:`PREDICTION_TYPES`.
    """
    if alphas_cumprod is None:
        return FlowNoising(float(scheduler.get("shift") or 1.0))
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES[1:]:
        raise ValueError(f"prediction type {kind!r} is not one of {', '.join(PREDICTION_TYPES)}")
    return DiffusionNoising(alphas_cumprod.float(), velocity=kind == "v_prediction")
