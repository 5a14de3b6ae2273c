"""Distillation losses: a pruned student against its dense teacher. All are means over the batch, float32 scalars."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER_SIGMAS = 2.0


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the denoisers' answers (BK-SDM 2305.15798 eq. 2)."""
    return (student.float() - teacher.float()).square().mean()


def guided_loss(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Mean squared difference of what a sampler makes of both, ``n + g (p − n)``.

    Divided by ``g² + (g − 1)²``, which is how much errors that are independent in the two rows grow, so that it is of
    the size of :func:`output_loss`. Errors of the rows that are the same in both weigh less in it, errors of opposite
    sign more, as in the images (both branches are distilled by DASH, 2606.00798).

    Args:
        student, teacher: Answers (2n, ...): to the negative prompt, then to the prompts themselves.
        scale: Guidance g.
    """
    (mine_n, mine_p), (wanted_n, wanted_p) = student.float().chunk(2), teacher.float().chunk(2)
    negative, positive = mine_n - wanted_n, mine_p - wanted_p
    return (negative + scale * (positive - negative)).square().mean() / (scale**2 + (scale - 1) ** 2)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], robust: bool = True) -> Tensor:
    """Mean over blocks of ``‖f_S − f_T‖² / ‖f_T‖²``.

    Each term is divided by the teacher feature's squared norm, so that no block outweighs the others (LAPTOP-Diff
    2404.11098). ``robust`` leaves out the entries whose teacher value is more than two standard deviations from its
    mean, the massive activations on which plain feature distillation diverges (TinyFusion 2412.01199 §3.4).

    Args:
        student: One feature per block, any shape.
        teacher: The same shapes.
        robust: Leave outliers out.
    """
    terms = []
    for mine, wanted in zip(student, teacher, strict=True):
        mine, wanted = mine.float(), wanted.float()
        if robust:
            seen = (wanted - wanted.mean()).abs() <= OUTLIER_SIGMAS * wanted.std()
            mine, wanted = mine * seen, wanted * seen
        terms.append((mine - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(terms).mean()


def jacobian_gain(output: Tensor, x: Tensor, direction: Tensor, create_graph: bool) -> Tensor:
    """``‖Jᵀ v‖²`` per sample for ``J = ∂output/∂x`` and unit directions v of the output's shape, (n,)."""
    (product,) = torch.autograd.grad((output * direction).sum(), x, create_graph=create_graph)
    return product.float().square().flatten(1).sum(1)


def jacobian_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ``(‖Jᵀ v‖² − ‖J_Dᵀ v‖²)²``: second-order matching with one random direction per sample.

    2ndMatch 2506.05398 (its published code multiplies from the left, as here, where the text writes J v).

    Args:
        student, teacher: :func:`jacobian_gain` of each, (n,).
    """
    return (student - teacher).square().mean()


def unit_directions(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random directions of norm one per sample, shape and device of ``like`` (n, ...), drawn on the CPU."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    norm = drawn.flatten(1).norm(dim=1).view(-1, *[1] * (like.dim() - 1))
    return (drawn / norm).to(like)
