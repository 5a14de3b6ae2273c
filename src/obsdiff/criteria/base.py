"""What every method gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from obsdiff.obs.pattern import KINDS, Pattern
from obsdiff.obs.refit import STEPS
from obsdiff.obs.structured import Consumer
from obsdiff.obs.sweep import BLOCK


@dataclass(frozen=True)
class Problem:
    """The layers of one site, solved together.

    Attributes:
        weights: Dense weights, float32 (rows_k, columns) each; never changed.
        patterns: Unstructured or N:M, one per layer.
        hessian: H of the common input (or C, see :class:`Method`), float32 (columns, columns); None if nothing was
            measured.
        damping: Relative dampening of H.
        seeds: One per layer, for methods that draw.
        power: diag H, float32 (columns,), where it was measured alone.
        mean, variance: Of the input's columns, (columns,), where anything was measured.
        gradients: Of a loss at the dense weights, float32 like ``weights``, where they were asked for.
        compared: Columns whose scores are compared jointly, for methods that sweep.
    """

    weights: Sequence[Tensor]
    patterns: Sequence[Pattern]
    hessian: Tensor | None
    damping: float
    seeds: Sequence[int]
    power: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    gradients: Sequence[Tensor] | None = None
    compared: int = BLOCK

    @property
    def measured(self) -> Tensor:
        """H, for methods that need it."""
        if self.hessian is None:
            raise ValueError("this method needs the statistics of a calibration")
        return self.hessian

    @property
    def powers(self) -> Tensor:
        """diag H, for methods that need no more."""
        return self.measured.diagonal() if self.power is None else self.power

    @property
    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column of the input, for methods that need them."""
        if self.mean is None or self.variance is None:
            raise ValueError("this method needs the statistics of a calibration")
        return self.mean, self.variance

    @property
    def slopes(self) -> Sequence[Tensor]:
        """The gradients, for methods that need them."""
        if self.gradients is None:
            raise ValueError("this method needs the gradients of a loss")
        return self.gradients


@dataclass(frozen=True)
class GroupProblem:
    """Units (heads, neurons, channel groups) of which some have to go.

    Attributes:
        consumers: Layers whose input columns would go; with Hessians for rules that need statistics.
        producers: Weights whose output rows would go, unit by unit: (slabs, count, rows, columns).
        count: Units.
        size: Columns per unit in the consumers (head_dim, or 1).
        remove: How many units go.
        fusion: How the errors in several consumers become one score, see :func:`obsdiff.obs.structured.fuse`.
        damping: Relative dampening of the Hessians.
        seed: For rules that draw.
        gradients: Of a loss by the producers' weights, float32 and laid out like ``producers``, where they were asked
            for; those by the consumers' weights are with the consumers.
        gates: λ of each unit, float32 (count,), where gates were learned.
    """

    consumers: Sequence[Consumer]
    producers: Sequence[Tensor]
    count: int
    size: int
    remove: int
    fusion: str
    damping: float
    seed: int
    gradients: Sequence[Tensor] | None = None
    gates: Tensor | None = None

    @property
    def slopes(self) -> Sequence[Tensor]:
        """The gradients by the producers' weights, for rules that need them."""
        if self.gradients is None:
            raise ValueError("this rule needs the gradients of a loss")
        return self.gradients

    @property
    def openness(self) -> Tensor:
        """The gates, for rules that need them."""
        if self.gates is None:
            raise ValueError("this rule needs learned gates")
        return self.gates


@dataclass(frozen=True)
class Solution:
    """One pruned layer: ``weight`` float32 with exact zeros where ``mask`` (True = kept) is False."""

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Method:
    """What the driver may ask about a method.

    Attributes:
        solve: Prunes the layers of one site; None: it removes whole units only.
        refit: Whether least squares on the kept weights follows by default.
        refit_steps: Conjugate-gradient steps it needs at least; fewer where the start is already compensated.
        needs: What it needs of a calibration, "gram" or "diagonal" of H (with either of which come the
            inputs' means) and of :data:`obsdiff.obs.observers.PASSES`; none: it goes by the weights alone.
        structured: How it chooses heads and neurons, a name of :data:`obsdiff.criteria.structured.RULES`; None: it
            cannot.
        compensates: Whether what stays of heads and neurons is solved for even without a refit.
        weighting: Timestep weights it asks of a calibration made for it.
        centred: Whether it selects on centred inputs where the refit lets the biases take up the mean.
        allocation: How sparsity is shared out among layers by default: baselines are published with uniform ratios.
        packages: Calibration passes by default, where it can be calibrated anew.
        multiple_of: Kept FFN widths of a uniform plan are multiples of this by default; None: what is fast.
        cuts: Kinds of units that ``structured:RATIO`` removes; others go where the pattern names them.
        compared: Columns whose scores it compares jointly by default; None: it does not sweep.
    """

    solve: Callable[[Problem], list[Solution]] | None
    refit: bool = False
    refit_steps: int = STEPS
    needs: frozenset[str] = frozenset({"gram"})
    structured: str | None = None
    compensates: bool = False
    weighting: str = "log_decrease"
    centred: bool = False
    allocation: str = "uniform"
    packages: int = 1
    multiple_of: int | None = None
    cuts: Sequence[str] = KINDS
    compared: int | None = None
