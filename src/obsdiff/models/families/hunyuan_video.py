"""HunyuanVideo: double blocks, single blocks of [video, text], a refiner of the text; padding is masked."""

from obsdiff.models.families.base import IMAGE, TEXT, Family

HUNYUAN_VIDEO = Family(
    denoiser="HunyuanVideoTransformer3DModel",
    title="HunyuanVideo",
    video=True,
    pipelines=("HunyuanVideoPipeline",),
    modulated=True,
    notes="Guidance is embedded. The refiner of the text is cut too.",
    guidance="calls",
    mask="encoder_attention_mask",
    tokens=(
        ("*.norm1_context.*", (TEXT,)),
        ("single_transformer_blocks.*", (IMAGE, TEXT)),
        ("context_embedder.*", (TEXT,)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.ff_context.*", (TEXT,)),
    ),
)
