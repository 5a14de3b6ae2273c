"""Z-Image: lists of latents and texts, time backwards, a negated output; its learned filler tokens are attended."""

from typing import Any

from obsdiff.models.families.base import Family


def packed(pipe: Any, latents: Any) -> Any:
    """Latents (n, c, h, w) with a frame axis, (n, c, 1, h, w)."""
    return latents.unsqueeze(2)


Z_IMAGE = Family(
    denoiser="ZImageTransformer2DModel",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    modulated=True,
    notes="Its guidance scale adds to one.",
    sample="x",
    time="t",
    embeds="cap_feats",
    time_scale=-1 / 1000,
    time_offset=1.0,
    sign=-1,
    listed=True,
    packed=packed,
    guidance="last",
    guidance_offset=1.0,
)
