"""How layers are solved, and what that gives for each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from obsdiff.criteria import METHODS
from obsdiff.errors import UserError
from obsdiff.obs.diagonal import Diagonal
from obsdiff.obs.hessian import Gram
from obsdiff.obs.linalg import DAMPING
from obsdiff.obs.moments import Moments, Powers, UnusableStatistics
from obsdiff.obs.observers import Observer


@dataclass(frozen=True)
class SolveOptions:
    """How to solve.

    Attributes:
        method: A name of :data:`obsdiff.criteria.METHODS`.
        refit: Least squares on what is kept; None takes the method's default.
        seed: For methods that draw.
        damping: Relative dampening of the Hessians.
        fusion: How joint attention ranks its heads over two streams.
        compared: Columns whose scores are compared jointly, a multiple of 32; None takes the method's own.
        refit_steps: Conjugate-gradient steps of the refit, at most; None takes as many as pay.
    """

    method: str = "obs"
    refit: bool | None = None
    seed: int = 0
    damping: float = DAMPING
    fusion: str = "reciprocal_rank"
    compared: int | None = None
    refit_steps: int | None = None

    @property
    def refits(self) -> bool:
        return METHODS[self.method].refit if self.refit is None else self.refit

    @property
    def needs(self) -> frozenset[str]:
        """What of a calibration."""
        return METHODS[self.method].needs | ({"gram"} if self.refits else set())

    @property
    def compensates(self) -> bool:
        """Whether what stays of heads and neurons is solved for."""
        return self.refits or METHODS[self.method].compensates


@dataclass(frozen=True)
class LayerResult:
    """What solving gives for one layer.

    Attributes:
        weight: The new weight, float32.
        mask: True = kept; None if the layer was shrunk.
        error: Output error over the variance of the dense output; None if nothing measured it.
        bias_shift: What the refit adds to the bias, float32 (rows,); None if it leaves it.
        refit_steps: Conjugate-gradient steps that were taken (of the groups of a convolution, the most); None without.
        basis: What the layer's input is projected with first, float32 (rank, inputs); held by the first layer of
            those that read it so (:func:`obsdiff.pruning.vectors.basis_of`).
    """

    weight: Tensor
    mask: Tensor | None
    error: float | None
    bias_shift: Tensor | None = None
    refit_steps: int | None = None
    basis: Tensor | None = None


def emptied(result: LayerResult) -> LayerResult:
    """The same layer without any weight, where nothing depends on it."""
    assert result.mask is not None
    return LayerResult(torch.zeros_like(result.weight), torch.zeros_like(result.mask), None)


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for each layer, independent of which others are pruned."""
    return zlib.crc32(f"{seed}/{name}".encode())


def known_inputs(statistics: Observer, layer: str, weight: Tensor, group: int = 0) -> Moments | Powers:
    """What is known of the inputs of a site's group.

    Raises:
        UserError: They are damaged, or of another layer.
    """
    groups, columns = statistics.power().shape
    if columns != weight.shape[-1] or group >= groups:
        raise UserError(
            f"the statistics of layer {layer} are of {columns} inputs, the layer has {weight.shape[-1]}; "
            "calibrate again"
        )
    try:
        if isinstance(statistics, Gram):
            return Moments(statistics, group)
        assert isinstance(statistics, Diagonal)
        return Powers(statistics, group)
    except UnusableStatistics as error:
        raise UserError(
            f"cannot solve layer {layer}: its statistics {error}; calibrate again (in float32 or bfloat16) "
            "or exclude it"
        ) from error
