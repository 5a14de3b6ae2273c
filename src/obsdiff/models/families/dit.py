"""DiT: class labels, guidance rows [class, null], a learned variance; the pipeline always decodes."""

from obsdiff.models.families.base import Family

DIT = Family(
    denoiser="DiTTransformer2DModel",
    title="DiT",
    learned_sigma=True,
    guidance="last",
    input="class_labels",
    latents=False,
)
