"""Layers that reach no output of a denoiser, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from obsdiff.models.graph import Graph, Group
from obsdiff.obs.pattern import of_units
from obsdiff.pruning.plan import Plan, parted, with_weights


def without_dead(graph: Graph, plan: Plan, dead: Sequence[str], exclude: Sequence[str] = ()) -> Plan:
    """A plan that removes dead layers on top.

    Args:
        graph: What there is.
        plan: The plan.
        dead: Layers that reach no output of the denoiser (:attr:`obsdiff.models.subject.Subject.dead`).
        exclude: Shell-style name patterns of what stays all the same.

    Returns:
        Unstructured and N:M: the plan's layers among them become zero. Structured: of modules with no other outputs
        than theirs, spared or not, the fewest units stay that may.
    """
    if not plan.structured:
        return replace(plan, dead=tuple(layer for layer in dead if layer in plan.entries))
    cut, weights = parted(plan)
    entries, units = dict(cut.entries), of_units(plan.pattern)
    assert units is not None
    for group in _dead_groups(graph, dead):
        if not any(fnmatchcase(group.name, rule) for rule in exclude):
            entries[group.name] = units.choices(group.kind, group.count)[-1]
    ordered = {group.name: entries[group.name] for group in graph.groups if group.name in entries}
    cut = replace(cut, entries=ordered)
    return cut if weights is None else with_weights(graph, cut, weights)


def _dead_groups(graph: Graph, dead: Collection[str]) -> list[Group]:
    return [group for group in graph.groups if all(s.layer in dead for s in group.consumers)]


def fate_of_dead(graph: Graph, plan: Plan, dead: Sequence[str]) -> dict[str, str]:
    """What a plan that removes dead layers (:func:`without_dead`) makes of each: "zero", "cut" to the least, or "left",
    where a module serves others too or was excluded."""
    groups = [group for group in _dead_groups(graph, dead) if plan.structured and group.name in plan.entries]
    fates = dict.fromkeys(plan.dead, "zero") | {layer: "cut" for group in groups for layer in group.layers}
    return {layer: fates.get(layer, "left") for layer in dead}
