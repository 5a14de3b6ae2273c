"""PixArt-alpha and -sigma: cross-attention on masked text, a learned variance."""

from obsdiff.models.families.base import TEXT, Family

PIXART = Family(
    denoiser="PixArtTransformer2DModel",
    title="PixArt-alpha, PixArt-sigma",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    notes="Keys and values of all cross-attentions read one tensor: one Hessian serves them all.",
    learned_sigma=True,
    mask="encoder_attention_mask",
    in_front=("adaln_single.linear",),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
)
