"""The shapes that a memory plan goes by, read off a graph, a plan and the options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obsdiff.allocation.effort import SOLVED, held_bytes, levels_of, measured_levels, passes_needed, triples_of, way_of
from obsdiff.allocation.planning import allocates, needs_for, rule_of
from obsdiff.allocation.probe import BATCH_ROWS
from obsdiff.allocation.units import make_units
from obsdiff.criteria import METHODS
from obsdiff.evaluation.call_memory import CallShapes
from obsdiff.models.content import TEXT
from obsdiff.models.denoisers import dtype_of
from obsdiff.models.graph import Graph, Group, Site
from obsdiff.models.offload import blocks_of
from obsdiff.models.subject import Subject
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.observers import PASSES
from obsdiff.pruning.memory_shapes import Scan, Shapes, SiteShape, Solving
from obsdiff.pruning.options import BACKWARD, Limits, PruningOptions
from obsdiff.pruning.plan import Plan, kept_units, parted
from obsdiff.pruning.statistics import INDEX


def sites_of(graph: Graph, plan: Plan, stored: bool) -> list[Site]:
    """The sites that are measured: those that the plan needs, or all where a store keeps them."""
    needed = plan.sites(graph)
    return [site for site in (*graph.vectors, *graph.sites) if stored or site.name in needed]


def component_bytes(pipe: Any) -> dict[str, int]:
    """Bytes of each model's parameters and buffers, by component."""
    return {name: _bytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def bytes_at_hand(subject: Subject) -> dict[str, int]:
    """Bytes of a pipeline's weights that a device holds at most while they rest on the host
    (:func:`obsdiff.models.offload.offload`): while its denoiser runs, text is encoded, and latents are decoded."""
    sizes, models = component_bytes(subject.pipe), subject.components
    blocks = [_bytes(block) for model in models.values() for block in blocks_of(model)]
    texts = {name for name in sizes if any(fnmatchcase(name, kind) for kind in TEXT)}
    others = [size for name, size in sizes.items() if name not in texts and name not in models]
    outside = bytes_outside(subject)
    largest = {"denoiser": blocks, "text": [sizes[name] for name in texts], "decode": others}
    return {what: outside + max(found, default=0) for what, found in largest.items()}


def bytes_outside(subject: Subject) -> int:
    """Bytes of a denoiser's weights that never rest: those of no block."""
    models = subject.components.values()
    return sum(map(_bytes, models)) - sum(_bytes(block) for model in models for block in blocks_of(model))


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def shapes_of(subject: Subject, plan: Plan, calls: CallShapes, stored: bool, imports: int) -> Shapes:
    """What a prune is about.

    Args:
        subject: The pipeline, with weights or without.
        plan: Before anything is measured; of an allocation, the uniform one.
        calls: What was counted of its calls.
        stored: Whether statistics of all sites are kept in a folder.
        imports: Bytes of the process before anything is loaded.
    """
    graph = subject.graph
    bundles = graph.bundles(list(plan.modules)) if plan.structured else []
    return Shapes(
        component_bytes(subject.pipe),
        dtype_of(subject.denoiser).itemsize,
        tuple(_site(graph, plan, bundles, site, calls.tokens) for site in sites_of(graph, plan, stored)),
        calls.call,
        calls.observed,
        calls.made,
        calls.text,
        calls.decode,
        calls.prompt,
        calls.image,
        imports,
    )


def _site(
    graph: Graph, plan: Plan, bundles: Sequence[Sequence[Group]], site: Site, tokens: Mapping[str, int]
) -> SiteShape:
    groups, _, columns = weight_matrices(graph.layer(site.name)).shape
    cut = {
        s.layer: (group, number)
        for number, bundle in enumerate(bundles)
        for group in bundle
        for s in group.consumers
        if s.layer in site.layers
    }
    masked = [layer for layer in site.layers if layer in plan.weights]
    layers = list(dict.fromkeys([*cut, *masked]))
    kept, producers = 1.0, 0
    for group in {group.name: group for group, _ in cut.values()}.values():
        share = kept_units(group, plan.modules[group.name]) / group.count
        kept = min(kept, share)
        producers += int(share * sum(graph.weight(s.layer).numel() for s in group.producers))
    return SiteShape(
        site.name,
        columns,
        tuple(weight_matrices(graph.layer(layer)).shape[1] for layer in layers),
        groups,
        all(graph.layer(layer).bias is not None for layer in layers),
        bool(masked),
        bool(cut),
        kept,
        producers,
        f"bundle {min(number for _, number in cut.values())}" if cut else "",
        tokens.get(site.name, 0),
        any(group.basis is not None for group, _ in cut.values()),
    )


def solving_of(
    options: PruningOptions, plan: Plan, graph: Graph, statistics: Path | None, packages: int, device: str
) -> Solving:
    """How its sites are solved."""
    needs, method = needs_for(options, statistics), METHODS[options.method]
    ranked = plan.structured and any(group.basis is not None for group in plan.groups(graph))
    inputs = needs - PASSES
    return Solving(
        options.method,
        method.refit if options.refit is None else options.refit,
        "gram" in inputs,
        bool(inputs) or statistics is not None,
        method.centred,
        once=not (
            allocates(options)
            or statistics is not None
            or (ranked and packages == 1)
            or (plan.structured and plan.weights)
        ),
        stored=statistics is not None,
        reused=statistics is not None and (statistics / INDEX).exists(),
        passes=bool(needs & PASSES),
        device_type=torch.device(device).type,
    )


def scan_of(
    subject: Subject, plan: Plan, options: PruningOptions, calls: CallShapes, prompts: int, steps: int
) -> Scan | None:
    """The scan of a measured allocation, if there is one."""
    if rule_of(options) != "measured" or not plan.entries:
        return None
    graph, cut = subject.graph, parted(plan)[0]
    units = make_units(graph, cut, Limits(share=options.limits.share))
    triples = triples_of(graph, units, options.scan, prompts * steps)
    levels = max(len({*levels_of(u, SOLVED), *measured_levels(u, options.scan.levels)}) for u in units)
    stages = [0] * len(graph.stages)
    for layer in cut.layers(graph):
        stages[graph.layers.get(layer, 0)] += graph.weight(layer).numel()
    way = way_of(graph, units, options.scan.levels, options.scan.by, triples)
    return Scan(
        triples,
        levels,
        max(1, min(triples, BATCH_ROWS // calls.rows)),
        tuple(stages),
        triples * (calls.arguments + calls.waiting),
        plan.structured,
        held_bytes(graph) if way == BACKWARD else 0,
        triples * passes_needed(graph, units, options.scan.levels, options.scan.by, triples),
    )
