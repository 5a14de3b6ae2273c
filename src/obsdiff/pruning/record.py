"""Recording the dense pipeline's own sampling trajectories: inputs to distil on without any images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from obsdiff.errors import MALFORMED, UserError
from obsdiff.files import read_json, whole_folder, write_json
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.families import find_family
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.wiring import denoiser_of
from obsdiff.progress import track
from obsdiff.pruning.statistics import model_hash
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories

INDEX, TENSORS = "trajectories.json", "trajectories.safetensors"


@dataclass(frozen=True)
class Trajectories:
    """What was recorded.

    Attributes:
        latents: What the denoiser saw, (prompts, calls, ...).
        times: The time it was told at each call, (calls,).
        embeds: Embeds of every prompt by pipeline name, negative ones included, (prompts, ...).
        request: What they were recorded for.
        model: Hash of the denoiser.
        time_s: Seconds it took.
    """

    latents: Tensor
    times: Tensor
    embeds: dict[str, Tensor]
    request: dict[str, Any]
    model: str
    time_s: float


def recording_request(
    source: str, prompts: Sequence[str], steps: int | None, guidance_scale: float | None, seed: int
) -> dict[str, Any]:
    """What a recording depends on besides the weights, JSON-able."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return {
        "pipeline": source,
        "prompts": digest,
        "num_prompts": len(prompts),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }


@torch.no_grad()
def record_trajectories(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 4,
    quiet: bool = True,
) -> None:
    """Denoise every prompt with the pipeline's own sampler and keep what its denoiser was given at each call.

    Args:
        pipe: The dense pipeline.
        prompts: The prompts.
        folder: Receives ``trajectories.json`` and ``trajectories.safetensors``, whole or not at all.
        steps, guidance_scale: None takes the pipeline's own default.
        seed: Noise seed; each prompt draws from a seed of its own.
        batch_size: Prompts per pipeline call; changes speed and memory only.
        quiet: No progress bar.
    """
    started = time.perf_counter()
    call = call_arguments(pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    denoiser = denoiser_of(pipe)
    family = find_family(denoiser)
    conditioning = encode_prompts(pipe, prompts, call)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: object, __: object, given: Mapping[str, Tensor]) -> None:
        seen.append((given[family.sample].cpu(), given[family.time].reshape(-1)[:1].float().cpu()))

    latents: list[Tensor] = []
    times = torch.empty(0)
    handle = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    try:
        seeds = noise_seeds(seed, len(prompts))
        batches = run_trajectories(pipe, conditioning, seeds, batch_size, call, lambda _: seen.clear())
        for part, _ in track(batches, -(-len(prompts) // batch_size), "recording trajectories", quiet):
            count = part.stop - part.start  # with guidance the prompts' own half comes last
            latents.append(torch.stack([sample[-count:] for sample, _ in seen], dim=1))
            times = torch.cat([at for _, at in seen])
    finally:
        handle.remove()
    tensors = {"latents": torch.cat(latents), "times": times}
    tensors |= {f"embeds.{name}": tensor for name, tensor in conditioning.embeds.items()}
    with whole_folder(folder, replace=True) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        request = recording_request(info_of(pipe).source, prompts, steps, guidance_scale, seed)
        spent = time.perf_counter() - started
        write_json(temporary / INDEX, {"request": request, "model": model_hash(denoiser), "time_s": spent})


def open_trajectories(folder: Path) -> Trajectories:
    """Read a recording.

    Raises:
        UserError: There is none, or it is damaged.
    """
    index = read_json(folder / INDEX, "a recording of trajectories")
    try:
        tensors = load_file(folder / TENSORS)
        embeds = {name.removeprefix("embeds."): t for name, t in tensors.items() if name.startswith("embeds.")}
        return Trajectories(
            tensors["latents"],
            tensors["times"],
            embeds,
            dict(index["request"]),
            str(index["model"]),
            float(index["time_s"]),
        )
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise UserError(f"{folder} is damaged; delete it and record again") from error
