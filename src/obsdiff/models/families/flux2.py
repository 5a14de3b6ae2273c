"""Flux.2 and Klein: no biases, fused single blocks of [text, image]; padding is attended and not known."""

from typing import Any

from obsdiff.models.families.base import IMAGE, TEXT, Family


def packed(pipe: Any, latents: Any) -> Any:
    """Latents of 2 x 2 patches (n, c, h, w) as tokens (n, h · w, c)."""
    return pipe._pack_latents(latents)


FLUX2 = Family(
    denoiser="Flux2Transformer2DModel",
    title="Flux.2, Klein",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    notes=(
        "No layer has a bias, so no refit can take up a mean. Single blocks are one input and one output"
        " layer (24,576 wide in dev, 2.4 GB of Hessian each while it is solved)."
    ),
    time_scale=1 / 1000,
    packed=packed,
    guidance="calls",
    in_front=("*_modulation*.linear",),
    tokens=(
        ("*double_stream_modulation_txt.*", (TEXT,)),
        ("single_transformer_blocks.*", (TEXT, IMAGE)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.ff_context.*", (TEXT,)),
    ),
)
