"""Errors predicted from gradients: against the change of the output itself, and in a scan, a store, an allocation."""

import json
import math
from dataclasses import replace

import pytest
import torch

import obsdiff
from obsdiff.allocation import effort
from obsdiff.allocation.candidates import Candidate, Solver
from obsdiff.allocation.curves import corrected_errors
from obsdiff.allocation.effort import (
    SOLVED,
    TAIL_TRIPLES,
    levels_of,
    measured_levels,
    parts_of,
    passes_needed,
    way_of,
)
from obsdiff.allocation.gradients import NotDifferentiable, predicted_errors
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.scan import FILE, scan
from obsdiff.allocation.units import removed
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.options import PruningOptions, ScanOptions
from obsdiff.pruning.surgery import Edits
from obsdiff.ranks import keyed_generator
from tests.allocation.test_scan import setting, units_of  # noqa: F401  # a fixture
from tests.conftest import make_pipe

STEP = 1e-2  # of the central difference, as a share of the change
PATTERNS = ["unstructured:0.5", "2:4", "structured:0.5", "structured:0.5+rank:8"]


@pytest.fixture(autouse=True)
def few_vectors(monkeypatch):
    """Two for each of the probe's six calls, of modules four; a scan would take so many that it pays to measure."""
    monkeypatch.setattr(effort, "PRODUCTS", 12)
    monkeypatch.setattr(effort, "PRODUCTS_STRUCTURED", 24)


def moved(restart, candidate, size=STEP):
    """What a change does to the guided outputs to first order, by batch: a central difference of the denoiser."""
    graph, ends = restart.graph, []
    for step in (size, -size):
        part = {}
        for name, (weight, shift) in candidate.layers.items():
            dense = graph.weight(name).detach()
            part[name] = (dense + step * (weight - dense), None if shift is None else step * shift)
        edits = Edits()
        Candidate(part, 0.0).apply(edits, graph)
        with torch.no_grad():
            ends.append([output for output, _ in restart.outputs()])
        edits.undo()
    return [(up - down) / (2 * size) for up, down in zip(*ends, strict=True)]


def reference(restart, candidate, vectors, seed, size=STEP):
    """The estimate with the same random signs, and what it estimates."""
    estimate = truth = 0.0
    for batch, (change, weights) in enumerate(zip(moved(restart, candidate, size), restart.weights, strict=True)):
        truth += float((weights * change.flatten(1).square().sum(1)).sum())
        for number in range(vectors):
            signs = torch.randint(0, 2, change.shape, generator=keyed_generator(seed, batch, number)) * 2.0 - 1
            products = (signs * change).flatten(1).sum(1)
            estimate += float((weights * products.square()).sum()) / vectors
    return estimate / restart.power, truth / restart.power


def candidates_of(graph, statistics, pattern, shares=(0.3, 0.8)):
    solver = Solver(graph, statistics, SolveOptions("obs"))
    return {unit.name: solver.candidates(unit.members, levels_of(unit, shares)) for unit in units_of(graph, pattern)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prediction_is_the_first_order_change_along_its_vectors(setting, pattern):  # noqa: F811
    _, graph, statistics, probe = setting
    restart = Restart(graph, probe, rows=8)  # several batches, the last one smaller
    before = {name: tensor.clone() for name, tensor in graph.denoiser.state_dict().items()}
    units = candidates_of(graph, statistics, pattern)
    found = predicted_errors(restart, units, 2, seed=5)
    assert found.keys() == units.keys()
    for name, candidates in list(units.items())[::4] + list(units.items())[-1:]:
        for error, candidate in zip(found[name], candidates, strict=True):
            size = STEP if error > 1e-6 else 10 * STEP  # of a tiny change rounding takes more than curvature
            assert error == pytest.approx(reference(restart, candidate, 2, 5, size)[0], rel=0.02, abs=1e-9)
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.denoiser.state_dict().items())
    assert not any(layer._forward_hooks for layer in graph.denoiser.modules())
    assert all(parameter.grad is None for parameter in graph.denoiser.parameters())


def test_its_mean_is_the_squared_change(setting):  # noqa: F811
    """Over many vectors; within three deviations of a sum of 6 times 64 squared normal numbers, the widest there is."""
    _, graph, statistics, probe = setting
    restart = Restart(graph, probe)
    units = candidates_of(graph, statistics, "unstructured:0.5", [0.7])
    some = dict(list(units.items())[::5])
    found = predicted_errors(restart, some, 64)
    for name, [candidate] in some.items():
        assert found[name][0] == pytest.approx(
            reference(restart, candidate, 1, 0)[1], rel=3 * math.sqrt(2 / (6 * 64)), abs=1e-9
        )


def test_a_prediction_does_not_depend_on_what_is_asked_beside_it(setting):  # noqa: F811
    """Nor on where the denoiser restarts: processes and parts that share the units find the same."""
    _, graph, statistics, probe = setting
    restart, late = Restart(graph, probe), Restart(graph, probe)
    units = candidates_of(graph, statistics, "unstructured:0.5")
    whole = predicted_errors(restart, units, 1)
    late.advance(2)
    for name in [name for name in units if graph.layers[name] == 2][:3]:
        alone = predicted_errors(late, {name: units[name]}, 1)
        assert alone[name] == pytest.approx(whole[name], rel=1e-4)


def test_corrections_meet_what_was_measured_and_leave_small_changes_alone():
    solved, predicted = {0.5: 0.001, 0.9: 0.2, 0.98: 0.4}, {0.5: 1e-5, 0.9: 2e-3, 0.98: 4e-3}
    found = corrected_errors(solved, predicted, {0.98: 0.016})
    assert found[0.98] == 0.016 and found[0.5] == pytest.approx(1e-5, rel=0.01)
    assert found[0.9] == pytest.approx(2e-3 * math.sqrt(4))  # half of the layer's own error, half of the logarithm
    assert corrected_errors(solved, predicted, {0.5: 3e-5, 0.98: 0.016})[0.5] == 3e-5
    assert corrected_errors(solved, predicted, {0.9: 4e-3})[0.98] == pytest.approx(8e-3)  # no further than was measured
    nothing = dict.fromkeys(predicted, 0.0)
    assert corrected_errors(solved, nothing, {0.98: 0.0}) == nothing


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_backward_scan_is_near_a_forward_one(setting, pattern, tmp_path):  # noqa: F811
    """Same curves within what two vectors on six calls tell, fewer passes, and the store gives back what was found."""
    _, graph, statistics, probe = setting
    units = units_of(graph, pattern)
    options, given = SolveOptions("obs"), (units, probe, "")
    forward = scan(Solver(graph, statistics, options), *given)
    found = scan(Solver(graph, statistics, options), *given, by="backward", store=tmp_path)
    opened = scan(Solver(graph, statistics, options), *given, by="backward", store=tmp_path)
    assert (opened.measured, opened.predicted) == (found.measured, found.predicted) and found.note == ""
    assert found.cost["passes"] == pytest.approx(passes_needed(graph, units, None, "backward", len(probe)))
    assert found.cost["passes"] < forward.cost["passes"]
    logs = []
    for unit in units:
        [largest] = found.measured[unit.name]
        assert largest == removed(levels_of(unit, SOLVED)[-1])
        assert found.predicted[unit.name].keys() == found.solved[unit.name].keys()
        errors = found.errors(unit.name)
        assert errors[largest] == found.measured[unit.name][largest]
        logs += [math.log(errors[s] / e) for s, e in forward.measured[unit.name].items() if s in errors and e > 1e-9]
    logs.sort()
    assert abs(logs[len(logs) // 2]) < 0.3 and max(logs) - min(logs) < 4
    with pytest.raises(obsdiff.UserError, match=r"by \(.backward. there, .forward. now\)"):
        scan(Solver(graph, statistics, options), *given, store=tmp_path)


def test_few_calls_are_measured_as_vectors_cost_more(setting, monkeypatch):  # noqa: F811
    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")[:4]
    monkeypatch.undo()
    assert way_of(graph, units, None, "backward", 6) == "forward" == way_of(graph, units, None, "forward", 160)
    assert way_of(graph, units_of(graph, "unstructured:0.5"), None, "backward", 160) == "backward"
    found, forward = (
        scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", by=by)
        for by in ("backward", "forward")
    )
    assert found.measured == forward.measured and not any(found.predicted.values()) and found.note == ""
    assert found.cost["passes"] == pytest.approx(passes_needed(graph, units, None, "backward", len(probe)))


def test_a_large_denoiser_is_predicted_in_parts(setting, monkeypatch):  # noqa: F811
    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")
    given = (units, probe, "")
    whole = scan(Solver(graph, statistics, SolveOptions("magnitude")), *given, by="backward")
    own = sum(p.numel() * p.element_size() for p in graph.denoiser.parameters())
    monkeypatch.setattr(effort, "HELD_BYTES", 0)
    parts = parts_of(graph, units, "backward")
    assert len(parts) > 2 and [unit for part in parts for unit in part] == units
    sizes = [sum(48 * graph.weight(n).numel() for unit in part for n in unit.members) for part in parts]
    assert all(size <= own or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    found = scan(Solver(graph, statistics, SolveOptions("magnitude")), *given, by="backward")
    assert found.cost["passes"] == pytest.approx(passes_needed(graph, units, None, "backward", len(probe)))
    for unit in units:
        assert list(found.predicted[unit.name].values()) == pytest.approx(
            list(whole.predicted[unit.name].values()), rel=1e-3, abs=1e-12
        )


def test_the_largest_share_is_measured_on_some_calls(setting, monkeypatch):  # noqa: F811
    _, graph, statistics, probe = setting
    assert len(probe) < TAIL_TRIPLES
    monkeypatch.setattr(effort, "TAIL_TRIPLES", 3)
    units = units_of(graph, "unstructured:0.5")[3:9:2]
    solver = Solver(graph, statistics, SolveOptions("magnitude"))
    found = scan(solver, units, probe, "", by="backward")
    part = scan(solver, units, replace(probe, calls=probe.calls[::2]), "", levels=[0.98])
    for unit in units:
        assert found.measured[unit.name][0.98] == pytest.approx(part.measured[unit.name][0.98], rel=1e-3)
    assert found.cost["passes"] == pytest.approx(passes_needed(graph, units, None, "backward", len(probe)))


@pytest.fixture
def cut(setting):  # noqa: F811
    """A function that takes a layer's answer out of the graph of gradients."""
    handles = []

    def cut_at(name):
        handles.append(setting[1].layer(name).register_forward_hook(lambda module, args, output: output.detach()))

    yield cut_at
    for handle in handles:
        handle.remove()


def test_where_gradients_tell_nothing_the_denoiser_runs(setting, cut):  # noqa: F811
    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")[:3]
    forward = scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "")
    cut("proj_out")
    found = scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", by="backward")
    assert "measured at all shares" in found.note and "no gradient" in found.note
    assert found.measured == forward.measured and not any(found.predicted.values())
    assert found.errors(units[0].name) == forward.measured[units[0].name]


def test_a_layer_behind_a_cut_is_measured_the_others_are_predicted(setting, cut):  # noqa: F811
    """Its gradient is zero, but not its effect."""
    _, graph, statistics, probe = setting
    names = ["transformer_blocks.1.ff.net.0.proj", "transformer_blocks.2.ff.net.2"]
    units = units_of(graph, "unstructured:0.5")
    at = {unit.name: unit for unit in units}
    cut("transformer_blocks.1.ff.net.2")
    found = scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", by="backward")
    assert found.note == "" and not found.predicted[names[0]] and found.predicted[names[1]]
    assert (
        len(found.measured[names[0]]) == len(measured_levels(at[names[0]], None)) and len(found.measured[names[1]]) == 1
    )


def test_rows_that_are_mixed_are_found(setting):  # noqa: F811
    """Gradients of other calls among a call's own would add up what does not belong together."""
    _, graph, statistics, probe = setting
    units = candidates_of(graph, statistics, "unstructured:0.5", [0.5])
    name = "transformer_blocks.1.ff.net.2"
    ff = graph.layer("transformer_blocks.1.ff")
    before = ff.register_forward_pre_hook(lambda module, args: (args[0].flip(0), *args[1:]))
    after = ff.register_forward_hook(lambda module, args, output: output.flip(0))
    try:
        with pytest.raises(NotDifferentiable, match="does not keep the rows"):
            predicted_errors(Restart(graph, probe), {name: units[name]}, 1)
    finally:
        before.remove()
        after.remove()


def test_inputs_that_change_in_place_are_found(setting):  # noqa: F811
    _, graph, statistics, probe = setting
    units = candidates_of(graph, statistics, "unstructured:0.5", [0.5])
    name = "transformer_blocks.1.ff.net.2"
    handle = graph.layer(name).register_forward_hook(
        lambda module, args, output: output + 0 * args[0].detach().mul_(2).sum()
    )
    try:
        with pytest.raises(NotDifferentiable, match="in place"):
            predicted_errors(Restart(graph, probe), {name: units[name]}, 1)
    finally:
        handle.remove()


def test_no_memory_for_gradients_is_said(setting, monkeypatch):  # noqa: F811
    from obsdiff.allocation import gradients

    _, graph, statistics, probe = setting

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradients, "_squares", full)
    units = units_of(graph, "unstructured:0.5")[:2]
    found = scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", by="backward")
    assert "memory" in found.note and all(len(errors) == 3 for errors in found.measured.values())


def test_an_allocation_goes_by_it(tmp_path):
    """The option reaches the scan, the record says how, and the plan meets the budget with a like joint error."""
    pipe, prompts = make_pipe(), ["the digit two", "a seven", "the number nine"]
    statistics = obsdiff.calibrate(pipe, prompts)
    found = {}
    for by in ("forward", "backward"):
        asked = PruningOptions(pattern="unstructured:0.6", allocation="measured", scan=ScanOptions(by=by, triples=8))
        found[by] = obsdiff.allocate(pipe, asked, statistics, prompts, store=tmp_path / by).record
        assert json.loads((tmp_path / by / FILE).read_text())["fingerprint"]["by"] == by
    forward, backward = found["forward"], found["backward"]
    assert backward["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert backward["joint_error"] < 1.5 * forward["joint_error"] < backward["uniform_joint_error"]
    assert backward["scan"]["by"] == "backward" and backward["scan"]["note"] == ""
    both = ScanOptions(levels=[0.5], by="backward")
    for wrong, said in ((ScanOptions(by="sideways"), "'sideways'; it is"), (both, "no levels")):
        with pytest.raises(obsdiff.UserError, match=said):
            obsdiff.allocate(pipe, PruningOptions(scan=wrong), statistics, prompts)
