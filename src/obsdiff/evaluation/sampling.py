"""Images from a pipeline, one noise seed per image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import in_known_words
from obsdiff.evaluation.intervals import finite_images
from obsdiff.files import check_writable, whole_file
from obsdiff.models.conditioning import asked_for
from obsdiff.models.info import CALL_ARGUMENTS, MOST, call_arguments, info_of
from obsdiff.models.modes import eval_mode
from obsdiff.models.released import lent
from obsdiff.numbers import check_number, check_seed, check_whole
from obsdiff.paths import user_path
from obsdiff.progress import track

FRAMES = 4  # of a video, in its image


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 32,
    call: Mapping[str, Any] | None = None,
    quiet: bool = True,
    allow_nonfinite: bool = False,
) -> Tensor:
    """One image per prompt: float32 (n, channels, height, width) in [0, 1], on the CPU.

    Of a video it shows four frames side by side, from the first to the last. All models are in eval mode meanwhile.

    Args:
        pipe: The pipeline.
        prompts: One per image; numbers or names of classes, or empty ones, for a pipeline that takes these.
        seeds: One per image; an image depends on its own seed only, not on the batch.
        batch_size: Images per pipeline call.
        call: Call arguments over the pipeline's own defaults (steps, guidance, size).
        quiet: No progress bar.
        allow_nonfinite: Return pixels that are NaN instead of refusing them.

    Raises:
        UserError: An argument is out of range, the pipeline refuses it, or an image has pixels that are not finite.
    """
    check_request(prompts, seeds, batch_size, call)
    accepted = inspect.signature(type(pipe).__call__).parameters
    if foreign := sorted(name for name, value in (call or {}).items() if value is not None and name not in accepted):
        raise UserError(f"a call of {type(pipe).__name__} takes no {foreign[0]}; leave it out")
    prompts = in_known_words(prompts, info_of(pipe).alignment)
    asked = asked_for(pipe, prompts)
    arguments = call_arguments(pipe, **(call or {}))
    starts = range(0, len(prompts), batch_size)
    images = []
    with eval_mode(pipe), lent(pipe):
        for start in track(starts, len(starts), "sampling", quiet):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            try:
                told = asked[part].arguments(pipe._execution_device)
                (made, *_) = pipe(**told, generator=generators, output_type="pt", return_dict=False, **arguments)
            except UserError:
                raise
            except ValueError as error:  # how diffusers refuses sizes and lengths
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"{info_of(pipe).source} cannot draw with {arguments}: {reason}") from error
            drawn = as_images(made)
            if not allow_nonfinite:
                check_finite(drawn, prompts[part], seeds[part])
            images.append(drawn)
    return torch.cat(images)


def as_images(made: Any) -> Tensor:
    """What a pipeline made as images, float32 (n, channels, height, width) on the CPU.

    Args:
        made: Images (n, c, h, w) or videos (n, frames, c, h, w); as numpy, which some pipelines give whatever they are
            asked for, with the channels last.
    """
    drawn = torch.as_tensor(made).float().cpu()
    if not isinstance(made, Tensor):
        drawn = drawn.movedim(-1, -3)
    if drawn.dim() == 4:
        return drawn
    shown = torch.linspace(0, drawn.shape[1] - 1, min(FRAMES, drawn.shape[1])).round().long()
    return torch.cat(list(drawn[:, shown].unbind(1)), dim=-1)


def check_request(
    prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 1, call: Mapping[str, Any] | None = None
) -> None:
    """Refuse what no pipeline can draw, before one is loaded.

    Args:
        prompts, seeds, batch_size, call: As for :func:`sample`; None in ``call`` stands for the pipeline's default.

    Raises:
        UserError: A prompt is no text, a seed or number is out of range, or there are not as many seeds as prompts.
    """
    if isinstance(prompts, str):
        raise UserError("prompts is one text; give a list of prompts, such as [prompt]")
    if not len(prompts):
        raise UserError("there is no prompt to draw; give at least one")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is {prompt!r}; each must be a text")
    if len(seeds) != len(prompts):
        raise UserError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt")
    for seed in seeds:
        check_seed("a noise seed", seed)
    for name, value in {"batch_size": batch_size, **(call or {})}.items():
        if value is not None and name == "guidance_scale":
            check_number(name, value, 0.0)
        elif value is not None and name in ("batch_size", *CALL_ARGUMENTS):
            check_whole(name, value, 1, MOST)


def check_finite(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse images (n, c, h, w) with pixels that are NaN or infinite, which a file would show as black.

    Raises:
        UserError: There are some; the first one's prompt and seed are named.
    """
    spoilt = (~finite_images(images)).nonzero().flatten().tolist()
    if spoilt:
        raise UserError(
            f"{len(spoilt)} of {len(images)} images have pixels that are not finite, such as that of prompt "
            f"{prompts[spoilt[0]]!r}, seed {seeds[spoilt[0]]}; try float32 or bfloat16, or see whether the weights of "
            "the pipeline are finite"
        )


def cycle_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` prompts, starting over when they run out."""
    return [prompts[i % len(prompts)] for i in range(count)]


def image_files(output: str | Path, count: int, overwrite: bool) -> list[Path]:
    """Where ``count`` images go: ``output`` itself for one, ``output/00000.png`` and so on for several.

    Raises:
        UserError: There are no prompts, a file is there already, or none can be written there.
    """
    if count == 0:
        raise UserError("no prompt given; pass --prompt TEXT")
    output = user_path(output, "output")
    files = [output] if count == 1 else [output / f"{i:05d}.png" for i in range(count)]
    if count == 1 and output.suffix.lower() != ".png":
        raise UserError(f"{output} must end in .png")
    if folders := [file for file in files if file.is_dir()]:
        raise UserError(f"{folders[0]} is a folder; choose another output")
    check_writable(files[0].parent)
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists; choose another output or pass --overwrite true")
    return files


def save_images(images: Tensor, files: Sequence[Path]) -> None:
    """Write images (n, c, h, w) in [0, 1] as PNG files, each whole or not at all.

    Raises:
        UserError: The place cannot be written; nothing but whole files is left then.
    """
    from torchvision.transforms.functional import to_pil_image

    for image, file in zip(images, files, strict=True):
        with whole_file(file) as temporary:
            to_pil_image(image).save(temporary, format="PNG")
