"""Tiny image transformers with separate text: DiT, PixArt, Sana, Lumina2, Z-Image and AuraFlow."""

from __future__ import annotations

from typing import Any

from tests.families.autoencoders import (
    LATENT_CHANNELS,
    deep_compression_autoencoder,
    image_autoencoder,
    shifted_autoencoder,
)
from tests.families.making import TEXT_LENGTH, TEXT_WIDTH, TinyPipeline, embeddings, masks
from tests.families.text import gemma2, pair, qwen3, t5

LUMINA2_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>"
)
HEADS = {"num_attention_heads": 4, "attention_head_dim": 12}


def dit(encoders: bool) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        **HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(
        transformer=transformer,
        vae=image_autoencoder(),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark"},
    )


def _pixart_transformer(sample_size: int) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=3,
        cross_attention_dim=48,
        sample_size=sample_size,
        caption_channels=TEXT_WIDTH,
    )


def pixart_alpha(encoders: bool) -> Any:
    """Embeds resolution and aspect ratio, which the class does for a ``sample_size`` of 128 alone."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    return PixArtAlphaPipeline(
        **pair(encoders, t5),
        vae=image_autoencoder(),
        transformer=_pixart_transformer(128),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_sigma(encoders: bool) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        **pair(encoders, t5),
        vae=image_autoencoder(),
        transformer=_pixart_transformer(8),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _sana_transformer(**changes: Any) -> Any:
    """Eight heads of linear attention, four of cross-attention: other numbers and sizes, as in the public models."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=8,
        attention_head_dim=4,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        **changes,
    )


def sana(encoders: bool, qk_norm: str | None = None) -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    return SanaPipeline(
        **pair(encoders, gemma2),
        vae=deep_compression_autoencoder(),
        transformer=_sana_transformer(qk_norm=qk_norm),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def sana15(encoders: bool) -> Any:
    """Queries and keys normalised over all heads."""
    return sana(encoders, qk_norm="rms_norm_across_heads")


def sana_sprint(encoders: bool) -> Any:
    """Distilled: the guidance is embedded, the scheduler draws noise between the steps."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    return SanaSprintPipeline(
        **pair(encoders, gemma2),
        vae=deep_compression_autoencoder(),
        transformer=_sana_transformer(
            qk_norm="rms_norm_across_heads", guidance_embeds=True, guidance_embeds_scale=0.1, timestep_scale=1000.0
        ),
        scheduler=SCMScheduler(),
    )


def lumina2(encoders: bool) -> Any:
    """Eight query heads on four heads of keys and values; the pipeline's factor of 8 is fixed."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        hidden_size=64,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=8,
        num_kv_heads=4,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=shifted_autoencoder(4),
        **pair(encoders, lambda: gemma2(LUMINA2_SYSTEM)),
    )


def z_image(encoders: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=48,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_autoencoder(),
        **pair(encoders, qwen3),
        transformer=transformer,
    )


def aura_flow(encoders: bool) -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=48,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        **pair(encoders, lambda: t5(multilingual=True)),
        vae=image_autoencoder(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "prompt_attention_mask": masks(rows),
    }


def _guided_text(rows: int) -> dict[str, Any]:
    return {
        **_text(rows),
        "negative_prompt": None,
        "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=2),
        "negative_prompt_attention_mask": masks(rows + 1)[1:],
    }


def _listed_text(rows: int) -> dict[str, Any]:
    given = _guided_text(rows)
    return {
        name: [row[: int(mask.sum())] for row, mask in zip(given[name], given[masked], strict=True)]
        for name, masked in (
            ("prompt_embeds", "prompt_attention_mask"),
            ("negative_prompt_embeds", "negative_prompt_attention_mask"),
        )
    }


CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
PIXART = {**CALL, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": TEXT_LENGTH}
# Whatever the autoencoder, sides are multiples of 32; by default several hundred words stand before each prompt.
SANA = {**PIXART, "height": 32, "width": 32, "complex_human_instruction": None}

DITS = {
    "dit": TinyPipeline(
        make=dit,
        conditioning=lambda rows: {"class_labels": [7 * row + 1 for row in range(rows)]},
        call={"num_inference_steps": 2, "guidance_scale": 3.0},
        pipeline="DiTPipeline",
        denoisers={"transformer": "DiTTransformer2DModel"},
        output_type="np",
        output_types=("np",),
        result_form="BHWC",
        guidance="positive first",
        text="class_labels",
        prompts=False,
        negatives=False,
        output="first half of the channels",
        notes="Any output_type but 'pil' gives numpy of decoded images; the negative rows are class 1000.",
    ),
    "pixart-alpha": TinyPipeline(
        make=pixart_alpha,
        conditioning=_guided_text,
        call=PIXART,
        pipeline="PixArtAlphaPipeline",
        denoisers={"transformer": "PixArtTransformer2DModel"},
        guidance="negative first",
        output="first half of the channels",
        mask="encoder_attention_mask",
    ),
    "pixart-sigma": TinyPipeline(
        make=pixart_sigma,
        conditioning=_guided_text,
        call=PIXART,
        pipeline="PixArtSigmaPipeline",
        denoisers={"transformer": "PixArtTransformer2DModel"},
        guidance="negative first",
        output="first half of the channels",
        mask="encoder_attention_mask",
    ),
    "sana": TinyPipeline(
        make=sana,
        conditioning=_guided_text,
        call=SANA,
        pipeline="SanaPipeline",
        denoisers={"transformer": "SanaTransformer2DModel"},
        guidance="negative first",
        mask="encoder_attention_mask",
    ),
    "sana15": TinyPipeline(
        make=sana15,
        conditioning=_guided_text,
        call=SANA,
        pipeline="SanaPipeline",
        denoisers={"transformer": "SanaTransformer2DModel"},
        guidance="negative first",
        mask="encoder_attention_mask",
    ),
    "sana-sprint": TinyPipeline(
        make=sana_sprint,
        conditioning=_text,
        call=SANA,
        pipeline="SanaSprintPipeline",
        denoisers={"transformer": "SanaTransformer2DModel"},
        time_form="sin t / (sin t + cos t) (B,)",
        guidance="embedded",
        unguided={},
        output="trigonometric",
        negatives=False,
        mask="encoder_attention_mask",
    ),
    "lumina2": TinyPipeline(
        make=lumina2,
        conditioning=_guided_text,
        call={**CALL, "height": 64, "width": 64, "max_sequence_length": 48},
        pipeline="Lumina2Pipeline",
        denoisers={"transformer": "Lumina2Transformer2DModel"},
        time_form="1 - t/1000 (B,)",
        guidance="two calls",
        output="negated",
        mask="encoder_attention_mask",
    ),
    "z-image": TinyPipeline(
        make=z_image,
        conditioning=_listed_text,
        call={**CALL, "max_sequence_length": 32},
        pipeline="ZImagePipeline",
        denoisers={"transformer": "ZImageTransformer2DModel"},
        sample="x",
        sample_form="list of C1HW",
        result_form="BCHW",
        time="t",
        time_form="1 - t/1000 (B,)",
        guidance="positive first",
        unguided={"guidance_scale": 0.0},
        text="cap_feats",
        output="negated",
        notes="The scale adds to one: positive + scale * (positive - negative). A list of prompts is overwritten.",
    ),
    "aura-flow": TinyPipeline(
        make=aura_flow,
        conditioning=_guided_text,
        call={**CALL, "max_sequence_length": TEXT_LENGTH},
        pipeline="AuraFlowPipeline",
        denoisers={"transformer": "AuraFlowTransformer2DModel"},
        time_form="t/1000 (B,)",
        guidance="negative first",
    ),
}
