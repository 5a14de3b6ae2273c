"""The error of whole plans, everything pruned together."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.probe import Probe
from obsdiff.allocation.restart import Restart
from obsdiff.models.offload import shelf_of
from obsdiff.pruning.apply import Job, apply_package
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.surgery import Edits


def joint_errors(solver: Solver, plans: Sequence[Plan], probe: Probe) -> list[float]:
    """Relative error of the denoiser's guided output on ``probe`` with each whole plan applied, every layer solved on
    the dense model's inputs; undone afterwards."""
    graph, options, restart = solver.graph, solver.options, Restart(solver.graph, probe)
    errors = []
    for plan in plans:
        edits = Edits(shelf=shelf_of(graph.denoiser))
        try:
            report = PruneReport(plan.pattern, options.method, options.refits, options.seed, plan)
            apply_package(Job(edits, graph, plan, options, report, quiet=True), plan.sites(graph), solver.statistics)
            errors.append(restart.error())
        finally:
            edits.undo()
    return errors
