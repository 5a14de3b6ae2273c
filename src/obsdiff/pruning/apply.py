"""Solving what a plan names and writing it into the denoiser, site by site and module by module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from obsdiff.memory import kept_meanwhile
from obsdiff.models.graph import Graph, Group, Site
from obsdiff.obs.observers import Observer
from obsdiff.progress import track
from obsdiff.pruning.layers import SolveOptions, emptied
from obsdiff.pruning.plan import WEIGHT, Plan, cut_bundles, loses, masked_sites
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.solve import kept_columns, solve_groups, solve_site, unfolded
from obsdiff.pruning.solved import Results, Solved
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.surgery import Edits, cut, lost_rows, project
from obsdiff.pruning.vectors import basis_of
from obsdiff.ranks import solved_in_turn

Read = Callable[[str, torch.device], Observer]  # statistics of a site
Spent = Callable[[str], None]  # says that nothing needs those of a site any more
T = TypeVar("T", Site, list[Group])


@dataclass(frozen=True)
class Job:
    """What solving needs to know, and where it leaves its results.

    Attributes:
        edits: Remembers what was.
        graph: Of the denoiser before any of it.
        plan: What to do.
        options: How.
        report: Receives masks, shares and errors.
        quiet: No progress bars.
        solved: Keeps what is solved, if anything does.
    """

    edits: Edits
    graph: Graph
    plan: Plan
    options: SolveOptions
    report: PruneReport
    quiet: bool
    solved: Solved | None = None

    def results(
        self, items: Sequence[T], solve: Callable[[T], Results], cost: Callable[[T], float] | None = None
    ) -> Iterator[tuple[T, Results]]:
        """Of every item: solved by an earlier run that was cut off, else now, and kept.

        Args:
            items: Sites or bundles of groups.
            solve: Does one.
            cost: See :func:`~obsdiff.ranks.solved_in_turn`.
        """
        return track(self._results(items, solve, cost), len(items), "solving", self.quiet)

    def _results(
        self, items: Sequence[T], solve: Callable[[T], Results], cost: Callable[[T], float] | None
    ) -> Iterator[tuple[T, Results]]:
        kept, missing = self.solved, items
        if kept is not None:
            yield from ((item, kept.load(item)) for item in items if item in kept)
            missing = [item for item in items if item not in kept]
        for item, found in solved_in_turn(missing, solve, cost):
            if kept is not None:
                kept.save(item, found)
            yield item, found
            del found


@kept_meanwhile()
def apply_package(job: Job, package: Collection[str], found: Statistics | None, once: bool = False) -> None:
    """Do what a plan says to the sites called so: units and directions first, then single weights.

    The single weights of layers that lost inputs are solved for from the weights that the units' compensation left, on
    the kept rows and columns of the dense input's moments: those weights answer the normal equations of the kept
    inputs, so what this adds to the error is what it changes from there on.

    Args:
        job: What to do.
        package: Names of sites.
        found: Measured on the denoiser as it is, if anything was.
        once: The statistics serve this alone, and are let go site by site as they are used.
    """
    plan, slopes, gates = job.plan, None if found is None else found.slopes, None if found is None else found.openness
    read: Read | None = None
    spent: Spent | None = None
    if found is not None and found.inputs:
        read = found.site
        if once and not (plan.structured and plan.weights):
            read, spent = found.take, found.forget
    kept = _shrink_modules(job, package, read, spent, slopes, gates) if plan.structured else {}
    if plan.weights:
        narrowed = None if read is None else _narrowed(job.graph, read, kept)
        _mask_sites(job, package, narrowed, spent, None if slopes is None else _left_of(job.graph, slopes, kept))


def _narrowed(graph: Graph, read: Read, kept: Mapping[str, Tensor]) -> Read:
    """Statistics of the inputs that are left."""
    lost = {s.layer for name in kept for s in graph.group_of[name].consumers}

    def of_site(site: str, device: torch.device) -> Observer:
        whole = read(site, device)
        if not lost.intersection(graph.site_of[site].layers):
            return whole
        layer = graph.layer(site)
        places = graph.weight(site).shape[2:].numel()
        stays = kept_columns(graph, site, kept, whole.power().shape[1] // places)
        return whole.of_columns(unfolded(stays.nonzero().flatten().cpu(), layer))

    return of_site


def _left_of(graph: Graph, slopes: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the weights that are left."""
    rows, found = lost_rows(graph, kept), dict(slopes)
    for layer in {layer for name in kept for layer in graph.group_of[name].layers} & slopes.keys():
        gradient = slopes[layer]
        stays = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        stays[rows.get(layer, torch.empty(0, dtype=torch.int64)).to(stays.device)] = False
        columns = kept_columns(graph, layer, kept, gradient.shape[1]).to(gradient.device)
        found[layer] = gradient[stays][:, columns]
    return found


def _mask_sites(
    job: Job, package: Collection[str], read: Read | None, spent: Spent | None, slopes: Mapping[str, Tensor] | None
) -> None:
    """Solve the sites of a package and write the pruned weights."""
    graph, weights, report = job.graph, job.plan.weights, job.report
    ending = WEIGHT if job.plan.structured else ""

    def solve(site: Site) -> Results:
        layers = [layer for layer in site.layers if layer in weights]
        found = None if read is None else read(site.name, graph.weight(layers[0]).device)
        patterns = [weights[layer] for layer in layers]
        return {}, solve_site(graph, layers, patterns, found, job.options, slopes)

    def cost(site: Site) -> float:
        """About what its solve takes: R rows by n² columns; sites do not touch each other's layers, so any order will
        do."""
        found = [graph.weight(layer) for layer in site.layers if layer in weights]
        return float(sum(weight.numel() * weight[0].numel() for weight in found))

    sites = masked_sites(graph, job.plan, package)
    for site, (_, results) in job.results(sites, solve, cost):
        if spent is not None:  # also where another process solved it
            spent(site.name)
        for layer, solved in results.items():
            assert solved.mask is not None
            dead, name = layer in job.plan.dead, layer + ending
            result = emptied(solved) if dead else solved
            assert result.mask is not None
            bias = graph.layer(layer).bias if dead else None
            job.edits.set_weight(
                graph.layer(layer), result.weight, torch.zeros_like(bias) if isinstance(bias, Tensor) else None
            )
            job.edits.shift_bias(graph.layer(layer), result.bias_shift)
            report.masks[name] = result.mask
            report.sparsity_per_layer[name] = 1 - float(result.mask.sum()) / result.mask.numel()
            if result.error is not None:
                report.layer_error[name] = result.error
            if result.refit_steps is not None:
                report.refit_steps[name] = result.refit_steps
    report.put_last([layer + ending for site in sites for layer in site.layers])  # whichever was solved first


def _shrink_modules(
    job: Job,
    package: Collection[str],
    read: Read | None,
    spent: Spent | None,
    slopes: Mapping[str, Tensor] | None,
    gates: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Choose the units that stay of a package's groups and cut the others out.

    Returns:
        Bool (count,) by group whose units are entries of tensors, True = kept.
    """
    graph, modules, report = job.graph, job.plan.modules, job.report
    whole = [name for name, pattern in modules.items() if not loses(graph.group_of[name], pattern)]
    report.masks.update({name: torch.ones(graph.group_of[name].count, dtype=torch.bool) for name in whole})
    report.sparsity_per_layer |= dict.fromkeys(whole, 0.0)

    def solve(bundle: list[Group]) -> Results:
        patterns = {group.name: modules[group.name] for group in bundle}
        consumers = dict.fromkeys(s.layer for group in bundle for s in group.consumers)
        found = None
        if read is not None:
            sites = {graph.site_of[layer].name: graph.weight(layer).device for layer in consumers}
            known = {site: read(site, device) for site, device in sites.items()}  # each once: it is let go
            found = {layer: known[graph.site_of[layer].name] for layer in consumers}
        kept, results = solve_groups(graph, patterns, found, job.options, slopes or None, gates)
        return {name: units.cpu() for name, units in kept.items()}, results

    def solved() -> Iterator[tuple[list[Group], Results]]:
        """Units first, chosen by the producers as they are, then directions for the rows that are left, on however many
        processes."""
        bundles = cut_bundles(graph, job.plan, package)
        for directions in (False, True):
            yield from job.results([b for b in bundles if (b[0].basis is not None) is directions], solve)

    cut_units: dict[str, Tensor] = {}
    for bundle, (kept, results) in solved():
        if spent is not None:  # also where another process chose them
            for consumer in {s.layer for group in bundle for s in group.consumers}:
                spent(graph.site_of[consumer].name)
        for group in (graph.group_of[name] for name in kept):
            if group.basis is not None:
                project(job.edits, graph, group, basis_of(group, results))
        cut(job.edits, graph, kept, {name: (result.weight, result.bias_shift) for name, result in results.items()})
        cut_units |= {name: units for name, units in kept.items() if graph.group_of[name].basis is None}
        report.masks.update(kept)
        report.sparsity_per_layer |= {name: 1 - float(units.sum()) / len(units) for name, units in kept.items()}
        report.layer_error |= {name: result.error for name, result in results.items() if result.error is not None}
    return cut_units
