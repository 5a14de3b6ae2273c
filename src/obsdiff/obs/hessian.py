"""Moments of layer inputs: centred, streaming, mergeable, one symmetric rank-k update per call."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from obsdiff.obs.linalg import LAUNCHED, all_finite, mirror_
from obsdiff.obs.precision import MOST_ROWS, add_upper_int8_product, products_in
from obsdiff.ranks import add_up, rank, world_size

STRIP = 128  # rows of a product, below which a processor is not busy
FEW = 32  # rows, below which rounding saves nothing, and torch rounds some products and others not


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


def strip_spans(columns: int, device_type: str = "cpu") -> list[tuple[int, int]]:
    """First row and end of the strips that the upper triangle of a (columns, columns) matrix is kept in: each begins at
    the diagonal and goes on to the right end, so that eight take 9/16 of the whole.

    Args:
        columns: n.
        device_type: Where.
    """
    height = max(LAUNCHED if device_type == "cuda" else STRIP, -(-columns // 8))
    return [(start, min(start + height, columns)) for start in range(0, columns, height)]


def add_upper_product(strips: Sequence[Tensor], x: Tensor, weight: float) -> None:
    """``H += weight · xᵀ x`` in the strips of H's upper triangle.

    Args:
        strips: (rows, n − start) float32 each.
        x: (tokens, n).
        weight: Of them.
    """
    for strip in strips:
        right = x[:, x.shape[1] - strip.shape[1] :]
        strip.addmm_(right[:, : len(strip)].T, right, alpha=weight)


@dataclass
class Centred(ABC):
    """Weighted moments of everything one site has seen, centred while they accumulate.

    Real models have channels whose mean is thousands of times their spread; the difference of two raw sums would leave
    nothing of their variance in float32. Two parts are merged by Chan's rule (Chan, Golub, LeVeque 1979). How much of
    the co-moments is kept is a subclass's: all of them (:class:`Gram`), or their diagonal
    (:class:`obsdiff.obs.diagonal.Diagonal`).

    Attributes:
        comoment: What is kept of ``Σ α (x − μ)(x − μ)ᵀ``, in parts, float32, first dimension groups.
        centre: The weighted mean input μ, float64 (float32 where the device has no float64), (groups, n).
        weight_sum: ``Σ α`` over all inputs seen.
        num_tokens: Inputs seen.
        disposable: Nobody else needs the moments: whole matrices are let go as their last group is read.
        gives: Which needs of a method it serves.
        precision: What inputs are rounded to in products, a name of :data:`obsdiff.names.PRECISIONS`. They are centred
            before, so a mean of thousands of times their spread costs nothing; the mean itself is not rounded.
    """

    comoment: list[Tensor]
    centre: Tensor
    weight_sum: float = 0.0
    num_tokens: int = 0
    disposable: bool = False
    gives: ClassVar[frozenset[str]]
    precision: ClassVar[str] = "float32"

    @classmethod
    @abstractmethod
    def shapes(cls, groups: int, columns: int, device_type: str = "cpu") -> list[tuple[int, ...]]:
        """Of the parts of :attr:`comoment`, as they are made on such a device."""

    @classmethod
    def fit(cls, comoment: Sequence[Tensor], groups: int, columns: int) -> bool:
        """Whether these can be its parts."""
        return [part.shape for part in comoment] == cls.shapes(groups, columns)

    @abstractmethod
    def accumulate(self, u: Tensor, weight: float) -> None:
        """``comoment += weight · Σ u uᵀ`` over inputs u (groups, tokens, n), as far as it is kept; u may change."""

    @abstractmethod
    def about(self, centre: Tensor) -> list[Tensor]:
        """``Σ α (x − m)(x − m)ᵀ`` about another centre m (groups, n), new tensors like :attr:`comoment`."""

    @abstractmethod
    def variances(self) -> Tensor:
        """The diagonal of :attr:`comoment`, (groups, n)."""

    @abstractmethod
    def of_columns(self, columns: Tensor) -> Self:
        """The moments of some of the inputs (int64, rising), new tensors."""

    @classmethod
    def empty(cls, columns: int, groups: int = 1, device: torch.device | str = "cpu") -> Self:
        """Moments of nothing yet."""
        shapes = cls.shapes(groups, columns, torch.device(device).type)
        return cls([torch.zeros(shape, device=device) for shape in shapes], torch.zeros(groups, columns)).to(device)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        exact = torch.float32 if torch.device(device).type == "mps" else torch.float64
        comoment = [part.to(device) for part in self.comoment]
        return replace(self, comoment=comoment, centre=self.centre.to(device, exact))

    @torch.no_grad()
    def add(self, x: Tensor, weight: float) -> None:
        """Add inputs ``x`` (groups, tokens, n), all with timestep weight ``weight`` (α_t > 0).

        With W the weight before, w that of these inputs, u = x − μ and δ their mean, Chan's update
        ``Σ α (u − δ)(u − δ)ᵀ + W w / (W + w) δ δᵀ`` is one product: ``Σ α (u − c δ)(u − c δ)ᵀ`` with
        ``c = 1 − √(W / (W + w))``. Activations are cast to float32 *before* any scaling: half-precision features reach
        values whose scaled or squared form overflows.
        """
        if x.shape[1] == 0:
            return
        added = weight * x.shape[1]
        share = added / (self.weight_sum + added)
        # a float32 value near the mean: differences to it are exact to float32 of the difference
        near = (x[:, 0] if self.weight_sum == 0 else self.centre).float()
        u = x - near[:, None]
        u = u.float()
        exact = self.centre.dtype
        mean = u.mean(1).to(exact)
        centre = self.centre if self.weight_sum > 0 else near.to(exact) + mean
        rest = centre - near.to(exact)  # what rounding to float32 left of the mean
        delta = mean - rest
        u -= (rest + (1 - math.sqrt(1 - share)) * delta).float()[:, None]
        self.accumulate(u, weight)
        self.centre = centre + share * delta
        self.weight_sum += added
        self.num_tokens += x.shape[1]

    @torch.no_grad()
    def merge(self, other: Self) -> None:
        """Add another part (another half of the prompts)."""
        if other.weight_sum == 0:
            return
        total = self.weight_sum + other.weight_sum
        centre = self.centre + other.weight_sum / total * (other.centre - self.centre)
        shifted = other.about(centre)
        self.comoment = [own.add_(part) for own, part in zip(self.about(centre), shifted, strict=True)]
        self.centre = centre
        self.weight_sum = total
        self.num_tokens += other.num_tokens

    def add_up(self) -> None:
        """Replace one process's moments by those over all processes, the same to the bit on each of them."""
        groups, columns = self.centre.shape
        parts = torch.zeros(world_size(), groups * columns + 2, dtype=self.centre.dtype, device=self.centre.device)
        parts[rank(), :-2] = self.centre.flatten()
        parts[rank(), -2], parts[rank(), -1] = self.weight_sum, self.num_tokens
        add_up([parts])  # each row is one process's, so that all know all
        weights = parts[:, -2]
        if not bool(weights.sum() > 0):
            return
        centre = ((weights / weights.sum()) @ parts[:, :-2]).view(groups, columns)
        self.comoment = self.about(centre)
        add_up(self.comoment)
        self.centre = centre
        self.weight_sum, self.num_tokens = float(weights.sum()), int(parts[:, -1].sum())

    def tensors(self) -> dict[str, Tensor]:
        """What a store keeps, besides :attr:`weight_sum` and :attr:`num_tokens`."""
        return {_named(number): part.cpu() for number, part in enumerate(self.comoment)} | {"mean": self.centre.cpu()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], weight_sum: float, num_tokens: int) -> Self:
        """What :meth:`tensors` gave.

        Raises:
            KeyError, ValueError: It gave something else.
        """
        comoment, mean = [tensors[_named(number)] for number in range(len(tensors) - 1)], tensors["mean"]
        if mean.dim() != 2 or not cls.fit(comoment, *mean.shape):
            shapes = ", ".join(str(tuple(part.shape)) for part in comoment)
            raise ValueError(f"shapes {shapes} and {tuple(mean.shape)} do not belong together")
        return cls(comoment, mean, weight_sum, num_tokens)

    def released(self) -> Self:
        """The same moments, which nobody else needs any more."""
        return replace(self, disposable=True)

    def mean(self, group: int = 0) -> Tensor:
        """Weighted mean input, (n,), in the dtype of :attr:`centre`."""
        return self.centre[group]

    def power(self) -> Tensor:
        """``diag H``: the weighted mean square of each input, float32 (groups, n)."""
        return self.variances() / self.weight_sum + self.centre.float().square()

    def is_finite(self) -> bool:
        """Whether every activation seen was finite. The diagonal sees each one, and squares never cancel."""
        return all(all_finite(part) for part in (self.centre, *self.comoment))


def _named(number: int) -> str:
    """What a store calls a part; whole matrices, which stores of earlier versions hold, are called as the first one."""
    return f"comoment.{number}" if number else "comoment"


class Gram(Centred):
    """All co-moments, so H itself: strips of its upper triangle (:func:`strip_spans`), (groups, rows, n − start).

    What a strip holds below the diagonal is not looked at.
    """

    gives = frozenset({"gram", "diagonal", "float32"})

    @classmethod
    def shapes(cls, groups: int, columns: int, device_type: str = "cpu") -> list[tuple[int, ...]]:
        spans = strip_spans(columns, device_type)
        return [(groups, end - start, columns - start) for start, end in spans]

    @classmethod
    def fit(cls, comoment: Sequence[Tensor], groups: int, columns: int) -> bool:
        """Strips of any height do, a whole matrix too: it is one of all rows (:meth:`to` lays them out)."""
        start = 0
        for strip in comoment:
            if strip.dim() != 3 or strip.shape != (groups, strip.shape[1], columns - start):
                return False
            start += strip.shape[1]
        return start == columns

    def accumulate(self, u: Tensor, weight: float) -> None:
        precision = self.precision if u.shape[1] >= FEW else "float32"
        with products_in(precision, u.device):
            for group, inputs in enumerate(u):
                add_upper_product([strip[group] for strip in self.comoment], inputs, weight)

    def about(self, centre: Tensor) -> list[Tensor]:
        distance = (self.centre - centre).float()
        moved = []
        for start, end, strip in self._placed():
            left, right = distance[:, start:end, None], distance[:, None, start:]
            moved.append(torch.baddbmm(strip, left, right, alpha=self.weight_sum))
        return moved

    def variances(self) -> Tensor:
        return torch.cat([strip.diagonal(dim1=-2, dim2=-1) for strip in self.comoment], dim=-1)

    def of_columns(self, columns: Tensor) -> Self:  # rising, so that the upper triangle stays the upper one
        kept = columns.to(self.centre.device)
        comoment = self._laid_out(len(kept), lambda whole: whole[kept][:, kept])
        return replace(self, comoment=comoment, centre=self.centre[:, kept], disposable=True)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device, in strips as they are made there."""
        moved = super().to(device)
        groups, columns = moved.centre.shape
        if [strip.shape for strip in moved.comoment] == self.shapes(groups, columns, moved.centre.device.type):
            return moved
        return replace(moved, comoment=moved._laid_out(columns, lambda whole: whole))

    def _laid_out(self, columns: int, part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The strips of this device, of ``part`` (columns, columns) of each group's matrix."""
        groups, device_type = len(self.centre), self.centre.device.type
        shapes = self.shapes(groups, columns, device_type)
        strips = [self.centre.new_empty(shape, dtype=torch.float32) for shape in shapes]
        for group in range(groups):
            whole = part(self._whole(group))
            for (start, end), strip in zip(strip_spans(columns, device_type), strips, strict=True):
                strip[group] = whole[start:end, start:]
        return strips

    def _placed(self) -> Iterator[tuple[int, int, Tensor]]:
        """The strips with their first row and its end."""
        for strip in self.comoment:
            start = self.centre.shape[1] - strip.shape[2]
            yield start, start + strip.shape[1], strip

    def _whole(self, group: int, over: float = 1.0) -> Tensor:
        """A new symmetric (n, n), divided by ``over``."""
        assert self.comoment, "these moments were let go"
        n = self.centre.shape[1]
        whole = self.centre.new_empty(n, n, dtype=torch.float32)
        for start, end, strip in self._placed():
            torch.div(strip[group], over, out=whole[start:end, start:])
        return mirror_(whole)

    def covariance(self, group: int = 0) -> Tensor:
        """``C = Σ α (x − μ)(x − μ)ᵀ / Σ α``, symmetric float32 (n, n), a new tensor."""
        whole = self._whole(group, self.weight_sum)
        if self.disposable and group == len(self.centre) - 1:
            self.comoment = []
        return whole

    def hessian(self, group: int = 0) -> Tensor:
        """``H = Σ α x xᵀ / Σ α = C + μ μᵀ``, symmetric float32 (n, n) (OBS-Diff eq. 5 up to a constant)."""
        mean = self.centre[group].float()
        return self.covariance(group).addr_(mean, mean)


class TF32Gram(Gram):
    """Of inputs rounded to 10 bits after the point."""

    gives = frozenset({"gram", "diagonal", "tf32"})
    precision = "tf32"


class BFloat16Gram(Gram):
    """Of inputs rounded to 7 bits after the point."""

    gives = frozenset({"gram", "diagonal", "bfloat16"})
    precision = "bfloat16"


class Int8Gram(Gram):
    """Of inputs rounded to 8 bits of the largest of their column in a call."""

    gives = frozenset({"gram", "diagonal", "int8"})
    precision = "int8"

    def accumulate(self, u: Tensor, weight: float) -> None:
        if u.shape[1] < FEW:
            super().accumulate(u, weight)
            return
        for group, inputs in enumerate(u):
            strips = [strip[group] for strip in self.comoment]
            for rows in inputs.split(MOST_ROWS):
                add_upper_int8_product(strips, rows, weight)
