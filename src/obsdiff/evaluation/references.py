"""What a recovery is judged by: the same prompts and seeds drawn by the dense and the pruned pipeline, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obsdiff.evaluation.evaluate import Images
from obsdiff.evaluation.sampling import check_finite, sample
from obsdiff.files import whole_file
from obsdiff.models.info import call_arguments
from obsdiff.ranks import from_all, rank, wait_for_all, world_size

UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0}


@dataclass(frozen=True)
class References:
    """The evaluation's fixed part.

    Attributes:
        prompts, seeds: One per image.
        dense, pruned: The images of the dense and of the freshly pruned pipeline.
        alignment: The name of what reads the images, or None.
    """

    prompts: list[str]
    seeds: list[int]
    dense: Images
    pruned: Images
    alignment: str | None


def sample_shared(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    quiet: bool = True,
    allow_nonfinite: bool = False,
    **call: Any,
) -> Tensor:
    """All images on every process, each process drawing its share; an image depends on its own seed only.

    Every process draws equally many (the last image again where they do not divide), since a sharded denoiser runs on
    all processes at once.

    Raises:
        UserError: As :func:`sample`; of pixels that are not finite every process hears, unless they are allowed.
    """
    count = -(-len(prompts) // world_size())
    chosen = [min(rank() * count + i, len(prompts) - 1) for i in range(count)]
    own_prompts, own_seeds = [prompts[i] for i in chosen], [seeds[i] for i in chosen]
    mine = sample(pipe, own_prompts, own_seeds, batch_size=batch_size, call=call, quiet=quiet, allow_nonfinite=True)
    images = torch.cat(from_all(mine))[: len(prompts)]
    if not allow_nonfinite:
        check_finite(images, prompts, seeds)
    return images


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    alignment: str | None,
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> Images:
    """The images of one pipeline, without guidance too where it has any and they can be measured."""
    quiet = quiet or rank() > 0
    guided = sample_shared(pipe, prompts, seeds, batch_size, quiet, allow_nonfinite)
    if not alignment or not UNGUIDED.keys() <= call_arguments(pipe).keys():
        return Images(guided, guided[:0])
    return Images(guided, sample_shared(pipe, prompts, seeds, batch_size, quiet, allow_nonfinite, **UNGUIDED))


def references(
    file: Path,
    key: dict[str, Any],
    prompts: list[str],
    seeds: list[int],
    batch_size: int,
    alignment: str | None,
    dense: Callable[[], Any],
    pruned: Any,
) -> References:
    """The references kept in ``file``, drawn now if they are not there or were drawn for something else.

    Args:
        file: A safetensors file.
        key: What they depend on besides prompts and seeds.
        prompts, seeds: One per image.
        batch_size: Images per pipeline call.
        alignment: The name of what reads the images, or None.
        dense: Loads the dense pipeline.
        pruned: The freshly pruned pipeline.
    """
    digest = hashlib.sha256(json.dumps([key, prompts, seeds], sort_keys=True, default=str).encode()).hexdigest()
    found = _read(file, digest)
    if found is None:
        images = {"dense": draw(dense(), prompts, seeds, batch_size, alignment)}
        images["pruned"] = draw(pruned, prompts, seeds, batch_size, alignment, allow_nonfinite=True)
        found = {f"{name}.{kind}": t for name, pair in images.items() for kind, t in vars(pair).items()}
        if rank() == 0:
            with whole_file(file) as temporary:
                save_file({name: t.contiguous() for name, t in found.items()}, temporary, {"key": digest})
        wait_for_all()
    dense_images, pruned_images = (Images(found[f"{n}.guided"], found[f"{n}.unguided"]) for n in ("dense", "pruned"))
    return References(prompts, seeds, dense_images, pruned_images, alignment)


def _read(file: Path, digest: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, framework="pt") as content:
            if content.metadata().get("key") != digest:
                return None
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError):
        return None
