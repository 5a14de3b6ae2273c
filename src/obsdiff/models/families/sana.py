"""Sana 1.0, 1.5 and Sprint: linear attention, cross-attention on masked text, gated convolutions."""

from obsdiff.models.families.base import TEXT, Family

SANA = Family(
    denoiser="SanaTransformer2DModel",
    title="Sana, Sana 1.5, Sana Sprint",
    pipelines=("SanaPipeline", "SanaSprintPipeline"),
    notes=(
        "Neurons are the channels of gated convolutions; depthwise layers only follow. 1.5 and Sprint "
        "normalise queries and keys over all heads: see below."
    ),
    distilled=("Sana Sprint",),
    mask="encoder_attention_mask",
    in_front=("time_embed.linear",),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
)
