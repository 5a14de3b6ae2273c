"""Layers that read one vector per sample (modulations), or tokens (queries, keys, values), on a few directions of it.

The vector ``x = silu(embedding of time and pooled text)`` varies in a small subspace, tokens of the text nearly so:

    W x + b  ≈  (W D) (E x)  +  b + W (I − D E) μ

with E (r, d) shared by all layers that read it. For a given r the least squared error of all outputs together,
``Σ_l E‖W_l (I − D E)(x − μ)‖²``, is that of reduced-rank regression (Izenman 1975): with ``C = B Bᵀ`` and
``A = Bᵀ (Σ_l W_lᵀ W_l) B = U diag(λ) Uᵀ``, λ falling, it is ``E = U_rᵀ B⁺`` and ``D = B U_r``, and leaves
``Σ_{i>r} λ_i``. Without the weights (A = BᵀB) that is principal component analysis. Directions are nested: a smaller r
takes fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-7  # a variance below this share of the largest is rounding of float32 inputs


@dataclass(frozen=True)
class Directions:
    """Directions of a vector, the most important first, float64.

    Attributes:
        encode: E, rows of unit length (k, d).
        decode: D (d, k).
        left_out: Of the outputs' variance (with principal components: of the input's), the share that is lost if only
            the first r are kept, (k + 1,) for r = 0, …, k.
    """

    encode: Tensor
    decode: Tensor
    left_out: Tensor

    def __len__(self) -> int:
        return len(self.encode)

    def first(self, rank: int) -> tuple[Tensor, Tensor]:
        """E (rank, d) and D (d, rank); beyond what was seen to vary, directions that carry nothing."""
        encode, decode = self.encode[:rank], self.decode[:, :rank]
        if (more := rank - len(encode)) > 0:
            encode = torch.cat([encode, encode.new_zeros(more, encode.shape[1])])
            decode = torch.cat([decode, decode.new_zeros(len(decode), more)], dim=1)
        return encode, decode


def directions(covariance: Tensor, weights: Sequence[Tensor] = ()) -> Directions:
    """The directions of a vector by what they do to the outputs of ``weights``, or, without weights, by their variance.

    Args:
        covariance: C (d, d), of x − μ where biases take up the mean, else of x.
        weights: W_l (rows, d) of the layers that read the vector.
    """
    values, axes = torch.linalg.eigh(covariance.double())
    there = values > NOISE * values[-1]
    values, axes = values[there], axes[:, there]
    root = axes * values.sqrt()  # B
    if weights:
        power = sum((w.double().T @ w.double() for w in weights), torch.zeros_like(covariance, dtype=torch.float64))
        found, turned = torch.linalg.eigh(root.T @ power @ root)
    else:
        found, turned = values, torch.eye(len(values), dtype=values.dtype, device=values.device)
    found, turned = found.flip(0).clamp_min(0), turned.flip(1)
    encode = (axes / values.sqrt() @ turned).T
    length = encode.norm(dim=1, keepdim=True)
    total = found.sum()
    left = torch.cat([total[None], total - found.cumsum(0)]).clamp_min(0) / total
    return Directions(encode / length, root @ turned * length.T, left)
