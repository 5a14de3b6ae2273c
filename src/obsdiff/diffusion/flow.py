"""Flow matching (rectified flow), the training target of SD3 and Flux.

Convention, as in diffusers' ``FlowMatchEulerDiscreteScheduler``: ``x_σ = (1 − σ) x₀ + σ ε`` with σ in [0, 1], the
denoiser predicts ``ε − x₀`` and is told the time ``1000 σ`` (Lipman et al. 2210.02747 eq. 20-23; SD3 2403.03206 §3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def sample_sigmas(n: int, generator: torch.Generator | None = None) -> Tensor:
    """``n`` noise levels, logit-normal with location 0 and scale 1 (SD3 2403.03206 eq. 19), float32 in (0, 1)."""
    return torch.sigmoid(torch.randn(n, generator=generator))


def add_noise(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``(1 − σ) x₀ + σ ε``; ``sigmas`` (n,) broadcast over all but the first dimension."""
    sigma = sigmas.view(-1, *[1] * (x0.dim() - 1)).to(x0)
    return (1 - sigma) * x0 + sigma * noise


def loss_per_sample(prediction: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity against ``ε − x₀``, one float32 value per sample, shape (n,)."""
    return (prediction.float() - (noise - x0).float()).square().flatten(1).mean(1)
