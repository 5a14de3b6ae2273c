"""What can be pruned in a denoiser: stages, sites and groups, all under the names of its modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.models.families.base import Family

ROWS, COLUMNS = 0, 1  # axes of a weight: outputs and inputs


@dataclass(frozen=True)
class Site:
    """A distinct layer input: all ``layers`` read the same memory, so one Hessian serves them all.

    Attributes:
        layers: In the order in which they run; the site is named after the first.
        tokens: What lies along the sequence, in order: "text", "image", both, or nothing that is known.
        stage: Number of the stage in which its first layer runs; a site may be read in others too.
    """

    layers: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    stage: int = 0

    @property
    def name(self) -> str:
        return self.layers[0]


@dataclass(frozen=True)
class Slices:
    """Where the units of a group lie along one axis of a layer's tensors.

    Unit u owns the ``size`` entries from ``start + u · size`` on, for each of ``starts`` (two for gated layers, three
    for fused queries, keys and values).
    """

    layer: str
    starts: tuple[int, ...]
    size: int

    def entries(self, chosen: Tensor) -> Tensor:
        """Indices of the entries of the units that are ``chosen`` (bool (count,)), by slab, int64."""
        channels = chosen.repeat_interleave(self.size).nonzero().flatten()
        return torch.cat([channels + start for start in self.starts])


@dataclass(frozen=True)
class Attribute:
    """``module.name`` is ``per_unit`` times the number of units."""

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class Group:
    """The removable units of one dimension: heads of an attention, neurons of a feed-forward module, channel groups of
    a ResNet block, directions of a vector that modulations read or of tokens that queries, keys and values read.

    Attributes:
        name: The module (unique; what plans and masks are keyed by).
        kind: Which share of a structured pattern goes for it: "heads", "ffn", "channels", "rank" or "lowrank".
        count: Units.
        stage: Number of its stage.
        producers: Layers whose output rows belong to units.
        consumers: Layers whose input columns belong to units.
        followers: Modules with vectors (norm weights and biases) that lose entries with their units.
        selected: Norms that stay whole, because they run over all units, and give only the kept units' channels
            (families.md 2.3).
        attributes: What is derived from the number of units.
        basis: Units are directions, onto which this module will project what the consumers read (:mod:`obsdiff.obs.
            lowrank`); None where they are entries. That of a vector belongs to no single stage.
    """

    name: str
    kind: str
    count: int
    stage: int
    producers: tuple[Slices, ...]
    consumers: tuple[Slices, ...]
    followers: tuple[Slices, ...] = ()
    selected: tuple[Slices, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    basis: str | None = None

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """All layers that lose rows or columns."""
        return tuple(slices.layer for slices in (*self.producers, *self.consumers))

    @cached_property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """The (module, axis) pairs that it cuts; two groups that share one must be cut in one go."""
        rows = [(slices.layer, ROWS) for slices in (*self.producers, *self.followers)]
        return (*rows, *((slices.layer, COLUMNS) for slices in self.consumers))


@dataclass(frozen=True)
class Graph:
    """Everything prunable in one denoiser.

    Attributes:
        denoiser: The model (of pipelines with two denoisers, a module that holds both).
        family: What is known of its class.
        stages: Names of the blocks of the repeated part, in the order of execution.
        layers: Every Linear and Conv2d that unstructured and N:M pruning may change, with the number of its stage, in
            the order of execution.
        sites: In the order of execution; empty if the denoiser was not traced.
        vectors: Sites of one vector per sample, which only ranks of groups go by.
        groups: In the order of execution.
        chains: Lists of stages of which each reads nothing of the earlier ones but what the one before it returned.
        repeats: Whether a stage runs more than once in a call.
    """

    denoiser: nn.Module
    family: Family
    stages: tuple[str, ...]
    layers: Mapping[str, int]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    chains: frozenset[str] = frozenset()
    vectors: tuple[Site, ...] = ()
    repeats: bool = False
    group_of: Mapping[str, Group] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_of", {group.name: group for group in self.groups})

    @cached_property
    def site_of(self) -> dict[str, Site]:
        """The site that each layer reads."""
        return {layer: site for site in (*self.sites, *self.vectors) for layer in site.layers}

    def layer(self, name: str) -> nn.Module:
        """The layer called ``name``."""
        return self.denoiser.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """The weight of the layer called ``name``."""
        weight = self.layer(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def bundles(self, names: Sequence[str]) -> list[list[Group]]:
        """The groups called ``names``, those together that cut the same axis of a layer, in the order of execution."""
        found: list[tuple[set[tuple[str, int]], list[Group]]] = []
        for group in self.groups:
            if group.name not in names:
                continue
            axes, members, rest = set(group.axes), [], []
            for bundle in found:
                if bundle[0] & axes:
                    axes |= bundle[0]
                    members += bundle[1]
                else:
                    rest.append(bundle)
            found = [*rest, (axes, [*members, group])]
        return [members for _, members in found]


def shapes_with(graph: Graph, kept: Mapping[str, int]) -> dict[str, Any]:
    """The ``shrunk`` config (:mod:`obsdiff.models.obsdiff_shrunk`) of a denoiser whose groups keep so many units."""
    gone: dict[tuple[str, int], int] = {}
    attributes: dict[str, dict[str, Any]] = {}
    tensors: dict[str, list[int]] = {}
    for name, count in kept.items():
        group = graph.group_of[name]
        for axis, all_slices in ((ROWS, (*group.producers, *group.followers)), (COLUMNS, group.consumers)):
            for s in all_slices:
                key = (s.layer, axis)
                gone[key] = gone.get(key, 0) + (group.count - count) * s.size * len(s.starts)
        for attribute in group.attributes:
            attributes.setdefault(attribute.module, {})[attribute.name] = attribute.per_unit * count
        for s in group.selected:
            attributes.setdefault(s.layer, {})["selected"] = [list(range(count)), s.size]
        if group.basis is not None and count < group.count:
            tensors[f"{group.basis}.weight"] = [count, group.count]
            for layer in group.layers:  # the model's own name of it: of two denoisers each has bases
                attributes.setdefault(layer, {})["basis"] = own_name(group.basis)
    for (name, axis), less in gone.items():
        for tensor, parameter in graph.layer(name).named_parameters(recurse=False):
            if axis < (1 if tensor == "bias" else parameter.dim()):
                shape = tensors.setdefault(f"{name}.{tensor}", list(parameter.shape))
                shape[axis] -= less
    return {"tensors": tensors, "attributes": attributes}


def own_name(basis: str) -> str:
    """The name of a basis in its model, whatever holds that."""
    return basis[basis.index("bases.") :]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a file, zeros included."""
    return tensor.numel() * tensor.element_size()


Size = Callable[[Tensor], int]  # of a tensor: its elements, or its bytes


def group_parameters(graph: Graph, group: Group, kept: int, size: Size = Tensor.numel) -> int:
    """Parameters that a group owns if it keeps so many units; with a basis, its own among them unless all stay."""
    return units_parameters(graph, group, kept < group.count, size) * kept


def more_with(graph: Graph, kept: Mapping[str, int], size: Size = Tensor.numel) -> int:
    """What the whole denoiser's parameters (or bytes) change by if its groups keep so many units, with rows and columns
    of one layer taken together; negative where it becomes smaller."""
    there = dict(graph.denoiser.named_parameters())
    likes = {f"{group.basis}.weight": graph.weight(group.layers[0]) for group in graph.groups}  # of those that have one
    more = 0
    for name, shape in shapes_with(graph, kept)["tensors"].items():
        like = there[name] if name in there else likes[name]
        entry = size(like) // like.numel()
        more += entry * (math.prod(shape) - (like.numel() if name in there else 0))
    return more


def pays(graph: Graph, group: Group, kept: int) -> bool:
    """Whether what a group keeps is less than the whole: a basis has parameters of its own."""
    return kept == group.count or group_parameters(graph, group, kept) < group_parameters(graph, group, group.count)


def units_parameters(graph: Graph, group: Group, reduced: bool = True, size: Size = Tensor.numel) -> int:
    """Parameters (or their bytes) that each unit of a group owns: rows of its producers, columns of its consumers,
    entries of vectors, and of a ``reduced`` one with a basis its row there.

    Where two groups share a layer, what both own (the product of a row and a column) is counted for each.
    """
    count = 0
    for s in (*group.producers, *group.followers):
        for parameter in graph.layer(s.layer).parameters(recurse=False):
            count += s.size * len(s.starts) * (size(parameter) // len(parameter))
    for s in group.consumers:
        weight = graph.weight(s.layer)
        count += s.size * len(s.starts) * (size(weight) // weight.shape[1])
    if group.basis is None or not reduced:
        return count
    like = graph.weight(group.layers[0])
    return count + group.count * (size(like) // like.numel())


def prunable(module: nn.Module) -> bool:
    """Whether a module is a Linear, or a Conv2d that mixes channels (not a depthwise one)."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 or module.weight.shape[1] > 1
    return isinstance(module, nn.Linear)


def stages_of(denoiser: nn.Module) -> list[str]:
    """Names of the blocks of the repeated part: members of a ModuleList with at least two layers, and with no smaller
    such blocks inside. In the order of registration."""
    found: list[str] = []

    def visit(module: nn.Module, name: str) -> bool:
        """Add the stages at and below ``module``; whether there are any."""
        inside = False
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            below = visit(child, full)
            if not below and isinstance(module, nn.ModuleList) and _layers(child) >= 2:
                found.append(full)
                below = True
            inside = inside or below
        return inside

    visit(denoiser, "")
    return found


def _layers(module: nn.Module) -> int:
    return sum(1 for inner in module.modules() if isinstance(inner, nn.Linear | nn.Conv2d))


def walk(stages: Sequence[str], denoiser: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    """Every module inside a stage: (number of the stage, full name, module)."""
    for i, stage in enumerate(stages):
        for name, module in denoiser.get_submodule(stage).named_modules():
            yield i, f"{stage}.{name}" if name else stage, module
