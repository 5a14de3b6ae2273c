"""Z-Image: lists of latents and texts, time backwards, a negated output; its learned filler tokens are attended."""

from obsdiff.models.families.base import Family

Z_IMAGE = Family(
    denoiser="ZImageTransformer2DModel",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    notes="Its guidance scale adds to one.",
    sample="x",
    time="t",
    embeds="cap_feats",
    time_scale=-1 / 1000,
    time_offset=1.0,
    sign=-1,
    listed=True,
    guidance="last",
)
