"""LTX-Video: cross-attention on masked text; the rotary tables of attn1 span all heads."""

from obsdiff.models.families.base import TEXT, Family

LTX = Family(
    denoiser="LTXVideoTransformer3DModel",
    title="LTX-Video",
    pipelines=("LTXPipeline",),
    mask="encoder_attention_mask",
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
    refused={"*.attn1": "its rotary tables span all heads, each with frequencies of its own"},
)
