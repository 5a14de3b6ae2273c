"""Solving one site, or one set of groups: from dense weights and statistics to pruned weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from obsdiff.criteria import METHODS, Problem, Solution
from obsdiff.criteria.structured import choose_groups
from obsdiff.errors import UserError
from obsdiff.models.wiring import WiredGroups, Wiring
from obsdiff.obs.hessian import SiteStatistics, weight_matrices
from obsdiff.obs.linalg import DAMPING, SingularHessian, quadratic_error
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.obs.refit import STEPS, refit
from obsdiff.obs.structured import Consumer, compensate
from obsdiff.pruning.plan import kept_groups
from obsdiff.ranks import world_size

# A refit step costs 2 · rows products per entry of H, measuring cost one per token: spend at most this share of it, so
# that a small calibration is not followed by a long solve.
REFIT_SHARE = 0.09


@dataclass(frozen=True)
class SolveOptions:
    """How to solve.

    Attributes:
        method: A name of :data:`obsdiff.criteria.METHODS`.
        refit: Least squares on what is kept; None takes the method's default.
        seed: For methods that draw.
        damping: Relative dampening of the Hessians.
        fusion: How joint attention ranks its heads over two streams.
    """

    method: str = "obs"
    refit: bool | None = None
    seed: int = 0
    damping: float = DAMPING
    fusion: str = "reciprocal_rank"

    @property
    def refits(self) -> bool:
        return METHODS[self.method].refit if self.refit is None else self.refit


@dataclass(frozen=True)
class LayerResult:
    """What solving gives for one layer.

    Attributes:
        weight: The new weight, float32.
        mask: True = kept; None if the layer was shrunk.
        error: Relative output error; None if nothing measured it.
        bias_shift: What the refit adds to the bias, float32 (rows,); None if it leaves it.
    """

    weight: Tensor
    mask: Tensor | None
    error: float | None
    bias_shift: Tensor | None = None


def portable(results: dict[str, LayerResult]) -> dict[str, LayerResult]:
    """The results on the CPU where another process is to have them; otherwise where they are."""
    if world_size() == 1:
        return results

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return {
        name: LayerResult(r.weight.cpu(), moved(r.mask), r.error, moved(r.bias_shift)) for name, r in results.items()
    }


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for each layer, independent of which others are pruned."""
    return zlib.crc32(f"{seed}/{name}".encode())


class Moments:
    """What is known of a site's input x: its mean μ, ``H = E[x xᵀ]`` and H centred on the mean, ``C = H − μ μᵀ``.

    Only C is held; H is made when a method asks for it.
    """

    def __init__(self, statistics: SiteStatistics, group: int = 0) -> None:
        self.num_tokens = statistics.num_tokens
        self.mean = statistics.mean(group)
        self.centred = statistics.hessian(group).addr_(self.mean, self.mean, alpha=-1)

    @cached_property
    def hessian(self) -> Tensor:
        """H, float32 (columns, columns)."""
        return torch.addr(self.centred, self.mean, self.mean)

    def share(self, error: float, dense: Tensor) -> float:
        """An output error over the dense layer's weighted output power ``tr(W₀ H W₀ᵀ) = tr(W₀ C W₀ᵀ) + ‖W₀ μ‖²``."""
        power = quadratic_error(dense, self.centred) + float((dense @ self.mean).square().sum(dtype=torch.float64))
        return error / power if power > 0 else 0.0


@torch.no_grad()
def solve_site(
    wiring: Wiring,
    layers: Sequence[str],
    patterns: Sequence[Pattern],
    statistics: SiteStatistics | None,
    options: SolveOptions,
) -> dict[str, LayerResult]:
    """Prune the layers of one site together, on one Hessian (and one factor) per group of a convolution."""
    return dict(zip(layers, solve_layers(wiring, layers, patterns, statistics, options), strict=True))


@torch.no_grad()
def solve_layers(
    wiring: Wiring,
    layers: Sequence[str],
    patterns: Sequence[Pattern],
    statistics: SiteStatistics | None,
    options: SolveOptions,
) -> list[LayerResult]:
    """Like :func:`solve_site`, in a list: a layer may stand in ``layers`` several times, with different patterns."""
    method = METHODS[options.method]
    dense = [weight_matrices(wiring.layer(name)).detach().float() for name in layers]
    centred = options.refits and method.centred and all(wiring.layer(name).bias is not None for name in layers)
    found: list[list[LayerResult]] = [[] for _ in layers]
    for group in range(len(dense[0])):
        moments = None if statistics is None else Moments(statistics, group)
        weights = [matrix[group] for matrix in dense]
        seeds = [layer_seed(options.seed + group, name) for name in layers]
        hessian = None if moments is None else moments.centred if centred else moments.hessian
        try:
            solutions = method.solve(Problem(weights, patterns, hessian, options.damping, seeds))
        except SingularHessian as error:
            raise UserError(f"cannot solve layer {layers[0]}: {error}; raise --calibration.damping") from error
        for name, solution, old, parts in zip(layers, solutions, weights, found, strict=True):
            result = _finished(solution, old, moments, wiring.layer(name), options)
            if not bool(torch.isfinite(result.weight).all()):
                raise UserError(f"layer {name} came out non-finite; raise --calibration.damping")
            parts.append(result)
    return [_joined(wiring.weight(name).shape, parts) for name, parts in zip(layers, found, strict=True)]


def _finished(
    solution: Solution, dense: Tensor, moments: Moments | None, layer: nn.Module, options: SolveOptions
) -> LayerResult:
    """Refit if asked, and measure.

    A layer with a bias is refitted on centred inputs and its bias takes up the mean, ``δb = −Δ μ``: together that is
    the least squares over kept weights and bias.
    """
    hessian = _seen(moments, layer, options)
    if moments is None or hessian is None:
        return LayerResult(solution.weight, solution.mask, None)
    least = METHODS[options.method].refit_steps
    steps = max(least, min(STEPS, int(REFIT_SHARE * moments.num_tokens / (2 * len(dense)))))
    if not options.refits:
        error = quadratic_error(solution.weight - dense, moments.hessian)
        return LayerResult(solution.weight, solution.mask, moments.share(error, dense))
    new, error = refit(solution.weight, dense, solution.mask, hessian, steps)
    shift = None if layer.bias is None else (dense - new) @ moments.mean
    return LayerResult(new, solution.mask, moments.share(error, dense), shift)


def _joined(shape: torch.Size, parts: list[LayerResult]) -> LayerResult:
    """The groups of a convolution as one layer."""
    weight = torch.stack([part.weight for part in parts]).view(shape)
    mask = torch.stack([part.mask for part in parts if part.mask is not None]).view(shape)
    errors = [part.error for part in parts if part.error is not None]
    shifts = [part.bias_shift for part in parts if part.bias_shift is not None]
    error = sum(errors) / len(errors) if errors else None
    return LayerResult(weight, mask, error, torch.cat(shifts) if shifts else None)


@torch.no_grad()
def solve_groups(
    wiring: Wiring,
    groups: WiredGroups,
    pattern: Structured,
    statistics: dict[str, SiteStatistics] | None,
    options: SolveOptions,
) -> tuple[Tensor, dict[str, LayerResult]]:
    """Choose the heads or neurons to keep, and the consumers' weights on the kept channels.

    Args:
        statistics: By consumer layer.

    Returns:
        Bool (count,), True = kept; and the consumers' results.
    """
    moments = {name: Moments(site) for name, site in (statistics or {}).items()}
    consumers = [
        Consumer(wiring.weight(name).detach().float(), _seen(moments.get(name), wiring.layer(name), options))
        for name in groups.consumers
    ]
    rule = METHODS[options.method].structured
    assert rule is not None
    try:
        kept = choose_groups(
            rule,
            consumers,
            [wiring.weight(name).detach() for name in groups.producers],
            groups.count,
            groups.size,
            groups.count - kept_groups(groups, pattern),
            options.fusion,
            options.damping,
            layer_seed(options.seed, groups.name),
        )
        channels = kept.repeat_interleave(groups.size)
        results = {
            name: _cut(consumer, moments.get(name), channels, wiring.layer(name), options)
            for name, consumer in zip(groups.consumers, consumers, strict=True)
        }
    except (SingularHessian, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not in the stubs
        raise UserError(f"cannot solve {groups.name}: {error}; raise --calibration.damping") from error
    return kept, results


def _seen(moments: Moments | None, layer: nn.Module, options: SolveOptions) -> Tensor | None:
    """What the least squares of one layer go by: centred inputs if its bias may take up the mean."""
    if moments is None:
        return None
    return moments.centred if options.refits and layer.bias is not None else moments.hessian


def _cut(
    consumer: Consumer, moments: Moments | None, channels: Tensor, layer: nn.Module, options: SolveOptions
) -> LayerResult:
    """A consumer's weight on the kept channels, and its bias, by least squares if asked."""
    dense, hessian = consumer.weight, consumer.hessian
    if moments is None or hessian is None:
        return LayerResult(dense[:, channels], None, None)
    new = compensate(dense, hessian, channels, options.damping) if options.refits else dense[:, channels]
    delta = -dense
    delta[:, channels] += new
    shift = -delta @ moments.mean if options.refits and layer.bias is not None else None
    return LayerResult(new, None, moments.share(quadratic_error(delta, hessian), dense), shift)
