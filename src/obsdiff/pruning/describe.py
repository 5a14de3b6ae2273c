"""Patterns and plans, for people."""

from __future__ import annotations

from obsdiff.models.graph import Graph
from obsdiff.models.subject import refusals
from obsdiff.obs.pattern import NM, RANK, Depth, Hybrid, Request, Unstructured
from obsdiff.pruning.plan import Plan, reading_directions


def describe(pattern: Request) -> str:
    """For people: what the pattern does."""
    if isinstance(pattern, Depth):
        some = pattern.amount or 0
        amount = f"{some:.1%} of the stages" if some < 1 else f"{some:g} stages"
        amount = "no stages or some" if pattern.amount is None else amount
        return f"{amount} go" + ("" if pattern.then is None else f", then {describe(pattern.then)}")
    if isinstance(pattern, Hybrid):
        return f"{describe(pattern.first)}; then {describe(pattern.then)}"
    if isinstance(pattern, Unstructured):
        return f"{pattern.ratio:.1%} of the weights of each layer become zero"
    if isinstance(pattern, NM):
        return f"{pattern.n} of every {pattern.m} consecutive weights stay"
    channels = f", {pattern.channels:.1%} of the channel groups of ResNet blocks" if pattern.channels else ""
    said = [f"{pattern.heads:.1%} of the heads and {pattern.ffn:.1%} of the FFN neurons{channels} go"]
    for kind, kept in pattern.directions.items():
        what = "the vectors that modulations read" if kind == RANK else "the tokens that queries, keys and values read"
        amount = f"{kept:.1%} of the directions" if kept < 1 else f"{kept:g} directions"
        said.append(f"{amount} of {what} stay")
    return "; ".join(said if pattern.cuts else said[1:])


def remarks(graph: Graph, plan: Plan) -> list[str]:
    """For people: what cannot be done to this denoiser."""
    return [*_left_whole(graph, plan), *_left_dense(graph, plan)]


def _left_dense(graph: Graph, plan: Plan) -> list[str]:
    """Layers whose single weights stay once their inputs are cut, or are directions."""
    if not isinstance(plan.pattern, Hybrid):
        return []
    then, odd = plan.pattern.then, [layer for layer, pattern in plan.weights.items() if pattern.sparsity == 0]
    left = {"they read directions of their inputs": sorted(reading_directions(graph, plan))}
    if isinstance(then, NM):
        left[f"the inputs that are left are no multiple of {then.m}"] = odd
    return [f"{len(n)} layers such as {n[0]} keep all their weights: {why}" for why, n in left.items() if n]


def _left_whole(graph: Graph, plan: Plan) -> list[str]:
    kind = graph.family.denoiser
    if not graph.family.known:
        return [
            f"{kind} is known by tracing alone: unstructured and N:M patterns on its {len(graph.layers)} layers, no "
            "structured ones (docs/adding-a-family.md)"
        ]
    reasons: dict[str, list[str]] = {}
    for name, reason in (refusals(graph.denoiser, graph.family) if plan.structured else {}).items():
        reasons.setdefault(reason, []).append(name)
    return [f"left whole: {len(names)} such as {names[0]}, {reason}" for reason, names in reasons.items()]
