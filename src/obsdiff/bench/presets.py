"""Workloads in the true shapes of public models, with random weights; ``PRESETS`` is the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from obsdiff.errors import UserError


@dataclass(frozen=True)
class Workload:
    """A calibration.

    Attributes:
        num_prompts, steps, batch_size, guidance_scale: As its options.
        device, dtype: Where and in what the model runs.
        precision: Of the products that make Hessians; None: float32.
    """

    num_prompts: int
    steps: int
    batch_size: int
    guidance_scale: float | None
    device: str = "cuda"
    dtype: str = "bfloat16"
    precision: str | None = None


@dataclass(frozen=True)
class Preset:
    """A model and what it is calibrated with.

    Attributes:
        pipeline, denoiser, scheduler: Names of diffusers classes.
        config: Of the denoiser, where it is not the class's default.
        blocks: Entries of the config that count blocks.
        embeds: What a prompt is encoded to: shape by argument of the pipeline; of masks, all ones.
        work: The calibration.
        call: Other arguments of the pipeline, such as sizes.
        scheduling: Config of the scheduler.
    """

    pipeline: str
    denoiser: str
    scheduler: str
    config: Mapping[str, Any]
    blocks: tuple[str, ...]
    embeds: Mapping[str, tuple[int, ...]]
    work: Workload
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduling: Mapping[str, Any] = field(default_factory=dict)


def shortened(preset: Preset, stages: int) -> dict[str, Any]:
    """The config with at most so many blocks in each of its lists, each of its true shape.

    Raises:
        UserError: Blocks of this model are not just counted.
    """
    if not preset.blocks:
        raise UserError(f"a {preset.denoiser} is no list of equal blocks, so --stages cannot shorten it; leave it out")
    return {**preset.config, **{name: min(stages, preset.config[name]) for name in preset.blocks}}


def _sd3(length: int, width: int, pooled: int) -> dict[str, tuple[int, ...]]:
    return {
        "prompt_embeds": (length, width),
        "negative_prompt_embeds": (length, width),
        "pooled_prompt_embeds": (pooled,),
        "negative_pooled_prompt_embeds": (pooled,),
    }


_SD3 = ("StableDiffusion3Pipeline", "SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler")
_SHIFTED: Any = {"scheduling": {"shift": 3.0}}
_TINY = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 256,
    "caption_projection_dim": 512,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 16,
}
_MEDIUM = {
    "sample_size": 64,  # 512 x 512 pixels, as the paper calibrates
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_LARGE = {
    **_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SQUARE = {"height": 1024, "width": 1024}

_BLOCKS = ("num_layers",)

PRESETS: dict[str, Preset] = {
    # ratio 6.3, peak 1.48 GB, total 96.1 s with the published code, 4 packages, 2 CPU cores
    "sd3-tiny-cpu": Preset(
        *_SD3, _TINY, _BLOCKS, _sd3(77, 256, 256), Workload(8, 8, 4, 4.0, "cpu", "float32"), **_SHIFTED
    ),
    "sd3-medium": Preset(
        *_SD3, _MEDIUM, _BLOCKS, _sd3(333, 4096, 2048), Workload(100, 25, 4, 7.0, dtype="float16"), **_SHIFTED
    ),
    "sd35-large": Preset(*_SD3, _LARGE, _BLOCKS, _sd3(333, 4096, 2048), Workload(100, 25, 4, 7.0), **_SHIFTED),
    "sdxl": Preset(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        "EulerDiscreteScheduler",
        _SDXL,
        (),
        _sd3(77, 2048, 1280),
        Workload(100, 25, 4, 5.0, dtype="float16"),
        _SQUARE,
        {"beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "flux": Preset(
        "FluxPipeline",
        "FluxTransformer2DModel",
        "FlowMatchEulerDiscreteScheduler",
        {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38},
        ("num_layers", "num_single_layers"),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        Workload(100, 25, 2, 3.5),
        _SQUARE,
        {"shift": 3.0, "use_dynamic_shifting": True},
    ),
    "qwen-image": Preset(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        "FlowMatchEulerDiscreteScheduler",
        {"num_layers": 60},
        _BLOCKS,
        {
            "prompt_embeds": (128, 3584),
            "prompt_embeds_mask": (128,),
            "negative_prompt_embeds": (128, 3584),
            "negative_prompt_embeds_mask": (128,),
        },
        Workload(100, 25, 2, None),
        {**_SQUARE, "true_cfg_scale": 4.0},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    ),
    "wan-14b": Preset(
        "WanPipeline",
        "WanTransformer3DModel",
        "FlowMatchEulerDiscreteScheduler",
        {"num_layers": 40},
        _BLOCKS,
        {"prompt_embeds": (512, 4096), "negative_prompt_embeds": (512, 4096)},
        Workload(40, 25, 1, 5.0),
        {"height": 480, "width": 832, "num_frames": 33},
        {"shift": 3.0},
    ),
}


def find_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UserError: There is none.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
