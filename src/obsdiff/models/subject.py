"""A pipeline resolved once: its denoiser, what can be pruned in it, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.calls import remembered_call
from obsdiff.models.checks import check_in_memory, check_layers, check_plain
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import denoisers_of, dtype_of, joined, parts_of
from obsdiff.models.families import Family, find_family
from obsdiff.models.families.base import TEXT
from obsdiff.models.graph import COLUMNS, Graph, Group, Site, Slices, prunable, stages_of, walk
from obsdiff.models.parts import groups_of
from obsdiff.models.stacks import Stack, stacks_of
from obsdiff.models.tracing import Trace, dead_layers, trace
from obsdiff.models.weightless import is_weightless
from obsdiff.obs.pattern import LOWRANK, RANK


@dataclass(frozen=True)
class Subject:
    """A pipeline resolved once, and passed on.

    What needs a run of the denoiser is found out when it is first asked for, and holds for the denoiser as it was then.

    Attributes:
        pipe: The pipeline.
        components: Its denoisers, by their name in the pipeline.
        conditioning: What to tell it, if its own text encoders are not there.
    """

    pipe: Any
    components: Mapping[str, nn.Module]
    conditioning: Conditioning | None = None

    @cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser; of pipelines with two, a module that holds both under their names."""
        return joined(self.components)

    @cached_property
    def family(self) -> Family:
        """What is known of its class."""
        return find_family(*self.components.values())

    @cached_property
    def component(self) -> str:
        """The denoiser's name in the pipeline; of two, both."""
        return ", ".join(self.components)

    @cached_property
    def call(self) -> dict[str, dict[str, Any]]:
        """The arguments of one recorded call of each denoiser, by its name in ``denoiser`` ("" for itself).

        Raises:
            UserError: The pipeline cannot be run, or its parts are in different dtypes.
        """
        for part in self.components.values():
            check_plain(part, ())
            if not is_weightless(self.pipe):
                check_in_memory(part)
        named = remembered_call(self.pipe, conditioning=self.conditioning)
        for name, model in self.components.items():
            _check_dtype(model, named[name][self.family.sample])
        return named if len(named) > 1 else {"": next(iter(named.values()))}

    @cached_property
    def trace(self) -> Trace:
        """What that call shows of the denoiser.

        Raises:
            UserError: The call fails.
        """
        try:
            return trace(self.denoiser, self.call, self.family.in_front)
        except UserError:
            for part in self.components.values():  # an odd layer says more than the failure it leads to
                check_plain(part, [name for _, name, module in walk(stages_of(part), part) if prunable(module)])
            raise

    @cached_property
    def graph(self) -> Graph:
        """What can be pruned."""
        return graph_of(self.denoiser, self.family, self.trace)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Blocks that its config counts, of which some can be left out."""
        return stacks_of(self.denoiser, self.family, self.graph.stages, self.trace.chains)

    @cached_property
    def dead(self) -> list[str]:
        """Layers whose outputs reach no output of a denoiser: those of its last stage, where streams end.

        That costs one call, of which gradients go no further back than that stage.
        """
        found: list[str] = []
        for name, arguments in self.call.items():
            prefix = f"{name}." if name else ""
            last = [stage for stage in self.graph.stages if stage.startswith(prefix)][-1:]
            layers = [layer for layer in self.graph.layers if layer.startswith(tuple(f"{stage}." for stage in last))]
            layers = [layer for layer in layers if layer in self.graph.site_of]
            found += dead_layers(self.denoiser, {name: arguments}, layers)
        return found

    def check(self, layers: Sequence[str]) -> None:
        """Refuse layers that would be pruned without effect, or wrongly.

        Raises:
            UserError: Naming the layer, what is odd about it, and what to do.
        """
        check_layers(self.denoiser, layers, self.trace.times)


def subject_of(pipe: Any, conditioning: Any = None) -> Subject:
    """Resolve a pipeline, unless that was done already.

    Args:
        pipe: A diffusers pipeline with a transformer or a UNet, or a :class:`Subject`, which is handed back.
        conditioning: Prompts or a :class:`Conditioning`; the latter is what the pipeline is told, so that it need not
            have its text encoders.

    Raises:
        UserError: It has no denoiser, or a compiled one.
    """
    if isinstance(pipe, Subject):
        return pipe
    return Subject(pipe, denoisers_of(pipe), conditioning if isinstance(conditioning, Conditioning) else None)


def _check_dtype(model: nn.Module, sample: Any) -> None:
    given, own = (sample[0] if isinstance(sample, list) else sample).dtype, dtype_of(model)
    if given != own:
        raise UserError(
            f"the denoiser is {own}, but its latents (of the prompts' dtype) are {given}; bring all parts of the "
            "pipeline to one dtype, such as pipe.to(torch.bfloat16)"
        )


def graph_of(denoiser: nn.Module, family: Family | None = None, traced: Trace | None = None) -> Graph:
    """What can be pruned in a denoiser.

    Args:
        denoiser: The model; on the meta device too.
        family: Its row; None looks it up.
        traced: One call of it. None: stages in the order of registration, and no sites.
    """
    family = family or find_family(*parts_of(denoiser).values())
    found = traced.stages if traced is not None else stages_of(denoiser)
    stages = tuple(name for name in found if not any(fnmatchcase(name, rule) for rule in family.apart))
    modules = list(walk(stages, denoiser))
    every = [g for i, name, module in modules if family.known for g in groups_of(module, name, i)]
    groups = [g for g in every if _refusal(family, g.name) is None]
    vectors = frozenset() if traced is None else traced.vectors
    there = {  # without layers that read directions: what a hook sees is not what their weights are for
        name: i
        for i, name, module in modules
        if prunable(module) and name not in vectors and not hasattr(module, "basis")
    }
    if traced is None:
        return Graph(denoiser, family, stages, there, (), tuple(groups))
    sites = []
    for reading in traced.reads:
        if layers := tuple(layer for layer in reading if layer in there):
            sites.append(Site(layers, _tokens(family, layers[0]), there[layers[0]]))
    ran = [layer for site in sites for layer in site.layers]
    ordered = dict.fromkeys([*sorted(ran, key=there.__getitem__), *there])  # stage by stage; idle layers last
    told, ranks = _ranks(denoiser, family, stages, traced)
    found_layers = {name: there[name] for name in ordered}
    groups = [*ranks, *_lowranks(denoiser, sites, every, traced, len(ranks)), *groups]
    return Graph(
        denoiser, family, stages, found_layers, tuple(sites), tuple(groups), traced.chains, told, traced.repeats
    )


def _ranks(
    denoiser: nn.Module, family: Family, stages: tuple[str, ...], traced: Trace
) -> tuple[tuple[Site, ...], tuple[Group, ...]]:
    """Vectors that layers inside stages, or modulations in front of them, read, and for each the group of its
    directions, one for the text stream and one for the rest, since what they give counts differently. Without layers
    that run twice (the head of DiT asks block 0's embedder again) and those that have a basis already."""
    sites: list[Site] = []
    groups: list[Group] = []
    for layers in (part for reading in traced.told for part in _streams(family, _whole(denoiser, reading, traced))):
        inside = [i for i, stage in enumerate(stages) for name in layers if name.startswith(f"{stage}.")]
        if inside or any(fnmatchcase(name, rule) for name in layers for rule in family.in_front):
            sites.append(Site(layers, (), min(inside, default=0)))
            groups.append(_directions(denoiser, RANK, sites[-1], len(groups)))
    return tuple(sites), tuple(groups)


def _streams(family: Family, layers: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Layers of the text alone, and the others."""
    text = tuple(name for name in layers if _tokens(family, name) == (TEXT,))
    return text, tuple(name for name in layers if name not in text)


def _tokens(family: Family, layer: str) -> tuple[str, ...]:
    """What lies along the sequence that a layer reads, or modulates."""
    return next((along for rule, along in family.tokens if fnmatchcase(layer, rule)), ())


def _lowranks(
    denoiser: nn.Module, sites: Sequence[Site], groups: Sequence[Group], traced: Trace, number: int
) -> list[Group]:
    """Directions of the tokens that linear layers read, where no unit (of ``groups``, refused ones too) is a part of
    these tokens, and the layers' rows belong to no neurons: what goes of those is gone, and a basis for the rest is no
    gain."""
    cut = {layer for group in groups for layer, axis in group.axes if axis == COLUMNS or group.kind != "heads"}
    found: list[Group] = []
    for site in sites:
        linear = all(isinstance(denoiser.get_submodule(layer), nn.Linear) for layer in site.layers)
        if linear and not cut & set(site.layers) and _whole(denoiser, site.layers, traced) == site.layers:
            found.append(_directions(denoiser, LOWRANK, site, number + len(found)))
    return found


def _whole(denoiser: nn.Module, layers: Sequence[str], traced: Trace) -> tuple[str, ...]:
    """Those of the layers that run once in a call and read their input as it is; without embedders of times, since of
    other times than a calibration's steps theirs say nothing."""
    once = [n for n in layers if traced.times[n] == 1 and not hasattr(denoiser.get_submodule(n), "basis")]
    return tuple(n for n in once if "timestep_embedder" not in n)


def _directions(denoiser: nn.Module, kind: str, site: Site, number: int) -> Group:
    """The group of the directions of what a site's layers read, onto a basis that their denoiser does not have yet."""
    prefix = next(prefix for prefix in parts_of(denoiser) if site.name.startswith(prefix))
    held = denoiser.get_submodule(prefix.removesuffix("."))
    bases = held.get_submodule("bases") if hasattr(held, "bases") else nn.Module()
    first = 1 + max((int(name) for name, _ in bases.named_children()), default=-1)
    weight: Any = denoiser.get_submodule(site.name).weight  # one made anew at each call too
    consumers = tuple(Slices(layer, (0,), 1) for layer in site.layers)
    basis = f"{prefix}bases.{first + number}"
    return Group(site.name, kind, weight.shape[1], site.stage, (), consumers, basis=basis)


def refusals(denoiser: nn.Module, family: Family) -> dict[str, str]:
    """Groups that the family's row refuses to cut, with the reason."""
    named = (g.name for i, name, module in walk(stages_of(denoiser), denoiser) for g in groups_of(module, name, i))
    return {name: reason for name in named if (reason := _refusal(family, name)) is not None}


def _refusal(family: Family, name: str) -> str | None:
    return next((reason for rule, reason in family.refused.items() if fnmatchcase(name, rule)), None)
