"""Patterns, for people."""

from __future__ import annotations

from obsdiff.obs.pattern import NM, RANK, Depth, Hybrid, Request, Unstructured


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
