"""Solving the rank of an input, a vector per sample or tokens: the directions that the layers which read it keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.graph import Graph, Group
from obsdiff.obs.hessian import Gram
from obsdiff.obs.lowrank import Directions, directions
from obsdiff.obs.moments import Moments, relative_error
from obsdiff.obs.observers import Observer
from obsdiff.pruning.layers import LayerResult, known_inputs


@dataclass(frozen=True)
class Vector:
    """What is known of a vector, or of tokens, that a group's layers read.

    Attributes:
        moments: Its mean and covariance.
        directions: The most important first.
        biased: Whether every layer has a bias, which takes up what the mean loses.
    """

    moments: Moments
    directions: Directions
    biased: bool


@torch.no_grad()
def vector_of(graph: Graph, group: Group, statistics: Observer) -> Vector:
    """The directions of what a group's layers read.

    Raises:
        UserError: Its statistics are damaged, or hold less than a covariance.
    """
    weights = [graph.weight(layer).detach() for layer in group.layers]
    moments = known_inputs(statistics, group.name, weights[0])
    if not isinstance(moments, Moments) or not isinstance(statistics, Gram):
        raise UserError(f"a rank of {group.name} needs its covariance, of which only the diagonal was measured")
    biased = all(isinstance(graph.layer(layer).bias, Tensor) for layer in group.layers)
    return Vector(moments, directions(moments.seen(biased), weights), biased)


@torch.no_grad()
def rank_result(
    graph: Graph, group: Group, rank: int, vector: Vector
) -> tuple[dict[str, Tensor], dict[str, LayerResult]]:
    """The group with ``rank`` of its directions (docs/method.md, :mod:`obsdiff.obs.lowrank`).

    Returns:
        Bool (count,) by group, True = kept, the most important directions first; and the layers' results.
    """
    kept = torch.arange(group.count) < rank
    encode, decode = vector.directions.first(rank)
    results: dict[str, LayerResult] = {}
    basis = encode.to(graph.weight(group.layers[0]).dtype)  # as it will be held
    for layer in group.layers:
        old = graph.weight(layer)
        dense = old.detach().double()
        weight = (dense @ decode).to(old.dtype)
        delta = weight.double() @ basis.double() - dense
        moved, shift = vector.moments.through(delta), None
        if vector.biased:
            bias = graph.layer(layer).bias
            assert isinstance(bias, Tensor)
            shift = -moved.float()
            held = (bias.float() + shift).to(bias.dtype).to(moved.dtype) - bias.to(moved.dtype)
            moved = moved + held
        error = vector.moments.spread(delta.float()) + float(moved.square().sum())
        relative = relative_error(error, *vector.moments.output(dense.float()))
        results[layer] = LayerResult(weight.float(), None, relative, shift, basis=None if results else basis.float())
    return {group.name: kept}, results


def basis_of(group: Group, results: Mapping[str, LayerResult]) -> Tensor:
    """What all of a group's layers read their input through, float32 (rank, inputs)."""
    basis = results[group.layers[0]].basis
    assert basis is not None
    return basis


@torch.no_grad()
def checked_rank(graph: Graph, group: Group, rank: int, seen: Observer, others: Observer | None) -> dict[str, Any]:
    """What a rank leaves out, on the prompts that it was chosen by and on others.

    Args:
        graph: Of the dense denoiser.
        group: The directions of a vector, or of tokens.
        rank: How many stay.
        seen, others: The input's statistics on the calibration's prompts, and on prompts that were not in it.

    Returns:
        "kind", "rank", "width", "input_left_out" (share of the input's variance outside the directions), "error" and,
        where there are others, "error_held_out": of all outputs together, over their variance.
    """
    vector = vector_of(graph, group, seen)
    _, results = rank_result(graph, group, rank, vector)
    encode, decode = vector.directions.first(rank)
    rest = torch.eye(group.count, dtype=encode.dtype, device=encode.device) - decode @ encode
    covariance = vector.moments.seen(vector.biased).double()
    found: dict[str, Any] = {
        "kind": group.kind,
        "rank": rank,
        "width": group.count,
        "input_left_out": float((rest @ covariance * rest).sum() / covariance.diagonal().sum()),
        "error": _output_error(graph, group, results, vector.moments),
    }
    if others is not None:
        found["error_held_out"] = _output_error(graph, group, results, vector_of(graph, group, others).moments)
    return found


def _output_error(graph: Graph, group: Group, results: Mapping[str, LayerResult], moments: Moments) -> float:
    """``Σ_l E‖Δ_l x + δb_l‖² / Σ_l E‖W_l (x − μ)‖²`` under the moments of x."""
    error = variance = square = 0.0
    basis = basis_of(group, results).double()
    for layer, result in results.items():
        dense = graph.weight(layer).detach().float()
        delta = (result.weight.double() @ basis - dense.double()).float()
        moved = moments.through(delta)
        if result.bias_shift is not None:
            moved = moved + result.bias_shift.to(moved)
        error += moments.spread(delta) + float(moved.square().sum())
        of_layer = moments.output(dense)
        variance, square = variance + of_layer[0], square + of_layer[1]
    return relative_error(error, variance, square)
