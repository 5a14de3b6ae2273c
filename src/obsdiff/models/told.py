"""What a denoiser is given in one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Told:
    """The arguments of :func:`obsdiff.models.calling.call_denoiser`.

    Attributes:
        latents: (n, ...).
        times: (n,).
        embeds: Conditions by argument, (n, ...).
        common: What all rows are told.
        guidance: Where the first half of the rows is told the negative prompts of the second, the guidance scale;
            else 1.
        aim: What the dense denoiser answers, (n, ...), where that was kept.
    """

    latents: Tensor
    times: Tensor
    embeds: Mapping[str, Tensor]
    common: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    aim: Tensor | None = None
