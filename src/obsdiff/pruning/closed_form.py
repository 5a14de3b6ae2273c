"""The closed form of a reconstruction: the layers of a stage, one after the other, by least squares.

A layer W reads x̂, which everything pruned in front of it has changed, where the dense layer reads x and answers y. It
gets the weights and the bias that leave least of

    ``E‖y − V x̂ − b‖² + λ ‖V − W‖²``    (GPTAQ, 2504.02692: targets of the dense model, inputs of the pruned one)

among those that keep what was pruned at zero. With ``r = y − W x̂`` and C the covariance of x̂, that is
``W + E[r (x̂ − μ)ᵀ] (C + λ)⁻¹`` where every weight may change, and else what is nearest to it in the norm of ``C + λ``
on the weights that stay, by conjugate gradients. Without a bias, second moments take the place of C. Only r is summed
up beside them, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.replay import Reached
from obsdiff.obs.hessian import Gram, activation_matrices, weight_matrices
from obsdiff.obs.linalg import damped, inverse
from obsdiff.obs.refit import refit

RIDGE = 0.1  # λ over the mean of diag C: the calls are few; between 0.01 and 1 it changes little (docs/recovery.md)
STEPS, TOLERANCE = 100, 1e-7  # of conjugate gradients, at most; they end where one gains less than that share
ROWS = 8  # of a batch whose fields of a convolution are unrolled at once
Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a stage is called with


@dataclass(frozen=True)
class Stage:
    """One stage of a pruned denoiser, and the same of the dense one.

    Attributes:
        pruned, dense: The modules.
        sites: Names of the layers inside that read tokens, in the order of execution; those of one tensor together.
        masks: Bool by layer (True = kept), of weights that stay zero elsewhere.
        lost: By layer the outputs of the dense one (int64) that the pruned one has no more.
        still: Layers that nothing changes.
    """

    pruned: nn.Module
    dense: nn.Module
    sites: Sequence[Sequence[str]]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    lost: Mapping[str, Tensor] = field(default_factory=dict)
    still: Collection[str] = ()


@torch.no_grad()
def solve_again(stage: Stage, calls: Callable[[], Iterable[tuple[Given, Given]]]) -> int:
    """Rewrite the layers of a pruned stage in place; a convolution with groups stays as it is.

    Args:
        stage: What to rewrite, and what it is to be like.
        calls: Goes through what the pruned stage is given, and what the dense one is, on their device.

    Returns:
        How often each call was begun in both.
    """
    together = list(_together(stage))
    for names in together:
        layers = {name: stage.pruned.get_submodule(name) for name in names}
        sums = _Sums(layers)
        for given, dense in calls():
            mine, theirs = _seen(stage.pruned, names, given), _seen(stage.dense, names, dense)
            rest = {}
            for name in names:
                wanted = _rows(layers[name], theirs[name][1])
                if name in stage.lost:
                    stays = torch.ones(wanted.shape[1], dtype=torch.bool, device=wanted.device)
                    stays[stage.lost[name].to(wanted.device)] = False
                    wanted = wanted[:, stays]
                rest[name] = wanted - _rows(layers[name], mine[name][1])
            sums.add(layers[names[0]], mine[names[0]][0], rest)
        for name, layer in layers.items():
            sums.rewrite(name, layer, stage.masks.get(name))
    return len(together)


def _together(stage: Stage) -> Iterator[list[str]]:
    """Layers that read the same numbers: of a site, those behind the same basis."""
    for site in stage.sites:
        by_basis: dict[int | None, list[str]] = {}
        for name in site:
            layer = stage.pruned.get_submodule(name)
            if name not in stage.still and getattr(layer, "groups", 1) == 1:
                basis = getattr(layer, "projection", None)
                by_basis.setdefault(None if basis is None else id(basis[0]), []).append(name)
        yield from by_basis.values()


def _seen(stage: nn.Module, names: Sequence[str], given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer's weight is multiplied with, and what the layer answers; nothing runs after the last of them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], answer: Tensor) -> None:
        x, basis = args[0] if args else next(iter(kwargs.values())), getattr(layer, "projection", None)
        found[name] = x if basis is None else basis[0](x), answer.clone()
        if len(found) == len(names):
            raise Reached

    layers = [(name, stage.get_submodule(name)) for name in names]
    handles = [layer.register_forward_hook(partial(look, name), with_kwargs=True) for name, layer in layers]
    try:
        stage(*given[0], **given[1])
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rows(layer: nn.Module, answer: Tensor) -> Tensor:
    """A layer's answer, of a convolution (n, rows, height, width), as float32 (positions, rows)."""
    tokens = answer.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else answer
    return tokens.flatten(0, -2).float()


class _Sums:
    """Over calls: the moments of what layers read, and what is left to explain with it of the dense layers' answers."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        weights = {name: weight_matrices(layer)[0] for name, layer in layers.items()}
        first = next(iter(weights.values()))
        self._gram = Gram.empty(first.shape[1], device=first.device)
        self._centre: Tensor | None = None  # near the mean
        self._cross = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        self._rest = {name: weight.new_zeros(len(weight), dtype=torch.float32) for name, weight in weights.items()}
        self._inverted: dict[bool, tuple[Tensor, Tensor]] = {}  # with a bias and without: the moments, and an inverse

    def add(self, layer: nn.Module, x: Tensor, rest: Mapping[str, Tensor]) -> None:
        """What the layers, of which ``layer`` is one, read in a call, and by layer what its answers lack (positions,
        rows)."""
        start = 0
        for part in x.split(ROWS):
            seen = activation_matrices(layer, part)
            self._gram.add(seen, 1.0)
            u = seen[0].float()
            self._centre = u.mean(0) if self._centre is None else self._centre
            u = u - self._centre
            for name, lacking in rest.items():
                some = lacking[start : start + len(u)]
                self._cross[name].addmm_(some.T, u)
                self._rest[name] += some.sum(0)
            start += len(u)

    def rewrite(self, name: str, layer: nn.Module, mask: Tensor | None) -> None:
        """Give a layer its weights and bias."""
        assert self._centre is not None
        count, bias = self._gram.num_tokens, layer.bias
        biased = isinstance(bias, Tensor)
        mean, rest = self._gram.mean().float(), self._rest[name] / count
        about = mean - self._centre if biased else -self._centre
        weight = weight_matrices(layer)[0]
        old = weight.float().clone()
        seen = self._gram.variances() if biased else self._gram.power()
        if bool(seen.any()):  # else there is nothing but the mean
            if biased not in self._inverted:
                moments = self._gram.covariance() if biased else self._gram.hessian()
                inverted, damping = inverse(moments, RIDGE)
                self._inverted[biased] = damped(moments, damping), inverted
            moments, inverted = self._inverted[biased]
            new = old + (self._cross[name] / count - torch.outer(rest, about)) @ inverted
            if mask is not None:
                new = refit(old, new, mask.view(weight.shape).to(weight.device), moments, STEPS, TOLERANCE).weight
            weight.copy_(new)
        if isinstance(bias, Tensor):
            bias.copy_(bias.float() + rest - (weight.float() - old) @ mean)
