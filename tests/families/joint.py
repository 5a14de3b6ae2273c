"""Tiny image transformers with joint attention of text and image: SD3, Flux, Chroma, Flux.2 and Qwen-Image."""

from __future__ import annotations

from typing import Any

from tests.families.autoencoders import (
    LATENT_CHANNELS,
    flux2_autoencoder,
    qwen_autoencoder,
    shifted_autoencoder,
)
from tests.families.making import TEXT_LENGTH, TEXT_WIDTH, TinyPipeline, embeddings, masks
from tests.families.text import clip, mistral3, pair, qwen3, qwen25_vl, t5
from tests.families.unets import CLIP_WIDTHS

QWEN_TEMPLATE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
T5_WIDTH = 48  # of SD3: at least as wide as both CLIP encoders together
PACKED = 4 * LATENT_CHANNELS  # channels of 2 x 2 latent pixels
LAYERS = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}


def sd3(encoders: bool, dual_attention_layers: tuple[int, ...] = (), qk_norm: str | None = None) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=8,
        dual_attention_layers=dual_attention_layers,
        qk_norm=qk_norm,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_autoencoder(),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[0], projected=True)),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[1], projected=True), "_2"),
        **pair(encoders, lambda: t5(T5_WIDTH), "_3"),
    )


def sd35(encoders: bool) -> Any:
    """A second, image-only attention in two of three blocks, and queries and keys normalised per head."""
    return sd3(encoders, (0, 1), "rms_norm")


def flux(encoders: bool, guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        **LAYERS,
        in_channels=PACKED,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=CLIP_WIDTHS[0],
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shifted_autoencoder(),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[0])),
        **pair(encoders, t5, "_2"),
        transformer=transformer,
    )


def flux_schnell(encoders: bool) -> Any:
    return flux(encoders, guidance_embeds=False)


def chroma(encoders: bool) -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        **LAYERS,
        in_channels=PACKED,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted_autoencoder(),
        **pair(encoders, t5),
        transformer=transformer,
    )


def _flux2_transformer(guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        **LAYERS,
        in_channels=PACKED,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def flux2(encoders: bool) -> Any:
    """Text embeddings are those of three layers of the encoder, side by side."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        **pair(encoders, lambda: mistral3(SYSTEM_MESSAGE)),
        transformer=_flux2_transformer(True),
    )


def flux2_klein(encoders: bool) -> Any:
    """The base model: not distilled, so two calls a step, no guidance embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        **pair(encoders, lambda: qwen3(with_head=True)),
        transformer=_flux2_transformer(False),
        is_distilled=False,
    )


def qwen_image(encoders: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=PACKED,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=qwen_autoencoder(),
        **pair(encoders, lambda: qwen25_vl(QWEN_TEMPLATE)),
        transformer=transformer,
    )


def _sd3_text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, 2 * TEXT_LENGTH, T5_WIDTH, salt=1),
        "negative_prompt_embeds": embeddings(rows, 2 * TEXT_LENGTH, T5_WIDTH, salt=2),
        "pooled_prompt_embeds": embeddings(rows, sum(CLIP_WIDTHS), salt=3),
        "negative_pooled_prompt_embeds": embeddings(rows, sum(CLIP_WIDTHS), salt=4),
    }


def _flux_text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "pooled_prompt_embeds": embeddings(rows, CLIP_WIDTHS[0], salt=3),
    }


def _chroma_text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "prompt_attention_mask": masks(rows).bool(),
        "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=2),
        "negative_prompt_attention_mask": masks(rows + 1)[1:].bool(),
    }


def _flux2_text(rows: int) -> dict[str, Any]:
    return {"prompt_embeds": embeddings(rows, TEXT_LENGTH, 3 * TEXT_WIDTH, salt=1)}


def _klein_text(rows: int) -> dict[str, Any]:
    return {**_flux2_text(rows), "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, 3 * TEXT_WIDTH, salt=2)}


def _qwen_text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "prompt_embeds_mask": masks(rows),
        "negative_prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=2),
        "negative_prompt_embeds_mask": masks(rows + 1)[1:],
    }


CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH}
GUIDED = {**CALL, "guidance_scale": 3.0}
FLUX2 = {**GUIDED, "max_sequence_length": 48}  # room for the system message and for the templates

JOINT = {
    "sd3": TinyPipeline(
        make=sd3,
        conditioning=_sd3_text,
        call=GUIDED,
        pipeline="StableDiffusion3Pipeline",
        denoisers={"transformer": "SD3Transformer2DModel"},
        guidance="negative first",
        dead=("transformer_blocks.2.attn.add_q_proj",),
    ),
    "sd35": TinyPipeline(
        make=sd35,
        conditioning=_sd3_text,
        call=GUIDED,
        pipeline="StableDiffusion3Pipeline",
        denoisers={"transformer": "SD3Transformer2DModel"},
        guidance="negative first",
        dead=(
            "transformer_blocks.2.attn.add_q_proj",
            "transformer_blocks.2.attn.norm_added_q",
        ),
    ),
    "flux": TinyPipeline(
        make=flux,
        conditioning=_flux_text,
        call=GUIDED,
        pipeline="FluxPipeline",
        denoisers={"transformer": "FluxTransformer2DModel"},
        sample_form="BTC",
        time_form="t/1000 (B,)",
        guidance="embedded",
        unguided={},
        negatives=False,
    ),
    "flux-schnell": TinyPipeline(
        make=flux_schnell,
        conditioning=_flux_text,
        call=CALL,
        pipeline="FluxPipeline",
        denoisers={"transformer": "FluxTransformer2DModel"},
        sample_form="BTC",
        time_form="t/1000 (B,)",
        unguided={},
        negatives=False,
    ),
    "chroma": TinyPipeline(
        make=chroma,
        conditioning=_chroma_text,
        call=GUIDED,
        pipeline="ChromaPipeline",
        denoisers={"transformer": "ChromaTransformer2DModel"},
        sample_form="BTC",
        time_form="t/1000 (B,)",
        guidance="two calls",
        mask="attention_mask",
    ),
    "flux2": TinyPipeline(
        make=flux2,
        conditioning=_flux2_text,
        call=FLUX2,
        pipeline="Flux2Pipeline",
        denoisers={"transformer": "Flux2Transformer2DModel"},
        sample_form="BTC",
        time_form="t/1000 (B,)",
        guidance="embedded",
        unguided={},
        negatives=False,
    ),
    "flux2-klein": TinyPipeline(
        make=flux2_klein,
        conditioning=_klein_text,
        call=FLUX2,
        pipeline="Flux2KleinPipeline",
        denoisers={"transformer": "Flux2Transformer2DModel"},
        sample_form="BTC",
        result_form="BCHW",
        time_form="t/1000 (B,)",
        guidance="two calls",
        negatives=False,
    ),
    "qwen-image": TinyPipeline(
        make=qwen_image,
        conditioning=_qwen_text,
        call={**CALL, "true_cfg_scale": 3.0},
        unguided={"true_cfg_scale": 1.0},
        pipeline="QwenImagePipeline",
        denoisers={"transformer": "QwenImageTransformer2DModel"},
        sample_form="BTC",
        time_form="t/1000 (B,)",
        guidance="two calls",
        mask="encoder_hidden_states_mask",
        dead=(
            "transformer_blocks.2.attn.add_q_proj",
            "transformer_blocks.2.attn.norm_added_q",
            "transformer_blocks.2.attn.to_add_out",
            "transformer_blocks.2.txt_mlp.net.0.proj",
            "transformer_blocks.2.txt_mlp.net.2",
        ),
    ),
}
