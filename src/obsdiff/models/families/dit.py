"""DiT: class labels, guidance rows [class, null], a learned variance; the pipeline always decodes."""

from obsdiff.models.families.base import Family

DIT = Family(
    denoiser="DiTTransformer2DModel",
    title="DiT",
    pipelines=("DiTPipeline",),
    modulated=True,
    notes="Every block holds embedders of time and class of its own. Prompts are class numbers or names.",
    learned_sigma=True,
    guidance="last",
    input="class_labels",
    latents=False,
)
