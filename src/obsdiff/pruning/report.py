"""What a prune did, in values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from obsdiff.obs.pattern import Request
from obsdiff.obs.select import count_nonzero
from obsdiff.pruning.masks import Masks
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.surgery import measured_sparsity
from obsdiff.spill import in_turn


@dataclass
class PruneReport:
    """What a prune did, in values.

    Attributes:
        pattern, method, refit, seed: What was asked for.
        plan: Pattern by layer, or by attention and feed-forward module.
        masks: Bool by layer (True = kept) for unstructured and N:M; by module over heads or neurons for structured.
            Each is unpacked anew when it is read, so changing what was read changes nothing here.
        sparsity: Share of the pruned layers' weights that is zero, or of the denoiser's parameters that is gone:
            measured on the weights as they are.
        sparsity_per_layer: Share of zeros by layer, or share of heads or neurons removed by module.
        parameters: Of the denoiser: "dense", "pruned" (what is left), "nonzero".
        layer_error: Relative weighted output error by layer; empty if nothing was measured.
        refit_steps: Conjugate-gradient steps of the refit by layer; empty without one (what stays of heads and neurons
            is solved for in closed form).
        time_s: Seconds: "calibrate", "forward_only", "allocate", "solve", "reconstruct", "total".
        fingerprint: Of the statistics (with several packages, of the first ones), or None.
        shrunk: New shapes, or None.
        packages: Calibration passes; or
        streamed: one, stage by stage (:mod:`obsdiff.pruning.stream`).
        weighing_calls: Denoiser calls with one prompt each that measuring timestep weights took.
        model: Hash of the dense denoiser.
        allocation: How an allocated plan came about (:class:`obsdiff.allocation.allocate.Allocation`), or None.
        notes: For people: what cannot be done to this denoiser, where the calibration was another than the method asks
            for, and what it could not tell.
        ranks: By vector, or tokens, what its rank leaves out (:func:`obsdiff.pruning.vectors.checked_rank`).
        reconstruction: What was done stage by stage after that (:mod:`obsdiff.pruning.reconstruct`), or None.
        dead: Layers that reach no output of the denoiser, as far as they were looked for, and what became of them:
            "left", "zero" or "cut".
        depth: Which stages went (:func:`obsdiff.pruning.shorten.depth_record`), and what that did to the denoiser's
            output as far as it was measured; None: none.
    """

    pattern: Request
    method: str
    refit: bool
    seed: int
    plan: Plan
    masks: Masks = field(default_factory=Masks)
    sparsity: float = 0.0
    sparsity_per_layer: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    layer_error: dict[str, float] = field(default_factory=dict)
    refit_steps: dict[str, int] = field(default_factory=dict)
    time_s: dict[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] | None = None
    shrunk: Mapping[str, Any] | None = None
    packages: int = 1
    streamed: bool = False
    weighing_calls: int = 0
    model: str | None = None
    allocation: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    dead: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, dict[str, Any]] = field(default_factory=dict)
    depth: dict[str, Any] | None = None
    reconstruction: Mapping[str, Any] | None = None

    def put_last(self, names: Sequence[str]) -> None:
        """Let what is said of single layers end with these, in this order."""
        for name in (name for name in names if name in self.masks):
            self.masks.move_to_end(name)
            for figures in (self.sparsity_per_layer, self.layer_error, self.refit_steps):
                if name in figures:
                    figures[name] = figures.pop(name)  # type: ignore[assignment]  # of its own kind

    @property
    def mean_layer_error(self) -> float | None:
        """Mean of :attr:`layer_error`, or None."""
        return sum(self.layer_error.values()) / len(self.layer_error) if self.layer_error else None


def count_parameters(denoiser: nn.Module, report: PruneReport) -> None:
    """Fill in what is left of a denoiser: its parameters, and what the plan's layers came to."""
    parameters = list(denoiser.parameters())
    report.parameters["pruned"] = sum(p.numel() for p in parameters)
    report.parameters["nonzero"] = sum(map(count_nonzero, in_turn(parameters)))
    if report.plan.entries:
        report.sparsity = measured_sparsity(denoiser, report.plan.entries, report.parameters)
