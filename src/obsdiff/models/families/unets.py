"""UNets: Stable Diffusion 1.5, 2.1 and XL (padding is attended), and unconditional ones of pixels (DDPM)."""

from obsdiff.models.families.base import TEXT, Family, TextSegment

UNET_CONDITION = Family(
    denoiser="UNet2DConditionModel",
    components=("unet",),
    title="Stable Diffusion 1.5, 2.1, XL",
    sample="sample",
    text=(TextSegment(("tokenizer", "tokenizer_2")),),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
    spare=(),
)

UNET = Family(
    denoiser="UNet2DModel",
    components=("unet",),
    title="DDPM",
    sample="sample",
    guidance="none",
    input="nothing",
    latents=False,
    spare=(),
)
