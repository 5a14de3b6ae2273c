"""AuraFlow: double blocks, then single ones of [registers, text, image]; padding is zero and attended."""

from obsdiff.models.families.base import Family

AURA_FLOW = Family(
    denoiser="AuraFlowTransformer2DModel",
    title="AuraFlow",
    time_scale=1 / 1000,
)
