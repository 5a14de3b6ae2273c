"""Errors predicted from gradients, for every family: the products of weight gradients and changes of each call."""

import pytest
import torch

import obsdiff
from obsdiff.allocation.allocate import settings_of
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.effort import levels_of
from obsdiff.allocation.gradients import predicted_errors
from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.units import make_units
from obsdiff.models.subject import subject_of
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.options import Limits
from obsdiff.pruning.plan import make_plan
from obsdiff.ranks import keyed_generator
from tests.families.pipelines import PIPELINES, each
from tests.families.test_walk import ROWS, Case


@pytest.fixture(scope="module", params=each(PIPELINES))
def case(request):
    return Case(request.param)


def by_weights(restart, candidate):
    """The same estimate, call by call, from gradients by the weights themselves."""
    graph, total = restart.graph, 0.0
    changes = []
    for name, (weight, shift) in candidate.layers.items():
        layer = graph.layer(name)
        changes.append((layer.weight, weight - layer.weight.detach()))
        changes += [] if shift is None else [(layer.bias, shift)]
    for parameter, _ in changes:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for batch, (output, weights) in enumerate(restart.outputs()):
            signs = torch.randint(0, 2, output.shape, generator=keyed_generator(0, batch, 0)) * 2.0 - 1
            for call, weight in enumerate(weights.tolist()):
                along = (signs[call] * output[call]).sum()
                parameters = [parameter for parameter, _ in changes]
                gradients = torch.autograd.grad(along, parameters, retain_graph=True, allow_unused=True)
                product = sum(
                    float((g * d).sum()) for g, (_, d) in zip(gradients, changes, strict=True) if g is not None
                )
                total += weight * product**2
    return total / restart.power


def test_predictions_are_those_of_weight_gradients(case):
    """One layer of each stage, and one group of each kind."""
    pipe = case.traced()
    subject = subject_of(pipe, case.conditioning)
    graph, settings = subject.graph, settings_of(case.statistics, ROWS)
    probe = record_probe(subject, case.conditioning, settings, 4)
    restart, solver = Restart(graph, probe), Solver(graph, case.statistics, SolveOptions("magnitude"))
    units = {}
    for pattern in ("unstructured:0.5", case.structured):
        plan = make_plan(graph, obsdiff.parse_pattern(pattern), spare_blocks=())
        every = make_units(graph, plan, Limits())
        kinds = {(unit.stage if pattern[0] == "u" else graph.group_of[unit.name].kind): unit for unit in every}
        for unit in [*kinds.values(), every[0], every[-1]]:
            if patterns := levels_of(unit, [0.5]):
                units[unit.name] = solver.candidates(unit.members, patterns)
    found = predicted_errors(restart, units, 1)
    for name, [candidate] in units.items():
        assert found[name][0] == pytest.approx(by_weights(restart, candidate), rel=2e-3, abs=1e-9), name
