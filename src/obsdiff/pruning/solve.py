"""Solving one site, or one set of groups: from dense weights and statistics to pruned weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from obsdiff.criteria import METHODS, GroupProblem, Problem, Solution
from obsdiff.criteria.structured import choose_groups
from obsdiff.errors import UserError
from obsdiff.models.graph import Graph, Group, Slices
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.linalg import SingularHessian, all_finite
from obsdiff.obs.moments import Moments, Powers, relative_error
from obsdiff.obs.observers import PASSES, Observer
from obsdiff.obs.pattern import Pattern, Structured
from obsdiff.obs.refit import STEPS, refit
from obsdiff.obs.structured import Consumer, compensate
from obsdiff.pruning.layers import LayerResult, SolveOptions, known_inputs, layer_seed
from obsdiff.pruning.plan import kept_units
from obsdiff.pruning.vectors import rank_result, vector_of

# A refit step costs 2 · rows products per entry of H, measuring cost one per token: spend at most this share of it, so
# that a small calibration is not followed by a long solve.
REFIT_SHARE = 0.09


@torch.no_grad()
def solve_site(
    graph: Graph,
    layers: Sequence[str],
    patterns: Sequence[Pattern],
    statistics: Observer | None,
    options: SolveOptions,
    slopes: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerResult]:
    """Prune the layers of one site together, on one Hessian (and one factor) per group of a convolution.

    Args:
        graph: Of the denoiser as it is.
        layers, patterns: Of the site, one pattern each.
        statistics: Of the site, if anything was measured.
        options: How.
        slopes: Gradients of a loss by layer, for methods that need them.
    """
    return dict(zip(layers, solve_layers(graph, layers, patterns, statistics, options, slopes), strict=True))


@torch.no_grad()
def solve_layers(
    graph: Graph,
    layers: Sequence[str],
    patterns: Sequence[Pattern],
    statistics: Observer | None,
    options: SolveOptions,
    slopes: Mapping[str, Tensor] | None = None,
) -> list[LayerResult]:
    """Like :func:`solve_site`, in a list: a layer may stand in ``layers`` several times, with different patterns."""
    method = METHODS[options.method]
    assert method.solve is not None, f"{options.method} removes whole units"
    device = graph.weight(layers[0]).device  # of an offloaded model, layers of later blocks rest elsewhere
    dense = [weight_matrices(graph.layer(name)).detach().to(device).float() for name in layers]
    biases = [_biases(graph.layer(name), matrix) for name, matrix in zip(layers, dense, strict=True)]
    gradients = _slopes(slopes, layers, dense)
    centred = options.refits and method.centred and all(bias is not None for bias in biases)
    found: list[list[_Part]] = [[] for _ in layers]
    for group in range(len(dense[0])):
        known = None if statistics is None else known_inputs(statistics, layers[0], dense[0], group)
        moments = known if isinstance(known, Moments) else None
        weights = [matrix[group] for matrix in dense]
        seeds = [layer_seed(options.seed + group, name) for name in layers]
        hessian = moments.seen(centred) if moments is not None and method.needs - PASSES else None
        problem = Problem(weights, patterns, hessian, options.damping, seeds)
        if known is not None:
            power = known.power if isinstance(known, Powers) else None
            problem = replace(problem, power=power, mean=known.mean, variance=known.variance)
        if stretch := options.compared or method.compared:
            problem = replace(problem, compared=stretch)
        if gradients is not None:
            problem = replace(problem, gradients=[gradient[group] for gradient in gradients])
        try:
            solutions = method.solve(problem)
        except SingularHessian as error:
            raise UserError(f"cannot solve layer {layers[0]}: {error}; raise --calibration.damping") from error
        for name, solution, old, bias, parts in zip(layers, solutions, weights, biases, found, strict=True):
            own = None if bias is None else bias[group]
            part = _finished(solution, old, own, moments, graph.weight(name).dtype, options)
            if not all_finite(part.weight) or not math.isfinite(part.error or 0.0):
                kind = str(graph.weight(name).dtype).removeprefix("torch.")
                hint = ", or use bfloat16 or float32" if kind == "float16" else ""
                raise UserError(f"layer {name} came out non-finite in {kind}; raise --calibration.damping{hint}")
            parts.append(part)
    return [_joined(graph.weight(name).shape, parts) for name, parts in zip(layers, found, strict=True)]


def _slopes(slopes: Mapping[str, Tensor] | None, layers: Sequence[str], dense: Sequence[Tensor]) -> list[Tensor] | None:
    """Gradients laid out like the weights (groups, rows, columns) of ``dense``."""
    if slopes is None:
        return None
    if missing := [name for name in layers if name not in slopes]:
        raise UserError(f"there is no gradient of {missing[0]}; calibrate again with the layers you want to prune")
    return [slopes[name].view(weight.shape).to(weight) for name, weight in zip(layers, dense, strict=True)]


@dataclass(frozen=True)
class _Part:
    """One group of a layer: what is written, its output error, the dense output's variance and squared mean, and the
    steps of its refit."""

    weight: Tensor
    mask: Tensor | None
    error: float | None = None
    output: tuple[float, float] = (0.0, 0.0)
    bias_shift: Tensor | None = None
    refit_steps: int | None = None


def _biases(layer: nn.Module, matrices: Tensor) -> Tensor | None:
    """A layer's bias, (groups, rows), where its weight's ``matrices`` (groups, rows, columns) are."""
    bias = layer.bias
    return bias.detach().to(matrices.device).view(len(matrices), -1) if isinstance(bias, Tensor) else None


def _finished(
    solution: Solution,
    dense: Tensor,
    bias: Tensor | None,
    moments: Moments | None,
    dtype: torch.dtype,
    options: SolveOptions,
) -> _Part:
    """Refit if asked, round to the layer's ``dtype``, and measure what will be written.

    A layer with a bias is refitted on centred inputs and its bias takes up the mean, ``δb = −Δ μ``: together that is
    the least squares over kept weights and bias.
    """
    if moments is None:
        return _Part(solution.weight, solution.mask)
    if not options.refits:
        return _measured(solution.weight, solution.mask, dense, None, moments, dtype)
    least = METHODS[options.method].refit_steps
    pays = max(least, min(STEPS, int(REFIT_SHARE * moments.num_tokens / (2 * len(dense)))))
    steps = pays if options.refit_steps is None else options.refit_steps
    hessian = moments.seen(bias is not None)
    found = refit(solution.weight, dense, solution.mask, hessian, steps)
    spread = found.error if hessian is moments.centred else None
    part = _measured(found.weight, solution.mask, dense, bias, moments, dtype, spread)
    return replace(part, refit_steps=found.steps)


def _measured(
    new: Tensor,
    mask: Tensor | None,
    dense: Tensor,
    bias: Tensor | None,
    moments: Moments,
    dtype: torch.dtype,
    spread: float | None = None,
) -> _Part:
    """A new weight as ``dtype`` holds it, what ``bias`` (None: nothing) takes up, and the error of both.

    Args:
        spread: ``tr(Δ C Δᵀ)`` of ``new``, if it is known.
    """
    if dtype != torch.float32:
        new, spread = new.to(dtype).float(), None  # the bias takes up what rounding does to the mean as well
    delta = new - dense
    moved, shift = moments.through(delta), None  # E‖Δ x + δb‖² = tr(Δ C Δᵀ) + ‖Δ μ + δb‖²: H is never formed
    if bias is not None:
        shift = -moved.float()
        held = (bias.float() + shift).to(bias.dtype).to(moved.dtype) - bias.to(moved.dtype)
        moved = moved + held
    spread = moments.spread(delta) if spread is None else spread
    return _Part(new, mask, spread + float(moved.square().sum()), moments.output(dense), shift)


def _joined(shape: torch.Size, parts: list[_Part]) -> LayerResult:
    """The groups of a convolution as one layer."""
    weight = _stacked([part.weight for part in parts]).view(shape)
    mask = _stacked([part.mask for part in parts if part.mask is not None]).view(shape)
    shifts = [part.bias_shift for part in parts if part.bias_shift is not None]
    steps = [part.refit_steps for part in parts if part.refit_steps is not None]
    shift = torch.cat(shifts) if shifts else None
    return LayerResult(weight, mask, _relative(parts), shift, max(steps, default=None))


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _relative(parts: Sequence[_Part]) -> float | None:
    errors = [part.error for part in parts if part.error is not None]
    if not errors:
        return None
    return relative_error(sum(errors), sum(part.output[0] for part in parts), sum(part.output[1] for part in parts))


@torch.no_grad()
def solve_groups(
    graph: Graph,
    bundle: Mapping[str, Structured],
    statistics: Mapping[str, Observer] | None,
    options: SolveOptions,
    slopes: Mapping[str, Tensor] | None = None,
    gates: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, LayerResult]]:
    """Choose the units to keep, and the consumers' weights on the kept channels.

    Args:
        graph: Of the denoiser as it is.
        bundle: Pattern by group; groups that share a layer are cut in one go, and the layer's weights on what all of
            them leave are solved together.
        statistics: By consumer layer.
        options: How.
        slopes: Gradients of a loss by layer, for methods that need them.
        gates: Of the units by group, for methods that need them.

    Returns:
        Bool (count,) by group, True = kept; and the consumers' results.
    """
    groups = [graph.group_of[name] for name in bundle]
    if groups[0].basis is not None:
        [group], [pattern] = groups, bundle.values()
        if statistics is None:
            raise UserError(f"a rank of {group.name} needs statistics; calibrate")
        site = next(iter(statistics.values()))
        return rank_result(graph, group, kept_units(group, pattern), vector_of(graph, group, site))
    layers = list(dict.fromkeys(s.layer for group in groups for s in group.consumers))
    dense = {name: weight_matrices(graph.layer(name))[0].detach().float() for name in layers}
    read: dict[int, Moments | Powers] = {}  # of each site once: then it may be gone
    known = {}
    for name, site in (statistics or {}).items():
        if id(site) not in read:
            read[id(site)] = known_inputs(site, name, dense[name])
        known[name] = read[id(site)]
    moments = {name: found for name, found in known.items() if isinstance(found, Moments)}
    seen = {name: _seen(moments.get(name), graph.layer(name), options) for name in layers}
    try:
        kept = {
            group.name: _choose(
                graph, group, kept_units(group, bundle[group.name]), dense, seen, options, slopes, gates
            )
            for group in groups
        }
        results = {}
        for name in layers:
            stays = kept_columns(graph, name, kept)
            results[name] = _cut(dense[name], seen[name], moments.get(name), stays, graph.layer(name), options)
    except (SingularHessian, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not in the stubs
        raise UserError(f"cannot solve {groups[0].name}: {error}; raise --calibration.damping") from error
    return kept, results


def kept_columns(graph: Graph, layer: str, kept: Mapping[str, Tensor], inputs: int | None = None) -> Tensor:
    """Bool (inputs,): the inputs of a consumer that stay where groups keep the units in ``kept``.

    Args:
        graph: Of the dense denoiser.
        layer: The consumer.
        kept: Bool (count,) by group.
        inputs: What the dense layer reads; None: the layer is dense still.
    """
    weight = graph.weight(layer)
    stays = torch.ones(inputs or weight.shape[1], dtype=torch.bool, device=weight.device)
    for name, units in kept.items():
        for s in graph.group_of[name].consumers:
            if s.layer == layer:
                stays[s.entries(~units.to(weight.device))] = False
    return stays


def _choose(
    graph: Graph,
    group: Group,
    stay: int,
    dense: Mapping[str, Tensor],
    seen: Mapping[str, Tensor | None],
    options: SolveOptions,
    slopes: Mapping[str, Tensor] | None,
    gates: Mapping[str, Tensor] | None,
) -> Tensor:
    """Bool (count,): the units of a group that stay, by the method's rule."""
    rule = METHODS[options.method].structured
    assert rule is not None
    everything = torch.ones(group.count, dtype=torch.bool)
    consumers, sizes = [], set()
    for s in group.consumers:
        columns = unfolded(s.entries(everything), graph.layer(s.layer))
        slope = _slopes(slopes, [s.layer], [dense[s.layer]])
        consumers.append(_units_first(dense[s.layer], seen[s.layer], columns, None if slope is None else slope[0]))
        sizes.add(len(columns) // group.count)

    def of_units(s: Slices, tensor: Tensor) -> Tensor:
        return tensor.flatten(1)[s.entries(everything)].view(len(s.starts), group.count, s.size, -1)

    read = _read_weight if slopes is None else Graph.weight  # gradients are of weights as they are
    own = [read(graph, s.layer).detach() for s in group.producers]
    found = _slopes(slopes, [s.layer for s in group.producers], own)
    gradients = None if found is None else [of_units(s, g) for s, g in zip(group.producers, found, strict=True)]
    assert len(sizes) == 1, f"{group.name} has units of {sizes} channels"
    return choose_groups(
        rule,
        GroupProblem(
            consumers,
            [of_units(s, weight) for s, weight in zip(group.producers, own, strict=True)],
            group.count,
            sizes.pop(),
            group.count - stay,
            options.fusion,
            options.damping,
            layer_seed(options.seed, group.name),
            gradients,
            _gates(gates, group),
        ),
    )


def _read_weight(graph: Graph, name: str) -> Tensor:
    """A layer's weight on what it reads, whatever directions of that it sees."""
    basis = getattr(graph.layer(name), "projection", None)
    return graph.weight(name) if basis is None else graph.weight(name) @ basis[0].weight


def _gates(gates: Mapping[str, Tensor] | None, group: Group) -> Tensor | None:
    if gates is None:
        return None
    if group.name not in gates:
        raise UserError(f"there are no gates of {group.name}; calibrate again with the modules you want to prune")
    return gates[group.name]


def _units_first(weight: Tensor, hessian: Tensor | None, columns: Tensor, gradient: Tensor | None) -> Consumer:
    """A consumer with the units' ``columns`` in front."""
    width = weight.shape[1]
    if torch.equal(columns, torch.arange(width)):
        return Consumer(weight, hessian, gradient=gradient)
    others = torch.ones(width, dtype=torch.bool)
    others[columns] = False
    order = torch.cat([columns, others.nonzero().flatten()]).to(weight.device)
    return Consumer(
        weight[:, order],
        None if hessian is None else hessian[:, order][order],
        int(others.sum()),
        None if gradient is None else gradient[:, order],
    )


def unfolded(channels: Tensor, layer: nn.Module) -> Tensor:
    """Columns of a layer's weight as a matrix that belong to input channels: of a convolution, one for each place of
    its kernel."""
    places = math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1
    return (channels[:, None] * places + torch.arange(places)).flatten()


def _seen(moments: Moments | None, layer: nn.Module, options: SolveOptions) -> Tensor | None:
    """What the least squares of one layer go by: centred inputs if its bias may take up the mean."""
    return None if moments is None else moments.seen(options.refits and layer.bias is not None)


def _cut(
    dense: Tensor,
    hessian: Tensor | None,
    moments: Moments | None,
    channels: Tensor,
    layer: nn.Module,
    options: SolveOptions,
) -> LayerResult:
    """A consumer's weight on the kept channels (bool), in its own shape, and its bias, by least squares if asked."""
    columns = torch.zeros(dense.shape[1], dtype=torch.bool, device=dense.device)
    columns[unfolded(channels.nonzero().flatten().cpu(), layer).to(dense.device)] = True
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = (len(dense), int(channels.sum()), *weight.shape[2:])
    if moments is None or hessian is None:
        return LayerResult(dense[:, columns].view(shape), None, None)
    new = torch.zeros_like(dense)
    solved = options.compensates
    new[:, columns] = compensate(dense, hessian, columns, options.damping) if solved else dense[:, columns]
    biases = _biases(layer, dense[None]) if options.refits else None
    part = _measured(new, None, dense, None if biases is None else biases[0], moments, weight.dtype)
    return LayerResult(part.weight[:, columns].view(shape), None, _relative([part]), part.bias_shift)
