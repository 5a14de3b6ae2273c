"""How a pipeline's training noise goes on and what its denoiser is asked for, by prediction type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from obsdiff.diffusion import flow

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Noising(Protocol):
    """A noise process with its target."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` times as the denoiser is told them, float32 (n,), on the CPU."""
        ...

    def spread(self, n: int) -> Tensor:
        """``n`` quantiles of the times that :meth:`draw` draws, the least noisy first, float32 (n,)."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents of the shape of ``x0`` (n, ...)."""
        ...

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should answer, of the shape of ``x0``."""
        ...

    def clean(self, x: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        """The clean latents that an answer to noisy ``x`` amounts to, of the shape of ``x``."""
        ...


@dataclass(frozen=True)
class FlowNoising:
    """Flow matching, logit-normal noise levels (SD3 2403.03206 eq. 19), shifted as the sampler shifts them (eq. 23).

    Attributes:
        shift: Of a sampler whose shift does not depend on anything.
        levels, sigmas: What any other sampler makes of noise levels: levels before its shift, ascending, and what it
            denoises at there, float32 (k,) each; linear in between. None: by ``shift``.
    """

    shift: float = 1.0
    levels: Tensor | None = None
    sigmas: Tensor | None = None

    def shifted(self, levels: Tensor) -> Tensor:
        """The times (n,) at which the sampler denoises what it starts from as ``levels`` (n,) in [0, 1]."""
        if self.levels is None or self.sigmas is None:
            return flow.NUM_TRAIN_TIMESTEPS * self.shift * levels / (1 + (self.shift - 1) * levels)
        above = torch.searchsorted(self.levels, levels.contiguous()).clamp(1, len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        share = ((levels - low) / (high - low)).clamp(0, 1)
        return flow.NUM_TRAIN_TIMESTEPS * torch.lerp(self.sigmas[above - 1], self.sigmas[above], share)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.shifted(flow.sample_sigmas(n, generator))

    def spread(self, n: int) -> Tensor:
        return self.shifted(torch.sigmoid(torch.special.ndtri(_middles(n))).float())

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return flow.add_noise(x0, noise, times / flow.NUM_TRAIN_TIMESTEPS)

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0

    def clean(self, x: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        sigma = (times / flow.NUM_TRAIN_TIMESTEPS).view(-1, *[1] * (x.dim() - 1)).to(x)
        return x - sigma * answer


def _middles(n: int) -> Tensor:
    """The middles of ``n`` equal parts of (0, 1), float64 (n,)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@dataclass(frozen=True)
class DiffusionNoising:
    """Variance-preserving diffusion, ``x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε``, steps drawn uniformly (2006.11239 eq. 4, 14):
    over all of them, whichever of them a sampler stops at (its ``timestep_spacing``, its noise levels).

    Attributes:
        alphas_cumprod: ᾱ, float32 (steps,).
        prediction: The target is ε ("epsilon"), ``v = √ᾱ_t ε − √(1 − ᾱ_t) x₀`` ("v_prediction", 2202.00512 app. D), or
            x₀ ("sample").
    """

    alphas_cumprod: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTION_TYPES:
            raise ValueError(f"prediction type {self.prediction!r} is not one of {', '.join(PREDICTION_TYPES)}")

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(len(self.alphas_cumprod), (n,), generator=generator).float()

    def spread(self, n: int) -> Tensor:
        return (_middles(n) * len(self.alphas_cumprod)).floor().float()

    def _scales(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(x.device)[times.long()].view(-1, *[1] * (x.dim() - 1))
        return kept.sqrt().to(x), (1 - kept).sqrt().to(x)

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        signal, spread = self._scales(x0, times)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        signal, spread = self._scales(x0, times)
        return signal * noise - spread * x0

    def clean(self, x: Tensor, answer: Tensor, times: Tensor) -> Tensor:
        signal, spread = self._scales(x, times)
        if self.prediction == "epsilon":
            return (x - spread * answer) / signal
        return answer if self.prediction == "sample" else signal * x - spread * answer


FIXED = ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def shifts_plainly(scheduler: Mapping[str, Any]) -> bool:
    """Whether a flow-matching scheduler of this configuration does nothing to noise levels but a fixed shift."""
    return not any(scheduler.get(name) for name in FIXED)


def flow_noising(levels: Tensor, sigmas: Tensor) -> FlowNoising:
    """Flow matching at the noise levels of any sampler.

    Args:
        levels: What it starts from, (k,), in any order.
        sigmas: What it makes of them, (k,).

    Raises:
        ValueError: It does not order noise levels.
    """
    order = levels.argsort()
    levels, sigmas = levels[order].float(), sigmas[order].float()
    if bool((sigmas.diff() < 0).any()) or not bool(torch.isfinite(sigmas).all()):
        raise ValueError("its noise levels do not fall from step to step")
    return FlowNoising(levels=levels, sigmas=sigmas)


def noising_of(scheduler: Mapping[str, Any], alphas_cumprod: Tensor | None) -> Noising:
    """The noise process that a pipeline's scheduler belongs to.

    Args:
        scheduler: Its configuration.
        alphas_cumprod: Its ᾱ, or None if it has none (flow matching with a fixed shift).

    Raises:
        ValueError: Its prediction type is none of :data:`PREDICTION_TYPES`.
    """
    if alphas_cumprod is None:
        return FlowNoising(float(scheduler.get("shift") or 1.0))
    return DiffusionNoising(alphas_cumprod.float(), scheduler.get("prediction_type", "epsilon"))
