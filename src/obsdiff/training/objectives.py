"""The terms of a recovery's loss: one pass of the student, and of the teacher where a term asks for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from obsdiff.diffusion.distill import (
    feature_loss,
    guided_loss,
    jacobian_gain,
    jacobian_loss,
    output_loss,
    unit_directions,
)
from obsdiff.errors import UserError
from obsdiff.models.calling import call_denoiser
from obsdiff.models.graph import stages_of
from obsdiff.models.told import Told

TEACHER_TERMS = ("distill_output", "distill_guided", "distill_features", "distill_jacobian")
LIVE_TERMS = ("distill_features", "distill_jacobian")  # need more of the teacher than its answer
TERMS = ("denoise", *TEACHER_TERMS)


def teacher_runs(weights: Collection[str], answered: bool) -> bool:
    """Whether the dense denoiser has to run in every step.

    Args:
        weights: Terms of the loss.
        answered: Whether its answers are recorded.
    """
    asked = set(weights) & set(TEACHER_TERMS)
    return bool(asked & set(LIVE_TERMS) or (asked and not answered))


def loss_terms(
    student: nn.Module,
    teacher: nn.Module | None,
    weights: Mapping[str, float],
    told: Told,
    target: Tensor | None,
    generator: torch.Generator,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Each term of the objective, unweighted, as a float32 scalar.

    Args:
        student: The denoiser in training.
        teacher: The dense one, frozen; None if no term asks for it, or only for its answer and ``told`` has that.
        weights: Terms and their weights, from :func:`obsdiff.training.checks.check_objective`.
        told: What both are given.
        target: What the denoiser should answer, for ``denoise``; None if the batch holds no images.
        generator: For the directions of ``distill_jacobian``.
        kept: Numbers of the teacher's stages that the student still has, by list, where it lacks some.

    Raises:
        UserError: ``denoise`` without a target.
        ValueError: A term that there is not.
    """
    if unknown := set(weights) - set(TERMS):
        raise ValueError(f"unknown terms {sorted(unknown)}; there are {', '.join(TERMS)}")
    second_order = "distill_jacobian" in weights
    features = "distill_features" in weights
    latents = told.latents.detach().requires_grad_(second_order)
    given = (latents, told.times, told.embeds, told.common)
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext():
        with _block_outputs(student, stages_of(student) if features else ()) as mine:
            answer = call_denoiser(student, *given)
        terms = {}
        if "denoise" in weights:
            if target is None:
                raise UserError("objective denoise needs images; choose a data module that has them, or distil alone")
            terms["denoise"] = output_loss(answer[:, : target.shape[1]], target)  # what follows is a variance
        if set(weights) & set(TEACHER_TERMS):
            wanted: list[Tensor] = []
            if teacher is None:
                assert told.aim is not None and not set(weights) & set(LIVE_TERMS)
                aim = told.aim
            else:
                shared = [name for name in stages_of(teacher) if _is_kept(name, kept or {})] if features else []
                with torch.set_grad_enabled(second_order), _block_outputs(teacher, shared) as wanted:
                    aim = call_denoiser(teacher, *given)
            if "distill_output" in weights:
                terms["distill_output"] = output_loss(answer, aim.detach())
            if "distill_guided" in weights:
                terms["distill_guided"] = guided_loss(answer, aim.detach(), told.guidance)
            if features:
                # of the answer too, by nothing: FSDP2 gathers its outermost weights where their output has a gradient
                terms["distill_features"] = feature_loss(mine, [t.detach() for t in wanted]) + 0 * answer.float().mean()
            if second_order:
                direction = unit_directions(answer, generator)
                gain = jacobian_gain(answer, latents, direction, create_graph=True)
                terms["distill_jacobian"] = jacobian_loss(
                    gain, jacobian_gain(aim, latents, direction, create_graph=False)
                )
    return terms


def _is_kept(stage: str, kept: Mapping[str, Sequence[int]]) -> bool:
    """Whether the student has a stage of the teacher."""
    stack, _, number = stage.rpartition(".")
    return stack not in kept or int(number) in kept[stack]


@contextmanager
def _block_outputs(denoiser: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Every tensor the denoiser's blocks ``names`` give, in order, while it runs once (not again when checkpoints
    recompute)."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.extend(t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor))

    hook: Callable[..., None] = keep
    stages = [denoiser.get_submodule(name) for name in names]
    handles = [stage.register_forward_hook(hook) for stage in stages]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
