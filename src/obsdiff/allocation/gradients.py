"""Output errors of many weight changes from one backward pass.

To first order a change ``ΔW`` moves the output of call c by ``J_c ΔW``. For a vector r of independent random signs
``E ⟨r, J_c ΔW⟩² = ‖J_c ΔW‖²`` (Hutchinson 1989), and ``⟨r, J_c ΔW⟩ = ⟨G_c, ΔW⟩`` with the gradient ``G_c`` of
``⟨r, output_c⟩`` by W: one backward pass serves every layer and every change of it (the Gauss-Newton form of the
squared error, its Jacobians never formed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.allocation.candidates import Candidate
from obsdiff.allocation.restart import Restart
from obsdiff.models.graph import Graph
from obsdiff.obs.hessian import activation_matrices
from obsdiff.ranks import keyed_generator

LARGEST = 2**24  # entries of the gradients that are held at a time


class NotDifferentiable(Exception):
    """Why gradients do not tell the errors of these layers; for people."""


def predicted_errors(
    restart: Restart, units: Mapping[str, Sequence[Candidate]], vectors: int, seed: int = 0
) -> dict[str, list[float]]:
    """First-order output errors of candidates, each alone, in the measure of :meth:`Restart.error`.

    Args:
        restart: The dense denoiser from a stage on that is not behind any of these layers.
        units: By name, the candidates of a unit: changes of the same layers.
        vectors: Random vectors per call.
        seed: Of the vectors.

    Returns:
        ``Σ_c α_c ⟨G_c, ΔW⟩² / Σ_c α_c ‖dense_c‖²`` of each candidate, the mean over the vectors.

    Raises:
        NotDifferentiable: The output has no gradient, or one that does not tell the calls apart.
    """
    dtypes = {restart.graph.weight(layer).dtype for of_unit in units.values() for layer in of_unit[0].layers}
    if torch.float16 in dtypes:
        raise NotDifferentiable("gradients vanish or overflow in float16")
    try:
        totals = _squares(restart, units, vectors, seed)
    except torch.OutOfMemoryError:
        raise NotDifferentiable("a backward pass does not fit into the device's memory") from None
    restart.stages_run += vectors * (len(restart.graph.stages) - restart.first)
    errors = {name: (total / restart.power).tolist() for name, total in totals.items()}
    if not all(math.isfinite(error) for of_unit in errors.values() for error in of_unit):
        raise NotDifferentiable("the gradients are not finite")
    return errors


def _squares(restart: Restart, units: Mapping[str, Sequence[Candidate]], vectors: int, seed: int) -> dict[str, Tensor]:
    """``Σ_c α_c ⟨G_c, ΔW⟩²``, float64 (candidates,) by unit."""
    totals = {name: torch.zeros(len(of_unit), dtype=torch.float64) for name, of_unit in units.items()}
    with _taps(restart.graph, _by_layer(restart.graph, units)) as taps, torch.enable_grad():
        for batch, (output, weights) in enumerate(restart.outputs()):
            if not output.requires_grad:
                raise NotDifferentiable("the denoiser's output has no gradient")
            taps.calls = len(weights)
            if batch == 0:
                taps.check(output)
            scale = weights.sqrt().to(output.device).view(-1, *[1] * (output.dim() - 1))
            for number in range(vectors):
                signs = torch.randint(0, 2, output.shape, generator=keyed_generator(seed, batch, number)) * 2 - 1
                for name, products in taps.pull(output, signs.to(scale) * scale, number < vectors - 1).items():
                    totals[name] += products.square().sum(1) / vectors
    return totals


@dataclass(frozen=True)
class _Change:
    """What candidates of one unit change in a layer: float32 (groups, entries of a group, candidates), and of the bias
    (rows, candidates)."""

    unit: str
    weights: Tensor
    biases: Tensor | None


def _by_layer(graph: Graph, units: Mapping[str, Sequence[Candidate]]) -> dict[str, list[_Change]]:
    found: dict[str, list[_Change]] = {}
    for unit, candidates in units.items():
        for layer in dict.fromkeys(name for candidate in candidates for name in candidate.layers):
            dense = graph.weight(layer).detach().float()
            module = graph.layer(layer)
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            changes = [candidate.layers.get(layer, (dense, None)) for candidate in candidates]
            weights = torch.stack([weight.float() - dense for weight, _ in changes], dim=-1)
            shifts = [dense.new_zeros(len(dense)) if shift is None else shift.float() for _, shift in changes]
            biased = any(shift is not None for _, shift in changes)
            found.setdefault(layer, []).append(
                _Change(
                    unit, weights.view(groups, -1, len(candidates)), torch.stack(shifts, dim=-1) if biased else None
                )
            )
    return found


class _Tap(torch.autograd.Function):
    """The identity, which hands its gradient to ``see``; the anchor gives it one where nothing else does."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, see: Any) -> Tensor:
        ctx.see = see
        return output.clone()  # whoever changes it in place changes no other tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [gradient] = gradients
        ctx.see(gradient.detach())
        return gradient.new_zeros(()), gradient, None


@dataclass
class _Taps:
    """The inputs of layers in the latest call, and what a backward pass makes of their output gradients.

    Attributes:
        layers: The changes of each layer.
        anchor: What every tapped output depends on.
        calls: Triples of the denoiser call.
        sums: By unit (candidates, calls) float64: ⟨G_c, ΔW⟩ of the backward pass that runs.
        checking: Whether that pass only looks whether calls can be told apart.
    """

    layers: Mapping[str, Sequence[_Change]]
    anchor: Tensor
    calls: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    checking: bool = False
    mixed: list[str] = field(default_factory=list)

    def see_call(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A layer has answered: let its gradient be seen."""
        x = inputs[0].detach()
        version = x._version

        def see(gradient: Tensor) -> None:
            if x._version != version:
                raise NotDifferentiable(f"the input of {name} is changed in place")
            self._see(name, module, x, gradient)

        return _Tap.apply(self.anchor, output, see)

    def pull(self, output: Tensor, signs: Tensor, again: bool) -> dict[str, Tensor]:
        """One backward pass from ``⟨signs, output⟩``; ``again``: another follows."""
        self.sums = {}
        torch.autograd.grad((signs * output).sum(), [self.anchor], retain_graph=again, allow_unused=True)
        return self.sums

    def check(self, output: Tensor) -> None:
        """Let the first call's output alone have a gradient, and see that no layer has one in other calls' rows.

        Raises:
            NotDifferentiable: Some has.
        """
        first = torch.zeros_like(output)
        first[0] = 1
        self.checking = True
        self.pull(output, first, True)
        self.checking = False
        if self.mixed:
            raise NotDifferentiable(f"{self.mixed[0]} does not keep the rows of its calls apart")

    def _see(self, name: str, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        if self.checking:
            whole = len(gradient) % self.calls == 0
            if not whole or bool(gradient[len(gradient) // self.calls :].any()):
                self.mixed.append(name)
            return
        inputs, outputs = activation_matrices(module, x).float(), _output_matrices(module, gradient).float()
        inputs, outputs = (of.unflatten(1, (self.calls, -1)) for of in (inputs, outputs))
        for change in self.layers[name]:
            found = _products(inputs, outputs, change)
            self.sums[change.unit] = self.sums[change.unit] + found if change.unit in self.sums else found


def _products(inputs: Tensor, outputs: Tensor, change: _Change) -> Tensor:
    """``⟨G_c, ΔW⟩ + ⟨g_c, Δb⟩``, float64 (candidates, calls), from (groups, calls, positions, columns or rows)."""
    part = max(1, LARGEST // change.weights[..., 0].numel())
    found = []
    for x, y in zip(inputs.split(part, 1), outputs.split(part, 1), strict=True):
        found.append(((y.mT @ x).flatten(2) @ change.weights).sum(0))
    total = torch.cat(found)
    if change.biases is not None:
        total = total + outputs.sum(2).transpose(0, 1).flatten(1) @ change.biases
    return total.T.double().cpu()


def _output_matrices(module: nn.Module, gradient: Tensor) -> Tensor:
    """(groups, positions, rows of a group), positions in the order of ``activation_matrices``."""
    if isinstance(module, nn.Conv2d):
        n, _, *_ = gradient.shape
        grouped = gradient.reshape(n, module.groups, -1, gradient.shape[-2] * gradient.shape[-1])
        return grouped.permute(1, 0, 3, 2).flatten(1, 2)
    return gradient.reshape(1, -1, gradient.shape[-1])


@contextmanager
def _taps(graph: Graph, layers: Mapping[str, Sequence[_Change]]) -> Iterator[_Taps]:
    """Taps behind all ``layers``, gone afterwards."""
    anchor = torch.zeros((), requires_grad=True, device=next(graph.denoiser.parameters()).device)
    taps = _Taps(layers, anchor)
    handles = [graph.layer(name).register_forward_hook(partial(taps.see_call, name), prepend=True) for name in layers]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
