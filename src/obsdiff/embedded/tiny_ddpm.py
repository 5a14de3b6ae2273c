"""Genuine ``DDPMPipeline`` objects of any small size: a UNet with self-attention that draws pixels without a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TinyDDPM:
    """Sizes of a small DDPM pipeline.

    Attributes:
        channels: Of each level, each half the resolution of the one before; all but the first have attention.
        resnets: ResNets of a level on the way down; on the way up there is one more.
        head_dim: Channels of an attention head.
        groups: Of every GroupNorm; a divisor of ``channels``. Many, so that channels can be removed by whole groups.
        dropout: In the ResNets, while training.
        image_size: Pixels per side.
        image_channels: 1 for grey.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    resnets: int = 1
    head_dim: int = 8
    groups: int = 16
    dropout: float = 0.1
    image_size: int = 16
    image_channels: int = 1


def build_tiny_ddpm(sizes: TinyDDPM) -> Any:
    """A ``DDPMPipeline`` with random weights from torch's global generator, float32, on the CPU.

    It predicts the noise of a cosine schedule of 1,000 steps (2102.09672 eq. 17), and samples by DDIM (2010.02502),
    which needs few steps and draws the same image from the same noise.
    """
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    attended = len(sizes.channels) - 1
    return DDPMPipeline(
        unet=UNet2DModel(
            sample_size=sizes.image_size,
            in_channels=sizes.image_channels,
            out_channels=sizes.image_channels,
            block_out_channels=sizes.channels,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * attended),
            up_block_types=(*["AttnUpBlock2D"] * attended, "UpBlock2D"),
            layers_per_block=sizes.resnets,
            attention_head_dim=sizes.head_dim,
            norm_num_groups=sizes.groups,
            dropout=sizes.dropout,
        ),
        scheduler=DDIMScheduler(
            num_train_timesteps=1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="epsilon",
            clip_sample=True,
        ),
    )
