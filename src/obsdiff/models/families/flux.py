"""Flux.1: double blocks of two streams, then single blocks of [text, image]; padding is attended (families.md 3.3)."""

from typing import Any

from obsdiff.models.families.base import IMAGE, TEXT, Family, TextSegment


def packed(pipe: Any, latents: Any) -> Any:
    """Latents (n, c, h, w) as tokens of 2 x 2, (n, h / 2 · w / 2, 4 c)."""
    return pipe._pack_latents(latents, *latents.shape)


FLUX = Family(
    denoiser="FluxTransformer2DModel",
    title="Flux.1",
    pipelines=("FluxPipeline",),
    modulated=True,
    notes=(
        "Joint attention is cut in both streams at once; in single blocks heads and neurons share one "
        "output layer and one Hessian (15,360 wide in the public models)."
    ),
    time_scale=1 / 1000,
    packed=packed,
    guidance="calls",
    text=(TextSegment(("tokenizer_2",), length_argument="max_sequence_length", default_length=512),),
    tokens=(
        ("*.norm1_context.*", (TEXT,)),
        ("single_transformer_blocks.*", (TEXT, IMAGE)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.ff_context.*", (TEXT,)),
    ),
)
