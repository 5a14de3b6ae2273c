"""A pipeline resolved once: its denoiser, what can be pruned in it, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.calls import remembered_call
from obsdiff.models.checks import check_in_memory, check_layers, check_plain
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import denoisers_of, dtype_of, joined, parts_of
from obsdiff.models.families import Family, find_family
from obsdiff.models.graph import Graph, Group, Site, prunable, stages_of, walk
from obsdiff.models.parts import groups_of
from obsdiff.models.tracing import Trace, trace


@dataclass(frozen=True)
class Subject:
    """A pipeline resolved once.

    Attributes:
        pipe: The pipeline.
        family: What is known of its denoiser's class.
        denoiser: Its denoiser; of pipelines with two, a module that holds both under their names.
        components: Its denoisers, by their name in the pipeline.
        call: The arguments of one recorded call of each, by its name in ``denoiser`` ("" for itself).
        graph: What can be pruned.
        times: How often each of its layers ran in the call.
    """

    pipe: Any
    family: Family
    denoiser: nn.Module
    components: Mapping[str, nn.Module]
    call: Mapping[str, Mapping[str, Any]]
    graph: Graph
    times: Mapping[str, int]

    def check(self, layers: Sequence[str]) -> None:
        """Refuse layers that would be pruned without effect, or wrongly.

        Raises:
            UserError: Naming the layer, what is odd about it, and what to do.
        """
        check_layers(self.denoiser, layers, self.times)


def subject_of(pipe: Any, conditioning: Conditioning | None = None) -> Subject:
    """Resolve a pipeline: record one call of its denoiser (once), and trace it as it is now.

    Args:
        pipe: A diffusers pipeline with a transformer or a UNet.
        conditioning: What to tell it, if its own text encoders are not there.

    Raises:
        UserError: It has no denoiser, an odd one, or cannot be run.
    """
    components = denoisers_of(pipe)
    denoiser = joined(components)
    for part in components.values():
        check_plain(part, ())
        check_in_memory(part)
    family = find_family(*components.values())
    named = remembered_call(pipe, conditioning=conditioning)
    for name, model in components.items():
        _check_dtype(model, named[name][family.sample])
    call = named if len(named) > 1 else {"": next(iter(named.values()))}
    try:
        found = trace(denoiser, call)
    except UserError:
        for part in components.values():  # an odd layer says more than the failure it leads to
            check_plain(part, [name for _, name, module in walk(stages_of(part), part) if prunable(module)])
        raise
    return Subject(pipe, family, denoiser, components, call, graph_of(denoiser, family, found), found.times)


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
    stages = traced.stages if traced is not None else tuple(stages_of(denoiser))
    modules = list(walk(stages, denoiser))
    groups: list[Group] = []
    for i, name, module in modules if family.known else ():
        groups += [g for g in groups_of(module, name, i) if _refusal(family, g.name) is None]
    vectors = frozenset() if traced is None else traced.vectors
    there = {name: i for i, name, module in modules if prunable(module) and name not in vectors}
    if traced is None:
        return Graph(denoiser, family, stages, there, (), tuple(groups))
    sites = []
    for reading in traced.reads:
        if layers := tuple(layer for layer in reading if layer in there):
            tokens = next((along for rule, along in family.tokens if fnmatchcase(layers[0], rule)), ())
            sites.append(Site(layers, tokens, there[layers[0]]))
    ran = [layer for site in sites for layer in site.layers]
    ordered = dict.fromkeys([*sorted(ran, key=there.__getitem__), *there])  # stage by stage; idle layers last
    return Graph(
        denoiser, family, stages, {name: there[name] for name in ordered}, tuple(sites), tuple(groups), traced.chain
    )


def refusals(denoiser: nn.Module, family: Family) -> dict[str, str]:
    """Groups that the family's row refuses to cut, with the reason."""
    named = (g.name for i, name, module in walk(stages_of(denoiser), denoiser) for g in groups_of(module, name, i))
    return {name: reason for name in named if (reason := _refusal(family, name)) is not None}


def _refusal(family: Family, name: str) -> str | None:
    return next((reason for rule, reason in family.refused.items() if fnmatchcase(name, rule)), None)
