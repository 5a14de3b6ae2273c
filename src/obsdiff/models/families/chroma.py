"""Chroma: Flux's blocks, with padding masked (its mask covers [text, image])."""

from dataclasses import replace

from obsdiff.models.families.flux import FLUX

CHROMA = replace(FLUX, denoiser="ChromaTransformer2DModel", title="Chroma", text=(), mask="attention_mask")
