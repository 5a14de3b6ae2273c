"""Flux.2 and Klein: no biases, fused single blocks of [text, image]; padding is attended and not known."""

from obsdiff.models.families.base import IMAGE, TEXT, Family

FLUX2 = Family(
    denoiser="Flux2Transformer2DModel",
    title="Flux.2, Klein",
    time_scale=1 / 1000,
    guidance="calls",
    tokens=(
        ("single_transformer_blocks.*", (TEXT, IMAGE)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.ff_context.*", (TEXT,)),
    ),
)
