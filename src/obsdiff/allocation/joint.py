"""The error of whole plans, everything pruned together."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.allocation.candidates import Candidate, Solver
from obsdiff.allocation.probe import Probe
from obsdiff.allocation.restart import Restart
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.solve import solve_site
from obsdiff.pruning.surgery import Edits


def joint_errors(solver: Solver, plans: Sequence[Plan], probe: Probe) -> list[float]:
    """Relative error of the denoiser's guided output on ``probe`` with each whole plan applied; undone afterwards."""
    restart = Restart(solver.graph, probe)
    errors = []
    for plan in plans:
        changes = _changes(solver, plan)
        edits = Edits()
        try:
            for change in changes:
                change.apply(edits, solver.graph)
            errors.append(restart.error())
        finally:
            edits.undo()
    return errors


def _changes(solver: Solver, plan: Plan) -> list[Candidate]:
    """Every pruned layer, solved while all others are dense."""
    graph = solver.graph
    if plan.structured:
        pruned = {n: p for n, p in plan.entries.items() if isinstance(p, Structured) and p.sparsity > 0}
        bundles = graph.bundles(list(pruned))
        return [solver.bundle({group.name: pruned[group.name] for group in bundle}) for bundle in bundles]
    changes = []
    for site in graph.sites:
        if layers := [layer for layer in site.layers if layer in plan.entries]:
            found = solver.statistics.site(site.name, graph.weight(site.name).device)
            patterns = [plan.entries[layer] for layer in layers]
            solved = solve_site(graph, layers, patterns, found, solver.options, solver.statistics.slopes)
            layers_of = {name: (result.weight, result.bias_shift) for name, result in solved.items()}
            changes.append(Candidate(layers_of, sum(result.error or 0.0 for result in solved.values())))
    return changes
