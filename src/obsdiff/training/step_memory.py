"""What a training step takes of memory, counted on the meta device: the step itself runs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from obsdiff.models.calling import (
    LENGTHS,
    WHICH,
    both_prompts,
    call_denoiser,
    conditions_of,
    default_dtype,
    drop_prompts,
)
from obsdiff.models.calls import moved
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.live import counting
from obsdiff.models.subject import Subject
from obsdiff.models.told import Told
from obsdiff.training.objectives import TEACHER_TERMS, loss_terms
from obsdiff.training.optimizers import optimizer_of
from obsdiff.training.options import Optimization

STEPS = 2  # the optimizer makes its moments in the first


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step makes, beyond weights and batch.

    Attributes:
        peak: The most: activations, gradients, the optimizer's moments and what it makes while it steps.
        kept: What the optimizer keeps: its moments.
        gradients: What stays until the next step's backward pass.
    """

    peak: int
    kept: int
    gradients: int


def told_to(
    subject: Subject,
    size: int,
    guided: bool,
    latents: Sequence[int] | None = None,
    image: tuple[int, int] | None = None,
) -> Told:
    """A batch on the meta device as training gives it to the denoiser, of nothing.

    Args:
        subject: A pipeline without weights.
        size: Samples.
        guided: Whether each is asked about with both prompts.
        latents: The shape of one; None: what the pipeline draws.
        image: Height and width in pixels of what it is made of; None: the pipeline's own.
    """
    pipe, family = subject.pipe, subject.family
    found, common, own = conditions_of(pipe, encode_prompts(pipe, [family.example], call_arguments(pipe)), image)
    rows = {name: value.expand(size, *value.shape[1:]) for name, value in found.items() if not name.endswith(WHICH)}
    dropped = torch.zeros(size, dtype=torch.bool)
    embeds = both_prompts(rows) if guided else drop_prompts(rows, dropped)
    count = 2 * size if guided else size
    return Told(
        torch.empty(count, *(latents or own), device="meta"),
        torch.empty(count, device="meta"),
        {name: value if name.endswith(LENGTHS) else value.to("meta") for name, value in embeds.items()},
        moved(common, torch.device("meta"), torch.float32, torch.float32),
    )


def step_memory(
    students: Sequence[nn.Module],
    teachers: Sequence[nn.Module],
    weights: Mapping[str, float],
    told: Told,
    optimization: Optimization,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> StepMemory:
    """What a step makes, in the order in which Lightning does it.

    Args:
        students: The denoisers in training, on the meta device.
        teachers: The dense ones, as many; none where their answers are recorded or not asked for.
        weights: Of the loss's terms.
        told: What each of them is asked (:func:`told_to`).
        optimization: The optimizer.
        kept: Numbers of the teacher's stages that the student still has, as for :func:`loss_terms`.

    Raises:
        Exception: Something does not run without weights, and fails in its own way.
    """
    trained = [p for student in students for p in student.parameters() if p.requires_grad]
    recorded = not teachers and bool(weights.keys() & set(TEACHER_TERMS))
    given = [replace(told, aim=_answer(student, told) if recorded else None) for student in students]
    asked: Sequence[nn.Module | None] = teachers or [None] * len(students)
    pairs = list(zip(students, asked, given, strict=True))
    optimizer = optimizer_of(_plain(optimization), trained)
    with torch.enable_grad(), default_dtype(), counting(unknown=1, fused="distill_jacobian" not in weights) as live:
        for _ in range(STEPS):
            loss = torch.stack([_loss(student, teacher, weights, own, kept) for student, teacher, own in pairs]).sum()
            optimizer.zero_grad()
            loss.backward()
            del loss
            torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            optimizer.step()
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        moments = live.now - gradients
    return StepMemory(live.peak, moments, gradients)


def _plain(optimization: Optimization) -> Optimization:
    """Without fused kernels, which the meta device has not; one parameter after the other, as those make nothing."""
    given = dict(optimization.arguments or {})
    return (
        replace(optimization, arguments={**given, "fused": False, "foreach": False})
        if given.get("fused")
        else optimization
    )


def _loss(
    student: nn.Module,
    teacher: nn.Module | None,
    weights: Mapping[str, float],
    told: Told,
    kept: Mapping[str, Sequence[int]] | None,
) -> Tensor:
    target = torch.empty_like(told.latents) if "denoise" in weights else None
    terms = loss_terms(student, teacher, weights, told, target, torch.Generator(), kept)
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


@torch.no_grad()
def _answer(student: nn.Module, told: Told) -> Tensor:
    """Of the shape of what was recorded."""
    return torch.empty_like(call_denoiser(student, told.latents, told.times, told.embeds, told.common))
