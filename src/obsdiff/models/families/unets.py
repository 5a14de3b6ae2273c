"""UNets: Stable Diffusion 1.5, 2.1 and XL (padding is attended), and unconditional ones of pixels (DDPM)."""

from obsdiff.models.families.base import TEXT, Family, TextSegment

UNET_CONDITION = Family(
    denoiser="UNet2DConditionModel",
    components=("unet",),
    title="Stable Diffusion 1.5, 2.1, XL",
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    modulated=True,
    cuts=("heads", "ffn", "channels"),
    notes=(
        "ResNet blocks lose inner channels by whole GroupNorm groups, the only exact way. Keys and values of all "
        "cross-attentions read one tensor: one Hessian serves them all."
    ),
    sample="sample",
    text=(TextSegment(("tokenizer", "tokenizer_2")),),
    tokens=(("*.attn2.to_[kv]", (TEXT,)),),
    spare=(),
)

UNET = Family(
    denoiser="UNet2DModel",
    components=("unet",),
    title="DDPM",
    pipelines=("DDPMPipeline",),
    modulated=True,
    cuts=("heads", "channels"),
    notes="Pixels, no prompts. An attention with one head (ddpm-cifar10) has none to spare.",
    sample="sample",
    guidance="none",
    input="nothing",
    latents=False,
    spare=(),
)
