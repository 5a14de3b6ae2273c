"""Gradients of the denoising loss at the dense weights, for methods that go by Taylor expansions.

Which loss? Distillation against the dense model's own answer is of no use: it is least, zero, at the dense weights,
and so is its gradient. Diff-Pruning (2305.10924) takes the loss that the model was trained on, ``‖answer(x_t, t) −
target‖²`` with x_t made of images and noise. It needs no images but the model's own: the prompts of the calibration
are denoised by the dense pipeline, noise of another seed is added by the pipeline's own noise process, and the target
is that noise (velocity, clean latents), as in training. The answer cannot know which noise it was, so neither loss
nor gradient is zero. Over ever more images the gradient of a converged model falls towards zero all the same, with
the training images as with its own; what such scores then rank by is its spread over images, as in the published
experiments.

As in the published code one noise belongs to each image and is used at all times. That code visits all 1,000 steps,
the least noisy first, and stops where the loss falls below T of the largest so far; the paper's formula takes the
times with ``L_t / L_max > T``. Here it is the formula, on :data:`TIMES` times spread evenly over what training draws:
the losses are measured first, without gradients, and the times that count are run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.costs import BACKWARD
from obsdiff.diffusion.noising import Noising
from obsdiff.errors import UserError
from obsdiff.models.calling import WHICH, call_denoiser, drop_prompts
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import dtype_of
from obsdiff.models.graph import Graph, Site
from obsdiff.models.latents import patch_of, vae_factor
from obsdiff.models.modes import eval_mode
from obsdiff.models.schedules import noising_of_pipeline
from obsdiff.models.subject import Subject
from obsdiff.obs.observers import GRADIENTS
from obsdiff.progress import track
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.recorder import Recorder
from obsdiff.pruning.statistics import LossGradients
from obsdiff.pruning.trajectories import noise_seeds, run_trajectories, seen_calls
from obsdiff.ranks import world_size

TIMES = 20
SIZE = (64, 64)  # of latents, to ask whether a scheduler can be followed at all


def check_differentiable(subject: Subject) -> None:
    """Refuse what no gradient can be measured of, before anything runs.

    Raises:
        UserError: Several processes, half precision, a denoiser that is given more than noisy latents, or a scheduler
            whose training noise is not known.
    """
    if world_size() > 1:
        raise UserError("gradients of the loss are measured by one process; run this without torchrun")
    for model in subject.components.values():
        if (dtype := dtype_of(model)) not in (torch.float32, torch.bfloat16, torch.float64):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"gradients of the loss vanish or overflow in {kind}; use --dtype float32 or bfloat16")
        given, answered = (getattr(model.config, name, None) for name in ("in_channels", "out_channels"))
        if given is not None and answered is not None and answered < given != answered * _patch_area(model):
            raise UserError(
                f"the {type(model).__name__} is given {given} channels and answers {answered}: it works on an image "
                "too, whose training loss is not known, so it has no gradient; use a method that goes by layer inputs, "
                "such as obs"
            )
    _noising(subject, SIZE)


def _patch_area(model: Any) -> int:
    """Pixels of a patch, which packed latents (Qwen-Image) bring as channels that ``out_channels`` does not count."""
    patch = getattr(model.config, "patch_size", None) or 1
    return math.prod(patch) if isinstance(patch, tuple | list) else int(patch) ** 2


def _noising(subject: Subject, size: tuple[int, int]) -> Noising:
    try:
        return noising_of_pipeline(subject.pipe, size)
    except UserError as error:
        reason, kind = str(error).partition(": ")[2].partition(";")[0], type(subject.pipe.scheduler).__name__
        raise UserError(
            f"the training loss of this pipeline is not known, so it has no gradient ({kind}: {reason}); use a method "
            "that goes by layer inputs, such as obs"
        ) from error


def layers_of(graph: Graph, sites: Sequence[Site]) -> list[str]:
    """The layers whose gradients serve a prune of these sites: those that read them or share units with these."""
    found = dict.fromkeys(layer for site in sites for layer in site.layers)
    for group in graph.groups:
        if group.basis is None and any(s.layer in found for s in group.consumers):
            found |= dict.fromkeys(group.layers)
    return list(found)


def loss_gradients(
    subject: Subject,
    conditioning: Conditioning,
    settings: Settings,
    layers: Sequence[str],
    need: str,
    quiet: bool = True,
) -> LossGradients:
    """Gradients of the mean denoising loss over prompts and times.

    Memory: one float32 gradient per weight, and the activations of ``settings.batch_size`` rows.

    Args:
        subject: The dense pipeline; as before afterwards.
        conditioning: The calibration's prompts.
        settings: The calibration's settings.
        layers: By whose weights.
        need: A name of :data:`obsdiff.obs.observers.GRADIENTS`.
        quiet: No progress bar.

    Raises:
        UserError: The loss is not finite, or depends on none of these weights.
    """
    started = time.perf_counter()
    loss, recording_rows = _recorded(subject, conditioning, settings, quiet)
    parameters = {name: subject.graph.weight(name) for name in layers}
    threshold, size = GRADIENTS[need], settings.batch_size
    with eval_mode(subject.pipe):
        everything = torch.arange(len(loss.times))
        values, rows = torch.zeros(len(loss.times), dtype=torch.float64), recording_rows
        used = everything
        if threshold > 0:
            with torch.no_grad():
                for pairs in track(loss.batches(everything, size), loss.count(everything, size), "losses", quiet):
                    values.index_add_(0, pairs[:, 0], loss(pairs).double().cpu())
            rows += loss.images * len(everything)
            used = everything[values > threshold * values.max()]
            _check_finite(values)
        seen = torch.zeros_like(values)
        with accumulated(subject, parameters) as totals, torch.enable_grad():
            for pairs in track(loss.batches(used, size), loss.count(used, size), "gradients", quiet):
                losses = loss(pairs)
                (losses.sum() / (loss.images * len(used))).backward()
                seen.index_add_(0, pairs[:, 0], losses.detach().double().cpu())
        values[used] = seen[used]
        rows += (1 + BACKWARD) * loss.images * len(used)
    _check_finite(values)
    if not all(bool(torch.isfinite(total).all()) for total in totals.values()):
        raise UserError("the gradients of the denoising loss are not finite; try --dtype float32")
    if not any(bool(total.any()) for total in totals.values()):
        raise UserError("the denoising loss depends on none of the layers; was the denoiser replaced or wrapped?")
    named = dict(zip(loss.times.tolist(), (values / loss.images).tolist(), strict=True))
    return LossGradients(need, totals, named, loss.times[used].tolist(), rows, time.perf_counter() - started)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError("the denoising loss is not finite; try --dtype float32")


@contextmanager
def accumulated(subject: Subject, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Float32 sums of the gradients by ``parameters``, and by nothing else, of what runs backward inside; the denoiser
    is afterwards as it was."""
    everything = list(subject.denoiser.parameters())
    before = [(p, p.requires_grad, p.grad) for p in everything]
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    handles = []
    try:
        for p in everything:
            p.requires_grad_(False)
        for name, weight in parameters.items():
            weight.requires_grad_(True)
            weight.grad = None

            def add(weight: Tensor, total: Tensor = totals[name]) -> None:
                assert weight.grad is not None
                total += weight.grad
                weight.grad = None  # the next batch starts anew, so there is one gradient of each weight

            handles.append(weight.register_post_accumulate_grad_hook(add))
        yield totals
    finally:
        for handle in handles:
            handle.remove()
        for p, wanted, gradient in before:
            p.requires_grad_(wanted)
            p.grad = gradient


@dataclass(frozen=True)
class _Loss:
    """The denoising loss of recorded images.

    Attributes:
        subject: The pipeline.
        noising: Its noise process.
        clean, noise: Latents (images, ...), float32 on the CPU.
        embeds, common: What the denoiser is told of each image, and of all.
        times: At which it is asked, the least noisy first, float32.
    """

    subject: Subject
    noising: Noising
    clean: Tensor
    noise: Tensor
    embeds: Mapping[str, Tensor]
    common: Mapping[str, Any]
    times: Tensor

    @property
    def images(self) -> int:
        return len(self.clean)

    def batches(self, used: Tensor, size: int) -> Iterator[Tensor]:
        """(number of a time, number of an image), int64 (up to size, 2), every pair once."""
        yield from torch.cartesian_prod(used, torch.arange(self.images)).split(size)

    def count(self, used: Tensor, size: int) -> int:
        """How many batches that are."""
        return math.ceil(len(used) * self.images / size)

    def __call__(self, pairs: Tensor) -> Tensor:
        """Mean squared error of each pair, float32 (pairs,)."""
        device, family = next(self.subject.denoiser.parameters()).device, self.subject.family
        times, at = self.times[pairs[:, 0]].to(device), pairs[:, 1]
        clean, noise = self.clean[at].to(device), self.noise[at].to(device)
        target = family.sign * self.noising.target(clean, noise, times)
        embeds = {name: tensor[at].to(device) for name, tensor in self.embeds.items()}
        if len(self.subject.components) > 1:  # the first is asked about the noisier latents
            boundary = 1000 * float(self.subject.pipe.config.boundary_ratio)
            embeds[WHICH] = (times < boundary).long()
        answer = call_denoiser(
            self.subject.denoiser,
            self.noising.add_noise(clean, noise, times),
            family.time_offset + family.time_scale * times,
            embeds,
            self.common,
        )
        answer = answer[:, : target.shape[1]]  # what follows is a variance
        return (answer.float() - target.float()).square().flatten(1).mean(1)


@torch.no_grad()
def _recorded(subject: Subject, conditioning: Conditioning, settings: Settings, quiet: bool) -> tuple[_Loss, int]:
    """Denoise every prompt; and the rows that took. The clean latents are those that the denoiser's answer to the last
    latents amounts to: they are laid out as it takes them, whatever the pipeline makes of them in the end."""
    family, recorder = subject.family, Recorder(subject, conditioning)
    device, several = next(subject.denoiser.parameters()).device, len(subject.components) > 1
    last: list[Tensor] = []
    seeds, size, calls = noise_seeds(settings.seed, len(conditioning)), settings.batch_size, 0
    with eval_mode(subject.pipe), seen_calls(subject, recorder.see):
        batches = run_trajectories(subject, conditioning, seeds, size, settings.call, recorder.begin)
        for _ in track(batches, math.ceil(len(conditioning) / size), "drawing", quiet):
            latents, at, number = recorder.seen[-1]
            last.append(latents)
            calls += len(recorder.seen) * recorder.rows_each * len(latents)
    embeds = drop_prompts(recorder.embeds(), torch.zeros(len(conditioning), dtype=torch.bool))
    latents = torch.cat(last).float()
    noising = _noising(subject, _latent_size(subject, settings, latents))
    clean = []
    with eval_mode(subject.pipe):
        for part in torch.arange(len(latents)).split(size):
            told = {name: tensor[part].to(device) for name, tensor in embeds.items()}
            if several:
                told[WHICH] = torch.full((len(part),), number, device=device)
            x = latents[part].to(device)
            times = at.to(device).expand(len(part), *at.shape[1:])
            answer = call_denoiser(subject.denoiser, x, times, told, recorder.common)[:, : x.shape[1]]
            own = (times.flatten(1)[:, 0] if times.dim() > 1 else times) - family.time_offset
            clean.append(noising.clean(x, family.sign * answer.float(), own / family.time_scale).cpu())
    generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds(settings.seed + 1, len(latents))]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    loss = _Loss(subject, noising, torch.cat(clean), noise, embeds, recorder.common, noising.spread(TIMES))
    return loss, calls + len(latents)


def _latent_size(subject: Subject, settings: Settings, latents: Tensor) -> tuple[int, int]:
    """Height and width of the latents, on which a dynamic shift depends."""
    height, width = settings.call.get("height"), settings.call.get("width")
    if height and width:
        factor = vae_factor(subject.pipe)
        return int(height) // factor, int(width) // factor
    if latents.dim() > 3:
        return latents.shape[-2], latents.shape[-1]
    side = math.isqrt(latents.shape[1]) * patch_of(subject.pipe)  # of packed ones, as if they were square
    return side, side
