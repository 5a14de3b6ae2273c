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
    shared=("transformer_blocks.0.norm1.emb",),  # its head asks it
    input="class_labels",
    latents=False,
)
