"""What benchmarks run: presets with random weights or a real pipeline, and the bare denoiser calls to compare with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from obsdiff.allocation.stage import calibration_prompts
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.info import PipelineInfo, attach_info, call_arguments
from obsdiff.models.loading import to_device
from obsdiff.models.subject import subject_of
from obsdiff.names import DTYPES
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories


@dataclass(frozen=True)
class Preset:
    """A calibration workload.

    Attributes:
        transformer: Config of the SD3 transformer.
        text_length: Prompt tokens.
        num_prompts, steps, batch_size, guidance_scale: The calibration.
        device, dtype: Where and in what the model runs.
    """

    transformer: Mapping[str, Any]
    text_length: int
    num_prompts: int
    steps: int
    batch_size: int
    guidance_scale: float
    device: str
    dtype: str
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"shift": 3.0})


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

PRESETS: dict[str, Preset] = {
    # ratio 6.3, peak 1.48 GB, total 96.1 s with the published code, 4 packages, 2 CPU cores
    "sd3-tiny-cpu": Preset(
        {
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
        },
        text_length=77,
        num_prompts=8,
        steps=8,
        batch_size=4,
        guidance_scale=4.0,
        device="cpu",
        dtype="float32",
    ),
    "sd3-medium": Preset(_MEDIUM, 333, 100, 25, 4, 7.0, "cuda", "float16"),
    "sd35-large": Preset(_LARGE, 333, 100, 25, 4, 7.0, "cuda", "bfloat16"),
}


def find_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UserError: There is none.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build(preset: Preset) -> tuple[Any, Conditioning]:
    """A pipeline with a random transformer and nothing else, and random prompts without padding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    if preset.dtype not in DTYPES:
        raise UserError(f"unknown dtype {preset.dtype!r}; choose one of {', '.join(DTYPES)}")
    torch.manual_seed(0)
    with torch.device(_checked(preset.device)):
        transformer = SD3Transformer2DModel(**preset.transformer).to(getattr(torch, preset.dtype)).eval()
    parts = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**preset.scheduler),
        **dict.fromkeys(parts),
    )
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo("random SD3 transformer"))
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(preset.num_prompts, *shape, generator=generator).to(getattr(torch, preset.dtype))

    width, pooled = preset.transformer["joint_attention_dim"], preset.transformer["pooled_projection_dim"]
    return to_device(pipe, preset.device), Conditioning(
        {
            "prompt_embeds": random(preset.text_length, width),
            "negative_prompt_embeds": random(preset.text_length, width),
            "pooled_prompt_embeds": random(pooled),
            "negative_pooled_prompt_embeds": random(pooled),
        }
    )


def _checked(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there; pass --device cpu or choose the preset sd3-tiny-cpu")
    return torch.device(device)


def workload_of(
    pipeline: str,
    num_prompts: int = 100,
    steps: int | None = None,
    batch_size: int = 4,
    device: str = "cpu",
    dtype: str | None = None,
) -> tuple[Any, Conditioning, Preset]:
    """A real pipeline with its own prompts, in place of a preset: the pipeline, encoded prompts, and what is run.

    Raises:
        UserError: It cannot be loaded, or has no prompts of its own.
    """
    pipe = load_pipeline(pipeline, dtype=dtype, device=device)
    call = call_arguments(pipe, num_inference_steps=steps)
    prompts = calibration_prompts(pipe, PruningOptions(calibration=CalibrationOptions(num_prompts=num_prompts)))
    denoiser: Any = subject_of(pipe).denoiser
    return (
        pipe,
        encode_prompts(pipe, prompts, call),
        Preset(
            dict(denoiser.config),
            int(call.get("max_sequence_length") or 0),
            num_prompts,
            int(call["num_inference_steps"]),
            batch_size,
            float(call.get("guidance_scale") or 1.0),
            device,
            str(denoiser.dtype).removeprefix("torch."),
        ),
    )


def forward_only(pipe: Any, conditioning: Conditioning, preset: Preset) -> float:
    """Seconds in the denoiser over one pass of all prompts, nothing measured; one call beforehand warms up."""
    subject = subject_of(pipe, conditioning)
    spent, entered = 0.0, 0.0

    def now() -> float:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)
        return time.perf_counter()

    def enter(*_: object) -> None:
        nonlocal entered
        entered = now()

    def leave(*_: object) -> None:
        nonlocal spent
        spent += now() - entered

    handles = [subject.denoiser.register_forward_pre_hook(enter), subject.denoiser.register_forward_hook(leave)]
    seeds = noise_seeds(0, len(conditioning))
    call = call_arguments(pipe, num_inference_steps=1, guidance_scale=preset.guidance_scale)
    try:
        for _ in run_trajectories(subject, conditioning, seeds, preset.batch_size, call):
            break
        spent = 0.0
        call["num_inference_steps"] = preset.steps
        for _ in run_trajectories(subject, conditioning, seeds, preset.batch_size, call):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return spent
