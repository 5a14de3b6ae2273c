"""Tiny UNet pipelines: SD 1.5, SD 2.1, SDXL and DDPM."""

from __future__ import annotations

from typing import Any

from tests.families.autoencoders import LATENT_CHANNELS, image_autoencoder
from tests.families.making import TEXT_LENGTH, TEXT_WIDTH, TinyPipeline, embeddings
from tests.families.text import clip, pair

CLIP_WIDTHS = (16, 24)  # of SDXL's and SD3's two CLIP encoders


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return UNet2DConditionModel(**{**sizes, **changes})


def _stable_diffusion(unet: Any, scheduler: Any, encoders: bool) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=image_autoencoder(),
        **pair(encoders, clip),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15(encoders: bool) -> Any:
    """Four heads at each level, convolutions around the transformers, PNDM."""
    from diffusers import PNDMScheduler

    unet = _unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    return _stable_diffusion(unet, scheduler, encoders)


def sd21(encoders: bool) -> Any:
    """Heads of 4 channels at both levels, linear layers around the transformers, velocity prediction."""
    from diffusers import DDIMScheduler

    unet = _unet(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(4, 8),
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _stable_diffusion(unet, scheduler, encoders)


def sdxl(encoders: bool) -> Any:
    """Transformers of two blocks at the lower level only; pooled text and sizes beside the time."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(CLIP_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTHS[1],
    )
    return StableDiffusionXLPipeline(
        vae=image_autoencoder(),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[0])),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[1], projected=True), "_2"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def ddpm(encoders: bool) -> Any:
    """Pixels, no conditioning, heads of 4 channels at both levels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def _text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=2),
    }


def _two_texts(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, sum(CLIP_WIDTHS), salt=1),
        "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, sum(CLIP_WIDTHS), salt=2),
        "pooled_prompt_embeds": embeddings(rows, CLIP_WIDTHS[1], salt=3),
        "negative_pooled_prompt_embeds": embeddings(rows, CLIP_WIDTHS[1], salt=4),
    }


CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}

UNETS = {
    "sd15": TinyPipeline(
        make=sd15,
        conditioning=_text,
        call=CALL,
        pipeline="StableDiffusionPipeline",
        denoisers={"unet": "UNet2DConditionModel"},
        sample="sample",
        time_form="t ()",
        guidance="negative first",
        notes="PNDM: three denoiser calls in two steps.",
    ),
    "sd21": TinyPipeline(
        make=sd21,
        conditioning=_text,
        call=CALL,
        pipeline="StableDiffusionPipeline",
        denoisers={"unet": "UNet2DConditionModel"},
        sample="sample",
        time_form="t ()",
        guidance="negative first",
    ),
    "sdxl": TinyPipeline(
        make=sdxl,
        conditioning=_two_texts,
        call=CALL,
        pipeline="StableDiffusionXLPipeline",
        denoisers={"unet": "UNet2DConditionModel"},
        sample="sample",
        time_form="t ()",
        guidance="negative first",
    ),
    "ddpm": TinyPipeline(
        make=ddpm,
        conditioning=lambda rows: {"batch_size": rows},
        call={"num_inference_steps": 2},
        pipeline="DDPMPipeline",
        denoisers={"unet": "UNet2DModel"},
        output_type="np",
        output_types=("np",),
        result_form="BHWC",
        sample="sample",
        time_form="t ()",
        unguided={},
        text="",
        prompts=False,
        negatives=False,
        notes="Any output_type but 'pil' gives numpy; rows of generators are taken.",
    ),
}
