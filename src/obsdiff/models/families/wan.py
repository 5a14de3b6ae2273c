"""Wan 2.1 and 2.2: cross-attention on text whose padding is attended; norms of queries and keys over all heads."""

from obsdiff.models.families.base import TEXT, Family

WAN = Family(
    denoiser="WanTransformer3DModel",
    components=("transformer", "transformer_2"),
    title="Wan 2.1, 2.2",
    video=True,
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    notes=(
        "Queries and keys are normalised over all heads: see below. Of Wan 2.2 both denoisers are "
        "pruned, each from its own share of the trajectory."
    ),
    guidance="calls",
    in_front=("*condition_embedder.time_proj",),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
)
