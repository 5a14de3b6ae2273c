"""The scan: restarting changes no figure, stores are continued and checked, processes share the work."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import obsdiff
from obsdiff.allocation import effort
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.curves import error_curve
from obsdiff.allocation.effort import MEASURED_RANK, MEASURED_STRUCTURED, levels_of, measured_levels, passes_needed
from obsdiff.allocation.joint import joint_errors
from obsdiff.allocation.probe import power, record_probe
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.scan import FILE, scan
from obsdiff.allocation.units import Unit, make_units, removed
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.options import Limits
from obsdiff.pruning.plan import Plan, make_plan
from obsdiff.pruning.surgery import Edits
from tests.conftest import make_pipe

PROMPTS = ["the digit two", "a seven", "the number nine", "a handwritten zero"]
LEVELS = [0.5, 0.9]


@pytest.fixture(scope="module")
def setting():
    pipe = make_pipe()
    call = call_arguments(pipe)
    statistics = obsdiff.calibrate(pipe, PROMPTS)
    probe = record_probe(subject_of(pipe), encode_prompts(pipe, PROMPTS, call), Settings(call), 6)
    return pipe, subject_of(pipe).graph, statistics, probe


def units_of(graph, pattern, **limits):
    return make_units(graph, make_plan(graph, obsdiff.parse_pattern(pattern), spare_blocks=()), Limits(**limits))


def test_the_probe_is_what_the_sampler_asks(setting):
    """Its calls, run again on the dense model, give guided outputs that do not depend on the batch."""
    pipe, graph, _, probe = setting
    assert len(probe) == 6 and all(len(call.arguments["hidden_states"]) == 2 for call in probe.calls)
    assert probe.guidance == 2.0 and all(0.8 <= call.weight <= 1.2 for call in probe.calls)
    assert len({float(call.arguments["timestep"][0]) for call in probe.calls}) > 1
    one, many = Restart(graph, probe, rows=2), Restart(graph, probe)
    torch.testing.assert_close(torch.cat(one.dense), torch.cat(many.dense), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        negative, positive = pipe.transformer(**probe.calls[0].arguments)[0].double()
    torch.testing.assert_close(one.dense[0][0], negative + 2.0 * (positive - negative), rtol=1e-5, atol=1e-6)
    assert one.power == pytest.approx(power(many.dense, many.weights)) and one.error() == 0


def test_the_same_prompts_give_the_same_probe_whatever_the_batch():
    pipe = make_pipe()
    call = call_arguments(pipe)
    conditioning = encode_prompts(pipe, PROMPTS, call)
    a, b = (record_probe(subject_of(pipe), conditioning, Settings(call, batch_size=size), 5) for size in (1, 3))
    assert sorted(call.weight for call in a.calls) == pytest.approx(sorted(call.weight for call in b.calls))
    by_step = [sorted(float(call.arguments["hidden_states"].sum()) for call in probe.calls) for probe in (a, b)]
    assert by_step[0] == pytest.approx(by_step[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_restarting_from_a_block_changes_no_figure(setting, pattern):
    _, graph, statistics, probe = setting
    unchained = replace(graph, repeats=True)
    units = units_of(graph, pattern)[::3]
    before = {name: tensor.clone() for name, tensor in graph.denoiser.state_dict().items()}
    chained, whole = (
        scan(Solver(found, statistics, SolveOptions("magnitude")), units, probe, "", levels=LEVELS)
        for found in (graph, unchained)
    )
    for unit in units:
        assert list(chained.measured[unit.name].values()) == pytest.approx(
            list(whole.measured[unit.name].values()), rel=1e-4
        )
    assert whole.cost["passes"] > chained.cost["passes"]
    assert passes_needed(unchained, units, LEVELS) == pytest.approx(whole.cost["passes"])
    assert passes_needed(graph, units, LEVELS) == pytest.approx(chained.cost["passes"])
    now = graph.denoiser.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def test_beside_ranks_every_curve_ends_at_a_measurement(setting):
    """A budget that ranks share takes modules to their last unit: there the error is measured, not extrapolated."""
    _, graph, statistics, probe = setting
    both, alone, rank = (units_of(graph, pattern) for pattern in ("structured:0.5+rank:8", "structured:0.5", "rank:8"))
    for unit in (unit for unit in both if graph.group_of[unit.name].kind != "rank"):
        shares = [removed(level) for level in measured_levels(unit, None)]
        assert shares[-1] == removed(unit.options[-1]) and len(shares) >= 3
        assert measured_levels(unit, [0.5]) == levels_of(unit, [0.5])
    for unit in (*alone, *rank):  # what stood before stays
        usual = MEASURED_RANK if graph.group_of[unit.name].kind == "rank" else MEASURED_STRUCTURED
        assert measured_levels(unit, None) == levels_of(unit, usual)
    unit = next(unit for unit in both if unit.name.endswith("0.ff_context"))
    solver = Solver(graph, statistics, SolveOptions("obs"))
    sensitivity = scan(solver, [unit], probe, "")
    least = unit.options[-1]
    plan = Plan(least, {unit.name: least})
    [error] = joint_errors(solver, [plan], probe)
    curve = error_curve(sensitivity.solved[unit.name], sensitivity.measured[unit.name], [removed(least)])
    assert curve == pytest.approx([error], rel=1e-3)


def test_a_scan_beside_ranks_is_told_from_one_without(setting, tmp_path):
    _, graph, statistics, probe = setting
    solver = Solver(graph, statistics, SolveOptions("magnitude"))
    scan(solver, units_of(graph, "structured:0.5")[:1], probe, "", store=tmp_path)
    with pytest.raises(obsdiff.UserError, match=r"kind \("):
        scan(solver, units_of(graph, "structured:0.5+rank:8")[:3], probe, "", store=tmp_path)


def test_a_structured_candidate_is_the_shrunk_module(setting):
    """The masked weights that the scan measures and the tensors that a prune cuts out are one function."""
    _, graph, statistics, probe = setting
    plan = make_plan(graph, obsdiff.parse_pattern("structured:0.5"), spare_blocks=())
    [error] = joint_errors(Solver(graph, statistics, SolveOptions("obs")), [plan], probe)
    pipe = make_pipe()
    restart = Restart(subject_of(pipe).graph, probe)
    obsdiff.prune(pipe, plan, statistics=statistics)
    assert restart.error() == pytest.approx(error, rel=1e-3)


def test_a_single_candidate_is_what_pruning_it_alone_gives(setting):
    _, graph, statistics, probe = setting
    name, pattern = "transformer_blocks.1.attn.to_k", obsdiff.Unstructured(0.7)
    pipe = make_pipe()
    restart = Restart(subject_of(pipe).graph, probe)
    obsdiff.prune(pipe, Plan(pattern, {name: pattern}), statistics=statistics)
    edits, here = Edits(), Restart(graph, probe)
    here.advance(1)
    [candidate] = Solver(graph, statistics, SolveOptions("obs")).candidates([name], [pattern])
    candidate.apply(edits, graph)
    try:
        assert here.error() == pytest.approx(restart.error(), rel=1e-3)
    finally:
        edits.undo()


def test_a_store_is_continued_and_refused_if_it_is_another(setting, tmp_path):
    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")[:6]
    options = SolveOptions("magnitude")
    whole = scan(Solver(graph, statistics, options), units, probe, "p", levels=LEVELS)
    scan(Solver(graph, statistics, options), units[:2], probe, "p", levels=LEVELS, store=tmp_path)
    before = (tmp_path / FILE).read_text()
    continued = scan(Solver(graph, statistics, options), units, probe, "p", levels=LEVELS, store=tmp_path)
    assert continued.measured == whole.measured and continued.solved == whole.solved
    opened = scan(Solver(graph, statistics, options), units, probe, "p", levels=LEVELS, store=tmp_path)
    assert opened.measured == whole.measured and opened.cost == continued.cost
    assert (tmp_path / FILE).read_text() != before
    for other in (
        {"options": SolveOptions("wanda")},
        {"prompts": "q"},
        {"levels": [0.5]},
        {"statistics": replace(statistics, fingerprint={**statistics.fingerprint, "seed": 9})},
    ):
        given = {"statistics": statistics, "options": options, "prompts": "p", "levels": LEVELS, **other}
        solver = Solver(graph, given.pop("statistics"), given.pop("options"))
        with pytest.raises(obsdiff.UserError, match="belongs to another model or other settings"):
            scan(solver, units, probe, store=tmp_path, **given)
    for pattern in ("2:4", "structured:0.5"):  # layers have the same names there, but other curves
        with pytest.raises(obsdiff.UserError, match="belongs to another model or other settings"):
            scan(
                Solver(graph, statistics, options), units_of(graph, pattern), probe, "p", levels=LEVELS, store=tmp_path
            )
    content = json.loads((tmp_path / FILE).read_text())
    del content["units"][units[0].name]["solved"]
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(obsdiff.UserError, match="damaged"):
        scan(Solver(graph, statistics, options), units, probe, "p", levels=LEVELS, store=tmp_path)


def test_an_interrupted_scan_keeps_what_it_has(setting, tmp_path, monkeypatch):
    from obsdiff.allocation import scan as module

    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")[:4]
    before = {name: tensor.clone() for name, tensor in graph.denoiser.state_dict().items()}
    monkeypatch.setattr(module, "SAVE_EVERY_S", -1.0)
    real, calls = Restart.error, []

    def fail_late(self):
        calls.append(self)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Restart, "error", fail_late)
    with pytest.raises(KeyboardInterrupt):
        scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", levels=LEVELS, store=tmp_path)
    assert len(json.loads((tmp_path / FILE).read_text())["units"]) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.denoiser.state_dict().items())


def test_members_of_a_unit_are_pruned_together(setting):
    _, graph, statistics, probe = setting
    [unit] = [found for found in units_of(graph, "unstructured:0.5", share=["*.to_k"]) if len(found.members) > 1]
    assert isinstance(unit, Unit) and unit.stage == 0 and len(unit.members) == 3
    options = SolveOptions("magnitude")
    found = scan(Solver(graph, statistics, options), [unit], probe, "", levels=[0.5])
    plan = Plan(obsdiff.Unstructured(0.5), dict.fromkeys(unit.members, obsdiff.Unstructured(0.5)))
    [error] = joint_errors(Solver(graph, statistics, options), [plan], probe)
    assert found.measured[unit.name][0.5] == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
def test_two_processes_find_the_same(setting, tmp_path, monkeypatch):
    """Each measures half of the layers, both end with all of them; and one clock decides for both."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch, obsdiff\n"
        "from tests.allocation.test_scan import *\n"
        "rank = int(sys.argv[1])\n"
        f"torch.distributed.init_process_group('gloo', f'file://{tmp_path}/meet', rank=rank, world_size=2)\n"
        "pipe = make_pipe(); call = call_arguments(pipe); graph = subject_of(pipe).graph\n"
        "statistics = obsdiff.calibrate(pipe, PROMPTS)\n"
        "probe = record_probe(subject_of(pipe), encode_prompts(pipe, PROMPTS, call), Settings(call), 6)\n"
        "units = units_of(graph, 'unstructured:0.5')[:7]\n"
        "found = scan(Solver(graph, statistics, SolveOptions('magnitude')), units, probe, '', levels=LEVELS,\n"
        f"             store=__import__('pathlib').Path({str(tmp_path)!r}) / 'store')\n"
        "from obsdiff.allocation import effort; effort.PRODUCTS = 12\n"
        "backward = scan(Solver(graph, statistics, SolveOptions('magnitude')), units, probe, '', by='backward')\n"
        "from obsdiff.allocation.allocate import allocate\n"
        "from obsdiff.allocation import latency\n"
        "from obsdiff.pruning.options import PruningOptions\n"
        "from tests.allocation.test_latency import Clocks\n"
        "clocks = Clocks(fixed=3000 * rank, table=1.1 + rank)\n"
        "latency.time_calls, latency.time_in_new_process = clocks.time_calls, clocks.time_in_new_process\n"
        "pattern = 'structured:heads=0.3,ffn=0.3,multiple_of=1'\n"
        "asked = PruningOptions(pattern=pattern, allocation='uniform', budget='latency:0.8', spare_blocks=[])\n"
        "plan = allocate(pipe, asked, statistics, PROMPTS,\n"
        f"                store={str(tmp_path / 'times')!r}).plan\n"
        "torch.distributed.barrier(); torch.distributed.destroy_process_group()\n"
        "plan = {k: str(p) for k, p in plan.entries.items()}\n"
        "print(json.dumps([found.measured, backward.measured, backward.predicted, plan], sort_keys=True))\n"
    )
    from pathlib import Path

    root = str(Path(__file__).parents[2])
    start = (
        f"import sys; sys.path.append({root!r}); sys.argv = ['two', sys.argv[1]]; exec(open({str(script)!r}).read())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", start, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    failures = b"\n".join(error[-2000:] for _, error in outputs).decode()
    assert all(process.returncode == 0 for process in running), failures
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    stored = json.loads((tmp_path / "store" / FILE).read_text())["units"]
    assert first == second and len(first[0]) == 7 and set(stored) == set(first[0])
    _, graph, statistics, probe = setting
    units = units_of(graph, "unstructured:0.5")[:7]
    monkeypatch.setattr(effort, "PRODUCTS", 12)
    alone = scan(Solver(graph, statistics, SolveOptions("magnitude")), units, probe, "", by="backward")
    for kind, ours in zip(first[1:3], (alone.measured, alone.predicted), strict=True):
        assert kind.keys() == ours.keys()
        for name, errors in ours.items():  # JSON has the shares as text
            assert list(kind[name]) == list(map(str, errors))
            assert list(kind[name].values()) == pytest.approx(list(errors.values()), rel=1e-4, abs=1e-12)
    assert len(json.loads((tmp_path / "times" / "latency.json").read_text())["times"]) > 3  # tables and choices
