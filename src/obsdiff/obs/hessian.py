"""Second-moment statistics of layer inputs: streaming, mergeable, one symmetric rank-k update per call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BASE = 128  # columns below which a full product is faster than its upper triangle


def activation_matrices(layer: nn.Module, x: Tensor) -> Tensor:
    """The matrix whose rows multiply the layer's weight: (groups, positions, columns).

    Linear layers have one group and ``columns = in_features``. A convolution sees every receptive field unrolled
    (padding, padding mode, stride, dilation), ``columns = in_channels / groups · kernel``, matching
    ``weight.flatten(1)``.

    Args:
        layer: The layer that reads ``x``.
        x: Its input: (..., in_features), or (batch, channels, height, width).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.Conv2d):
        sides = layer._reversed_padding_repeated_twice  # left, right, top, bottom; resolves padding="same" too
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = nn.functional.pad(x, list(sides), mode=mode)
        fields = nn.functional.unfold(
            padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
        )  # (batch, channels · kernel, positions)
        batch, _, positions = fields.shape
        grouped = fields.view(batch, layer.groups, -1, positions)
        return grouped.permute(1, 0, 3, 2).reshape(layer.groups, batch * positions, -1)
    raise TypeError(f"cannot prune a {type(layer).__name__}; supported are Linear and Conv2d")


def weight_matrices(layer: nn.Module) -> Tensor:
    """The layer's weight as (groups, rows, columns), a view matching :func:`activation_matrices`."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.view(groups, weight.shape[0] // groups, -1)


def _add_upper_product(total: Tensor, x: Tensor, weight: float) -> None:
    """``total += weight · xᵀ x`` in the upper triangle, by halves: 1/2 + 64/n of a full product's work."""
    n = x.shape[1]
    if n <= BASE:
        total.addmm_(x.T, x, alpha=weight)
        return
    half = n // 2
    left, right = x[:, :half], x[:, half:]
    total[:half, half:].addmm_(left.T, right, alpha=weight)
    _add_upper_product(total[:half, :half], left, weight)
    _add_upper_product(total[half:, half:], right, weight)


@dataclass
class SiteStatistics:
    """Weighted sums over everything one site has seen. Sums, not means, so that two halves add up to the whole.

    Attributes:
        hessian_sum: ``Σ α x xᵀ``, float32 (groups, n, n); only the upper triangle is kept up to date.
        input_sum: ``Σ α x``, float32 (groups, n).
        weight_sum: ``Σ α`` over all inputs seen.
        num_tokens: Inputs seen.
        disposable: Nobody else needs the sums: :meth:`hessian` may work in their memory, once per group.
    """

    hessian_sum: Tensor
    input_sum: Tensor
    weight_sum: float = 0.0
    num_tokens: int = 0
    disposable: bool = False

    @classmethod
    def empty(cls, columns: int, groups: int = 1, device: torch.device | str = "cpu") -> SiteStatistics:
        """Statistics of nothing yet."""
        return cls(torch.zeros(groups, columns, columns, device=device), torch.zeros(groups, columns, device=device))

    @torch.no_grad()
    def add(self, x: Tensor, weight: float) -> None:
        """Add inputs ``x`` (groups, tokens, n), all with timestep weight ``weight`` (α_t).

        Activations are cast to float32 *before* any scaling: half-precision features reach values whose scaled or
        squared form overflows.
        """
        x = x.float()
        for total, inputs in zip(self.hessian_sum, x, strict=True):
            _add_upper_product(total, inputs, weight)
        self.input_sum += weight * x.sum(1)
        self.weight_sum += weight * x.shape[1]
        self.num_tokens += x.shape[1]

    def merge(self, other: SiteStatistics) -> None:
        """Add another part's sums (another half of the prompts, another process)."""
        self.hessian_sum += other.hessian_sum
        self.input_sum += other.input_sum
        self.weight_sum += other.weight_sum
        self.num_tokens += other.num_tokens

    def hessian(self, group: int = 0) -> Tensor:
        """``H = Σ α x xᵀ / Σ α``, symmetric float32 (n, n) (OBS-Diff eq. 5 up to a constant)."""
        total = self.hessian_sum[group] if self.disposable else self.hessian_sum[group].clone()
        upper = total.triu_().div_(self.weight_sum)
        return upper.add_(upper.T.tril(-1))

    def mean(self, group: int = 0) -> Tensor:
        """Weighted mean input, float32 (n,)."""
        return self.input_sum[group] / self.weight_sum

    def is_finite(self) -> bool:
        """Whether every activation seen was finite. The diagonal sees each one, and squares never cancel."""
        diagonal = self.hessian_sum.diagonal(dim1=-2, dim2=-1)
        return bool(torch.isfinite(diagonal).all()) and bool(torch.isfinite(self.hessian_sum).all())
