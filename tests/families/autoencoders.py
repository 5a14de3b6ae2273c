"""Tiny autoencoders, each of the class that its family uses."""

from __future__ import annotations

from typing import Any

LATENT_CHANNELS = 4


def image_autoencoder(levels: int = 2, **changes: Any) -> Any:
    """An ``AutoencoderKL`` that shrinks images by 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=8 * 2 ** (levels - 1),
        **changes,
    )


def shifted_autoencoder(levels: int = 2) -> Any:
    """As SD3, Flux, Chroma, Lumina2 and Z-Image have it: scale and shift, no quantisation convolutions."""
    return image_autoencoder(
        levels, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False
    )


def flux2_autoencoder() -> Any:
    """Normalises latents of 2 x 2 patches by running statistics, here not those of a standard normal."""
    from diffusers import AutoencoderKLFlux2

    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=16,
    )
    made.bn.running_mean.normal_(std=0.2)
    made.bn.running_var.uniform_(0.5, 1.5)
    return made


def qwen_autoencoder() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], z_dim=LATENT_CHANNELS, **_STATISTICS
    )


def wan_autoencoder() -> Any:
    """Shrinks space by 2 and time by 2 (first frame alone)."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        z_dim=LATENT_CHANNELS,
        scale_factor_spatial=2,
        scale_factor_temporal=2,
        **_STATISTICS,
    )


_STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}


def deep_compression_autoencoder() -> Any:
    """Sana's, here with a factor of 8 instead of 32."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.4,
    )


def ltx_autoencoder() -> Any:
    """Shrinks space by 8 and time by 2; statistics of the latents in buffers."""
    from diffusers import AutoencoderKLLTXVideo

    made = AutoencoderKLLTXVideo(
        latent_channels=2 * LATENT_CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        encoder_causal=True,
    )
    made.latents_mean.normal_(std=0.2)
    made.latents_std.uniform_(0.5, 1.5)
    return made


def cogvideox_autoencoder() -> Any:
    """Shrinks space by 8 and time by 4."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
    )


def hunyuan_autoencoder() -> Any:
    """Shrinks space by 8 and time by 4."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        block_out_channels=(8,) * 4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
