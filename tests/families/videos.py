"""Tiny video pipelines: Wan, LTX, CogVideoX and HunyuanVideo."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tests.families.autoencoders import (
    LATENT_CHANNELS,
    cogvideox_autoencoder,
    hunyuan_autoencoder,
    ltx_autoencoder,
    wan_autoencoder,
)
from tests.families.making import TEXT_LENGTH, TEXT_WIDTH, TinyPipeline, embeddings, masks
from tests.families.text import clip, llama, pair, t5
from tests.families.unets import CLIP_WIDTHS

WAN_I2V_LENGTH = 512  # the I2V denoiser finds the image tokens by counting 512 text tokens from the end
IMAGE_WIDTH = 32


def _wan_transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    sizes: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**sizes, **changes})


def _wan_parts(encoders: bool) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler

    return {
        **pair(encoders, lambda: t5(multilingual=True)),
        "vae": wan_autoencoder(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": _wan_transformer(),
    }


def wan21(encoders: bool) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(encoders))


def wan22(encoders: bool) -> Any:
    """Two denoisers: the first step of two goes to ``transformer``, the second to ``transformer_2``."""
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(encoders), transformer_2=_wan_transformer(), boundary_ratio=0.9)


def wan22_ti2v(encoders: bool) -> Any:
    """A time for each token instead of one for each row."""
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(encoders), expand_timesteps=True)


def wan21_i2v(encoders: bool) -> Any:
    """The latents carry a mask and a coded image; the image's own tokens stand before the text.

    The image encoder is always there: the pipeline refuses ``image_embeds`` beside ``image``, and needs ``image``.
    """
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts = _wan_parts(encoders)
    parts["transformer"] = _wan_transformer(
        in_channels=2 * LATENT_CHANNELS + 2, image_dim=IMAGE_WIDTH, added_kv_proj_dim=48
    )
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=2 * IMAGE_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return WanImageToVideoPipeline(**parts, image_encoder=image_encoder, image_processor=image_processor)


def ltx(encoders: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=TEXT_WIDTH,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=ltx_autoencoder(),
        **pair(encoders, t5),
        transformer=transformer,
    )


def cogvideox_2b(encoders: bool, rotary: bool = False) -> Any:
    """Sine and cosine positions added once, as the 2b model."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=rotary,
    )
    return CogVideoXPipeline(
        **pair(encoders, t5),
        vae=cogvideox_autoencoder(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


def cogvideox_5b(encoders: bool) -> Any:
    """Rotary positions in every block, as the 5b model."""
    return cogvideox_2b(encoders, rotary=True)


def hunyuan_video(encoders: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        patch_size=2,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=CLIP_WIDTHS[0],
        rope_axes_dim=(2, 2, 4),
    )
    return HunyuanVideoPipeline(
        **pair(encoders, lambda: llama(DEFAULT_PROMPT_TEMPLATE["template"])),
        transformer=transformer,
        vae=hunyuan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **pair(encoders, lambda: clip(CLIP_WIDTHS[0], length=77), "_2"),
    )


def _text(rows: int, length: int = TEXT_LENGTH) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, length, TEXT_WIDTH, salt=1),
        "negative_prompt_embeds": embeddings(rows, length, TEXT_WIDTH, salt=2),
    }


def _masked_text(rows: int) -> dict[str, Any]:
    return {
        **_text(rows),
        "prompt_attention_mask": masks(rows),
        "negative_prompt_attention_mask": masks(rows + 1)[1:],
    }


def _text_and_image(rows: int) -> dict[str, Any]:
    from torchvision.transforms.functional import to_pil_image

    return {
        **_text(rows, WAN_I2V_LENGTH),
        "image": to_pil_image(embeddings(1, 3, 16, 16, salt=5)[0].sigmoid()),
    }


def _hunyuan_text(rows: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(rows, TEXT_LENGTH, TEXT_WIDTH, salt=1),
        "pooled_prompt_embeds": embeddings(rows, CLIP_WIDTHS[0], salt=3),
        "prompt_attention_mask": masks(rows),
    }


def _call(size: int, frames: int) -> dict[str, Any]:
    return {
        "height": size,
        "width": size,
        "num_frames": frames,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": TEXT_LENGTH,
    }


def _wan(make: Any, **changes: Any) -> TinyPipeline:
    fields: dict[str, Any] = {
        "conditioning": _text,
        "call": _call(16, 5),
        "pipeline": "WanPipeline",
        "denoisers": {"transformer": "WanTransformer3DModel"},
        "result": "frames",
        "sample_form": "BCFHW",
        "guidance": "two calls",
    }
    return TinyPipeline(make=make, **{**fields, **changes})


def _cogvideox(make: Any) -> TinyPipeline:
    return TinyPipeline(
        make=make,
        conditioning=_text,
        call=_call(32, 9),
        pipeline="CogVideoXPipeline",
        denoisers={"transformer": "CogVideoXTransformer3DModel"},
        result="frames",
        sample_form="BFCHW",
        guidance="negative first",
    )


VIDEOS = {
    "wan21": _wan(wan21),
    "wan21-i2v": _wan(
        wan21_i2v,
        conditioning=_text_and_image,
        call={**_call(16, 5), "max_sequence_length": WAN_I2V_LENGTH},
        pipeline="WanImageToVideoPipeline",
        shared=("image",),
        prompts=find_spec("ftfy") is not None,  # without it the class fails with a NameError, unlike WanPipeline
        notes="One image serves all rows of a call. Of the denoiser's latents the first channels alone are noisy.",
    ),
    "wan22": _wan(wan22, denoisers={"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"}),
    "wan22-ti2v": _wan(wan22_ti2v, time_form="t (B, T)"),
    "ltx": TinyPipeline(
        make=ltx,
        conditioning=_masked_text,
        call=_call(32, 5),
        pipeline="LTXPipeline",
        denoisers={"transformer": "LTXVideoTransformer3DModel"},
        result="frames",
        sample_form="BTC",
        guidance="negative first",
        mask="encoder_attention_mask",
    ),
    "cogvideox-2b": _cogvideox(cogvideox_2b),
    "cogvideox-5b": _cogvideox(cogvideox_5b),
    "hunyuan-video": TinyPipeline(
        make=hunyuan_video,
        conditioning=_hunyuan_text,
        call=_call(32, 5),
        pipeline="HunyuanVideoPipeline",
        denoisers={"transformer": "HunyuanVideoTransformer3DModel"},
        result="frames",
        sample_form="BCFHW",
        guidance="embedded",
        unguided={},
        negatives=False,
        mask="encoder_attention_mask",
    ),
}
