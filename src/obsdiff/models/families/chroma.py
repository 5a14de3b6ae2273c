"""Chroma: Flux's blocks, with padding masked (its mask covers [text, image])."""

from dataclasses import replace

from obsdiff.models.families.flux import FLUX

CHROMA = replace(
    FLUX,
    denoiser="ChromaTransformer2DModel",
    title="Chroma",
    pipelines=("ChromaPipeline",),
    modulated=False,
    notes="As Flux.1, with modulations from one network that sees the time alone and is left alone.",
    text=(),
    mask="attention_mask",
    apart=("distilled_guidance_layer.*",),
)
