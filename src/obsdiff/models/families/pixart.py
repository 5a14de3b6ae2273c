"""PixArt-alpha and -sigma: cross-attention on masked text, a learned variance."""

from obsdiff.models.families.base import TEXT, Family

PIXART = Family(
    denoiser="PixArtTransformer2DModel",
    title="PixArt-alpha, PixArt-sigma",
    learned_sigma=True,
    mask="encoder_attention_mask",
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
)
