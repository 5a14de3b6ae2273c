"""What benchmarks run: presets with random weights or a real pipeline, and the bare denoiser calls to compare with."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch

from obsdiff.allocation.stage import calibration_prompts
from obsdiff.bench.presets import Preset, Workload
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.info import PipelineInfo, attach_info, call_arguments
from obsdiff.models.loading import to_device
from obsdiff.models.subject import subject_of
from obsdiff.names import DTYPES
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories


def build(preset: Preset) -> tuple[Any, Conditioning]:
    """A pipeline with a random denoiser and nothing else, and random prompts without padding."""
    import diffusers

    if preset.work.dtype not in DTYPES:
        raise UserError(f"unknown dtype {preset.work.dtype!r}; choose one of {', '.join(DTYPES)}")
    dtype = getattr(torch, preset.work.dtype)
    torch.manual_seed(0)
    with torch.device(_checked(preset.work.device)):
        denoiser = getattr(diffusers, preset.denoiser)(**preset.config).to(dtype).eval()
    kind = getattr(diffusers, preset.pipeline)
    known = {"scheduler": getattr(diffusers, preset.scheduler)(**preset.scheduling)}
    known["unet" if "UNet" in preset.denoiser else "transformer"] = denoiser
    needed = [name for name, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty]
    pipe = kind(**{**dict.fromkeys(needed), **known})
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo(f"random {preset.denoiser}", dict(preset.call)))
    generator = torch.Generator().manual_seed(1)

    def made(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("mask"):
            return torch.ones(preset.work.num_prompts, *shape, dtype=torch.int64)
        return torch.randn(preset.work.num_prompts, *shape, generator=generator).to(dtype)

    embeds = {name: made(name, shape) for name, shape in preset.embeds.items()}
    return to_device(pipe, preset.work.device), Conditioning(embeds)


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
) -> tuple[Any, Conditioning, Workload]:
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
        Workload(
            num_prompts,
            int(call["num_inference_steps"]),
            batch_size,
            float(call.get("guidance_scale") or 1.0),
            device,
            str(denoiser.dtype).removeprefix("torch."),
        ),
    )


def forward_only(pipe: Any, conditioning: Conditioning, work: Workload) -> float:
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
    call = call_arguments(pipe, num_inference_steps=1, guidance_scale=work.guidance_scale)
    try:
        for _ in run_trajectories(subject, conditioning, seeds, work.batch_size, call):
            break
        spent = 0.0
        call["num_inference_steps"] = work.steps
        for _ in run_trajectories(subject, conditioning, seeds, work.batch_size, call):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return spent
