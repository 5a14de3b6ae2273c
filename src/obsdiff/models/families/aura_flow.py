"""AuraFlow: double blocks, then single ones of [registers, text, image]; padding is zero and attended."""

from obsdiff.models.families.base import TEXT, Family

AURA_FLOW = Family(
    denoiser="AuraFlowTransformer2DModel",
    title="AuraFlow",
    pipelines=("AuraFlowPipeline",),
    modulated=True,
    notes="Eight register tokens stand before the text. No layer has a bias.",
    time_scale=1 / 1000,
    tokens=(("*.norm1_context.*", (TEXT,)),),
)
