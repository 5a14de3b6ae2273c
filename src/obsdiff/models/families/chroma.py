"""Chroma: Flux's blocks, with padding masked (its mask covers [text, image])."""

from dataclasses import replace

from obsdiff.models.families.flux import FLUX

CHROMA = replace(
    FLUX,
    denoiser="ChromaTransformer2DModel",
    title="Chroma",
    pipelines=("ChromaPipeline",),
    notes="As Flux.1, with modulations from one network (distilled_guidance_layer).",
    text=(),
    mask="attention_mask",
)
