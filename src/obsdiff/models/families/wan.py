"""Wan 2.1 and 2.2: cross-attention on text whose padding is attended; norms of queries and keys over all heads."""

from obsdiff.models.families.base import TEXT, Family

WAN = Family(
    denoiser="WanTransformer3DModel",
    components=("transformer", "transformer_2"),
    title="Wan 2.1, 2.2",
    guidance="calls",
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
)
