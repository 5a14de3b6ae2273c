"""Whether data fit a model, before anything is pruned: both numbers are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.calling import conditions_of
from obsdiff.models.conditioning import encode_prompts, told_nothing
from obsdiff.models.content import DECODING, component_hash, component_hashes
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.latents import encode_images, patch_of, vae_factor
from obsdiff.models.rows import NEGATIVE, flattened
from obsdiff.models.schedules import noising_of_pipeline
from obsdiff.models.subject import Subject
from obsdiff.pruning.record import Trajectories


def recording_of(trainer: Any) -> Trajectories | None:
    """The trajectories that the trainer's data module draws from, if it does."""
    return getattr(trainer.datamodule, "trajectories", None)


def check_data(dense: Subject, data: Any) -> None:
    """Refuse data that the model cannot be trained on, as far as the data module says what it holds; what it does not
    say is checked when the first batch comes.

    Args:
        dense: The dense pipeline.
        data: The data module, set up, or None.

    Raises:
        UserError: Naming both numbers.
    """
    what = getattr(data, "source", None) or type(data).__name__
    if (recording := getattr(data, "trajectories", None)) is not None:
        check_trajectories(dense, recording, f"the recording in {getattr(data, 'folder', what)}")
    if (shape := getattr(data, "image_shape", None)) is not None:
        check_images(dense, shape, str(what))
        height, width = (int(side) for side in shape[-2:])
        pipe, factor = dense.pipe, vae_factor(dense.pipe)
        noising_of_pipeline(pipe, (height // factor, width // factor))
        blank = torch.zeros(1, *shape, device=next(dense.denoiser.parameters()).device)
        latents = encode_images(pipe, blank, torch.Generator()).shape[1:]
        conditioning = encode_prompts(pipe, [dense.family.example], call_arguments(pipe))
        check_encoded(dense, latents, conditions_of(pipe, conditioning, (height, width))[2])


def guidance_of(subject: Subject) -> float:
    """The scale g of a pipeline's guidance ``n + g (p − n)`` by a negative prompt; 1 without."""
    call = call_arguments(subject.pipe)
    scale = float(call.get("true_cfg_scale") or call.get("guidance_scale") or 1.0)
    return scale + subject.family.guidance_offset


def check_guided(dense: Subject, recording: Trajectories | None) -> None:
    """Refuse to distil guided outputs of a pipeline that has none.

    Args:
        dense: The pipeline.
        recording: What is trained on, if that was recorded.

    Raises:
        UserError: It is not guided, or not by a negative prompt.
    """
    pipe = dense.pipe
    known: Mapping[str, Tensor] = {}
    if recording is not None:
        known = recording.embeds
    elif not told_nothing(pipe):
        known = conditions_of(pipe, encode_prompts(pipe, ["0"], call_arguments(pipe)))[0]
    if guidance_of(dense) <= 1 or not any(name.startswith(NEGATIVE) for name in known):
        raise UserError(
            f"objective distill_guided needs a pipeline that is guided by a negative prompt, and "
            f"{info_of(pipe).source} is not; use distill_output"
        )


def check_images(subject: Subject, shape: Sequence[int], what: str) -> None:
    """Refuse images (channels, height, width) that the autoencoder or the denoiser cannot take.

    Raises:
        UserError: Naming both numbers.
    """
    channels, height, width = (int(size) for size in shape)
    pipe, denoiser = subject.pipe, config_of(subject)
    if getattr(pipe, "vae", None) is None:
        check_latents(subject, (channels, height, width), what)
        return
    config = pipe.vae.config
    own = config.get("in_channels") or config.get("input_channels") or 3
    if channels != own:
        raise UserError(
            f"{what} has images of {channels} channels, the autoencoder of {source_of(subject)} takes {own}"
        )
    factor, patch = vae_factor(pipe), patch_of(pipe)
    for side in (height, width):
        if side % (factor * patch):
            raise UserError(
                f"{what} has images of {height} x {width} pixels, but {source_of(subject)} takes multiples of "
                f"{factor * patch} ({factor} per latent, {patch} latents per patch)"
            )
    check_latents(subject, (int(denoiser.in_channels), height // factor, width // factor), what)


def check_encoded(subject: Subject, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse latents of images that are not laid out as the pipeline's own.

    Raises:
        UserError: Naming both shapes.
    """
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"images become latents of {' x '.join(map(str, found))}, but {source_of(subject)} works on "
            f"{' x '.join(map(str, wanted))} at their size; distil on recorded trajectories instead"
        )


def check_latents(subject: Subject, shape: Sequence[int], what: str) -> None:
    """Refuse latents (channels, height, width) that the denoiser cannot take.

    Raises:
        UserError: Naming both numbers.
    """
    config, source, (channels, *sides) = config_of(subject), source_of(subject), (int(size) for size in shape)
    if len(sides) != 2:  # packed latents, or a video's
        _check_rank(subject, shape, what)
        return
    if channels != config.in_channels:
        raise UserError(
            f"{what} has latents of {channels} channels, the denoiser of {source} takes {config.in_channels}"
        )
    patch, table = patch_of(subject.pipe), config.get("pos_embed_max_size")
    for side in sides:
        if side % patch:
            raise UserError(f"{what} has latents of {' x '.join(map(str, sides))}, {source} takes multiples of {patch}")
        if table is not None and side // patch > table:
            raise UserError(
                f"{what} has latents of {' x '.join(map(str, sides))}, {side // patch} patches a side; the position "
                f"table of {source} ends at {table}"
            )


def check_embeds(subject: Subject, embeds: Mapping[str, Any], what: str) -> None:
    """Refuse embeds whose width is not what the denoiser takes.

    Raises:
        UserError: Naming both numbers.
    """
    call = next(iter(subject.call.values()))
    for path, value in flattened(call).items():
        given = embeds.get(name := ".".join(path))
        example = value[0] if isinstance(value, list) and value else value
        if not isinstance(example, Tensor) or example.dim() < 2 or given is None:
            continue
        if given.shape[-1] != example.shape[-1]:
            raise UserError(
                f"{what} has {name} of width {given.shape[-1]}, "
                f"the denoiser of {source_of(subject)} takes {example.shape[-1]}"
            )


def _check_rank(subject: Subject, shape: Sequence[int], what: str) -> None:
    """Packed and video latents: as many dimensions as the denoiser's call has, and as many channels."""
    sample = next(iter(subject.call.values()))[subject.family.sample][0]
    packed = sample.dim() == 2
    there, found = (s[-1] if packed else s[0] for s in (sample.shape, shape))
    if sample.dim() != len(shape) or there != found:
        raise UserError(
            f"{what} has latents of {' x '.join(map(str, shape))}, the denoiser of {source_of(subject)} takes "
            f"{' x '.join(map(str, sample.shape))} at its smallest"
        )


def check_trajectories(subject: Subject, found: Trajectories, what: str) -> None:
    """Refuse trajectories that another pipeline drew.

    Args:
        subject: The dense pipeline.
        found: The recording.
        what: What it is called in errors.

    Raises:
        UserError: Saying what differs.
    """
    check_latents(subject, found.latents.shape[2:], what)
    check_embeds(subject, found.embeds, what)
    then, now = found.content, component_hashes(subject.pipe, DECODING)
    if different := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
        raise UserError(
            f"{what} was recorded from another pipeline: its {', '.join(different)} is not what {source_of(subject)} "
            "has now; delete it or name another folder"
        )


def has_answers(dense: Subject, recording: Trajectories | None) -> bool:
    """Whether a recording holds what a dense denoiser would answer to all that is asked in training.

    Args:
        dense: The pipeline, as it would answer: in another dtype than it was recorded in, it is another one.
        recording: The trajectories; None: there are none.
    """
    if recording is None:
        return False
    if recording.negative_answers is None and any(name.startswith(NEGATIVE) for name in recording.embeds):
        return False  # the pipeline did without guidance in some of its steps
    return all(recording.content.get(name) == component_hash(model) for name, model in dense.components.items())


def config_of(subject: Subject) -> Any:
    """The config of the denoiser, of two the first's."""
    return next(iter(subject.components.values())).config


def source_of(subject: Subject) -> str:
    """What the pipeline is called."""
    return info_of(subject.pipe).source
