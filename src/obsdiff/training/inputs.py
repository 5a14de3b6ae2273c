"""From a batch of any data module to what a denoiser is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from obsdiff.diffusion.noising import Noising
from obsdiff.errors import UserError
from obsdiff.models.calling import WHICH, PromptEncoder, both_prompts, drop_prompts
from obsdiff.models.calls import moved
from obsdiff.models.conditioning import told_nothing
from obsdiff.models.latents import encode_images, vae_factor
from obsdiff.models.rows import NEGATIVE
from obsdiff.models.schedules import noising_of_pipeline
from obsdiff.models.subject import Subject
from obsdiff.models.told import Told
from obsdiff.training.fits import check_embeds, check_encoded, check_images, check_latents, guidance_of

ANSWER = "answer"


@dataclass
class Inputs:
    """Makes batches into latents, times, embeds and targets.

    Attributes:
        subject: Whose autoencoder and noise they are for.
        encode: Prompts to what the denoiser is told (:class:`obsdiff.models.calling.PromptEncoder`).
        common: What it is told in all rows of recorded trajectories.
        prompt_dropout: Share of prompts replaced by the negative one.
        guided: Ask about every sample with both prompts instead.
        recorded: Take the dense denoiser's answers from the batch.
    """

    subject: Subject
    encode: PromptEncoder
    prompt_dropout: float
    guided: bool = False
    common: Mapping[str, Any] = field(default_factory=dict)
    recorded: bool = False
    _noising: dict[tuple[int, int], Noising] = field(default_factory=dict)
    _fit: set[tuple[int, ...]] = field(default_factory=set)

    def noising(self, size: tuple[int, int]) -> Noising:
        """The noise process for images of this height and width in latents."""
        if size not in self._noising:
            self._noising[size] = noising_of_pipeline(self.subject.pipe, size)
        return self._noising[size]

    def __call__(
        self, batch: Mapping[str, Any], generator: torch.Generator, device: torch.device
    ) -> tuple[Told, Tensor | None]:
        """What the denoiser is given, and what it should answer if the batch holds images.

        Raises:
            UserError: The batch holds neither images nor trajectories, or none that fit the model.
        """
        if "latents" in batch:
            latents, times, embeds, target = batch["latents"], batch["time"], batch["embeds"], None
            common = self.common
            self._check(latents, lambda shape: check_latents(self.subject, shape, "a training batch"))
            check_embeds(self.subject, embeds, "a training batch")
        elif "image" in batch:
            self._check(batch["image"], lambda shape: check_images(self.subject, shape, "a training batch"))
            images = batch["image"].to(device)
            height, width = (int(side) for side in images.shape[-2:])
            encoded = self.encode(self._told(batch), (height, width))
            clean = encode_images(self.subject.pipe, images, generator)
            check_encoded(self.subject, clean.shape[1:], self.encode.latents)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            factor = vae_factor(self.subject.pipe)
            noising = self.noising((height // factor, width // factor))
            times = noising.draw(len(clean), generator).to(clean.device)
            latents, target = noising.add_noise(clean, noise, times), noising.target(clean, noise, times)
            family = self.subject.family
            if len(self.subject.components) > 1:  # the first is asked about the noisier latents
                boundary = 1000 * float(self.subject.pipe.config.boundary_ratio)
                encoded[WHICH] = (times < boundary).long()
            times, target = family.time_offset + family.time_scale * times, family.sign * target
            embeds = {name: tensor.to(device) for name, tensor in encoded.items()}
            common = self.encode.common
        else:
            raise UserError(
                f"a training batch needs image and prompt, or latents, time, embeds; it has {sorted(batch)}"
            )
        dropped = torch.rand(len(latents), generator=generator) < self.prompt_dropout
        answers = _answers(batch) if self.recorded else None
        shared = moved(dict(common), device, torch.float32, torch.float32)
        if self.guided:
            if target is not None:
                target = target.repeat(2, *[1] * (target.dim() - 1))
            latents, times = latents.repeat(2, *[1] * (latents.dim() - 1)), times.repeat(2)
            aim = None if answers is None else both_prompts(answers)[ANSWER]
            return Told(latents, times, both_prompts(embeds), shared, guidance_of(self.subject), aim), target
        aim = None if answers is None else drop_prompts(answers, dropped)[ANSWER]
        return Told(latents, times, drop_prompts(embeds, dropped), shared, aim=aim), target

    def _told(self, batch: Mapping[str, Any]) -> list[str]:
        """Prompts of images; empty for a pipeline that draws without, whatever its images are called."""
        if told_nothing(self.subject.pipe):
            return [""] * len(batch["image"])
        if "prompt" not in batch:
            raise UserError(f"a training batch needs image and prompt; it has {sorted(batch)}")
        return list(batch["prompt"])

    def _check(self, tensor: Tensor, check: Callable[[tuple[int, ...]], None]) -> None:
        """Data modules that say nothing of their images are checked when the first of a shape comes."""
        shape = tuple(tensor.shape[1:])
        if shape not in self._fit:
            check(shape)
            self._fit.add(shape)


def _answers(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The dense denoiser's answers to the prompts themselves, and to the negative ones."""
    if ANSWER not in batch:
        raise UserError(f"a training batch of recorded trajectories needs their answer; it has {sorted(batch)}")
    return {name: batch[name] for name in (ANSWER, NEGATIVE + ANSWER) if name in batch}
