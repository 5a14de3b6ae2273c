"""LTX-Video: cross-attention on masked text; the rotary tables of attn1 span all heads."""

from typing import Any

from obsdiff.models.families.base import TEXT, Family


def packed(pipe: Any, latents: Any) -> Any:
    """Latents (n, c, frames, h, w) as tokens (n, frames · h · w, c) of the pipeline's patches."""
    return pipe._pack_latents(latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)


LTX = Family(
    denoiser="LTXVideoTransformer3DModel",
    packed=packed,
    title="LTX-Video",
    video=True,
    pipelines=("LTXPipeline",),
    mask="encoder_attention_mask",
    in_front=("time_embed.linear",),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
    refused={"*.attn1": "its rotary tables span all heads, each with frequencies of its own"},
)
