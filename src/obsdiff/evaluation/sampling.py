"""Images from a pipeline, one noise seed per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.info import call_arguments
from obsdiff.progress import track


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 32,
    call: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Tensor:
    """One image per prompt: float32 (n, channels, height, width) in [0, 1], on the CPU.

    Args:
        pipe: The pipeline.
        prompts: One per image.
        seeds: One per image; an image depends on its own seed only, not on the batch.
        batch_size: Images per pipeline call.
        call: Call arguments over the pipeline's own defaults (steps, guidance, size).
        quiet: No progress bar.
    """
    arguments = call_arguments(pipe, **(call or {}))
    starts = range(0, len(prompts), batch_size)
    images = []
    for start in track(starts, len(starts), "sampling", quiet):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        result = pipe(prompt=list(prompts[part]), generator=generators, output_type="pt", **arguments)
        images.append(result.images.float().cpu())
    return torch.cat(images)


def cycle_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` prompts, starting over when they run out."""
    return [prompts[i % len(prompts)] for i in range(count)]


def image_files(output: str | Path, count: int, overwrite: bool) -> list[Path]:
    """Where ``count`` images go: ``output`` itself for one, ``output/00000.png`` and so on for several.

    Raises:
        UserError: There are no prompts, or a file is there already.
    """
    if count == 0:
        raise UserError("no prompt given; pass --prompt TEXT")
    output = Path(output)
    files = [output] if count == 1 else [output / f"{i:05d}.png" for i in range(count)]
    if count == 1 and output.suffix.lower() != ".png":
        raise UserError(f"{output} must end in .png")
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists; choose another output or pass --overwrite true")
    return files


def save_images(images: Tensor, files: Sequence[Path]) -> None:
    """Write images (n, c, h, w) in [0, 1] as PNG files, each under a temporary name first.

    Raises:
        UserError: The place cannot be written.
    """
    from torchvision.transforms.functional import to_pil_image

    try:
        for image, file in zip(images, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.tmp")
            to_pil_image(image).save(temporary, format="PNG")
            temporary.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {files[0]}: {error.strerror or error}") from error
