"""Low rank of what queries, keys and values read: the best there is, what a budget counts, what is refused."""

import re

import pytest
import torch

import obsdiff
from obsdiff.allocation.budget import dense_cost
from obsdiff.allocation.candidates import Solver
from obsdiff.allocation.request import check_values, parse_budget
from obsdiff.allocation.stage import prune_stage
from obsdiff.export.summary import rank_rows
from obsdiff.models.graph import group_parameters
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import Depth, Structured, parse_pattern
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.plan import Plan, reading_directions
from obsdiff.pruning.planfile import read_plan, write_plan
from tests.conftest import make_pipe

PROMPTS = ["a seven", "a two", "a handwritten digit nine"]
TEXT, IMAGE = "transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def statistics():
    return obsdiff.calibrate(make_pipe(), PROMPTS, weighting="uniform")


@pytest.fixture(scope="module")
def graph():
    return subject_of(make_pipe()).graph


def inputs_of(layer):
    """All that a layer reads while the calibration's images are drawn, float64 (rows, inputs)."""
    subject, rows = subject_of(make_pipe()), []
    _ = subject.trace  # its call is none of the calibration's
    handle = subject.denoiser.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].flatten(0, -2).double())
    )
    obsdiff.calibrate(subject, PROMPTS, weighting="uniform")
    handle.remove()
    return torch.cat(rows)


def test_patterns():
    pattern = parse_pattern("lowrank:5+rank:0.5+structured:0.3")
    assert pattern == Structured(0.3, 0.3, channels=0.3, rank=0.5, lowrank=5)
    assert pattern.kinds == ("heads", "ffn", "channels", "rank", "lowrank")
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.of("lowrank", 16) == Structured(0.0, 0.0, lowrank=5, width=16)
    assert pattern.of("rank", 16) == Structured(0.0, 0.0, rank=8, width=16)
    assert pattern.of("ffn", 16) == Structured(0.3, 0.3, channels=0.3)
    alone = parse_pattern("rank:4+lowrank:0.25")
    assert alone.kinds == ("rank", "lowrank") and not alone.cuts and str(alone) == "rank:4+lowrank:0.25"


def test_what_reads_the_stream_has_directions_and_what_is_cut_has_none(graph):
    """Attention's inputs, each stream's alone; not what heads make, nor what neurons read or give."""
    found = {group.name: group.layers for group in graph.groups if group.kind == "lowrank"}
    block = "transformer_blocks.0.attn"
    assert found[IMAGE] == tuple(f"{block}.{name}" for name in ("to_q", "to_k", "to_v"))
    assert set(found[TEXT]) == {f"{block}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
    assert not any(part in name for name in found for part in ("to_out", "to_add_out", "ff"))


@pytest.mark.parametrize("rank", [2, 5])
def test_no_map_of_this_rank_loses_less(statistics, graph, rank):
    """Reduced-rank regression (Izenman 1975) on everything that was read, by a singular value decomposition."""
    pipe, group = make_pipe(), graph.group_of[IMAGE]
    report = obsdiff.prune(pipe, f"lowrank:{rank}", statistics=statistics, include=[IMAGE], spare_blocks=())
    assert report.masks.keys() == {IMAGE} and int(report.masks[IMAGE].sum()) == rank
    x = inputs_of(IMAGE)
    x = x - x.mean(0)
    lost = total = 0.0
    stacked = torch.cat([graph.weight(layer).detach().double() for layer in group.layers])
    for layer in group.layers:
        new, old = pipe.transformer.get_submodule(layer), graph.layer(layer)
        mapped = new.weight.double() @ new.projection[0].weight.double()
        lost += float((x @ (mapped - old.weight.double()).T).square().sum())
        total += float((x @ old.weight.double().T).square().sum())
    values = torch.linalg.svdvals(x @ stacked.T).square()
    assert lost / total == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-3)
    mean = inputs_of(IMAGE).mean(0)  # what the mean loses is in the bias
    for layer in group.layers:
        new, old = pipe.transformer.get_submodule(layer), graph.layer(layer)
        mapped = new.weight.double() @ new.projection[0].weight.double()
        expected = old.weight.double() @ mean + old.bias.double()
        torch.testing.assert_close(mapped @ mean + new.bias.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "budget",
    [
        "parameters:0.55",
        pytest.param("bytes:0.55", marks=pytest.mark.slow),
        "flops:0.6",
        pytest.param("sparsity:0.45", marks=pytest.mark.slow),
    ],
)
def test_a_budget_counts_once_what_heads_and_directions_share(statistics, graph, budget):
    """Rows and columns of one layer: the tables take both whole, the budget is met all the same."""
    pipe = make_pipe()
    options = PruningOptions(pattern="structured+rank+lowrank", budget=budget)
    found = obsdiff.allocate(pipe, options, statistics, PROMPTS)
    report = obsdiff.prune(pipe, found.plan, statistics=statistics)
    kind, wanted = parse_budget(budget).kind, parse_budget(budget).share
    cut = {graph.group_of[name].kind for name, mask in report.masks.items() if not mask.all()}
    assert "heads" in cut and ("lowrank" in cut or kind == "flops")
    now, before = (dense_cost(subject_of(one), kind, call_arguments(one)) for one in (pipe, make_pipe()))
    share = 1 - now / before if kind == "sparsity" else now / before
    assert found.record["achieved"] == pytest.approx(share, rel=1e-9)
    assert share >= wanted if kind == "sparsity" else share <= wanted


def test_a_rank_that_makes_nothing_smaller_is_none(statistics, graph):
    """16 inputs, three layers of 16 outputs: a basis pays below 12; one layer that needs fewer may stay whole."""
    group = graph.group_of[TEXT]
    assert group_parameters(graph, group, 11) < group_parameters(graph, group, 16) <= group_parameters(graph, group, 12)
    with pytest.raises(obsdiff.UserError, match="makes nothing smaller"):
        obsdiff.prune(make_pipe(), "lowrank:15", statistics=statistics)
    with pytest.raises(obsdiff.UserError, match="rank above the width 16"):
        obsdiff.prune(make_pipe(), "lowrank:17", statistics=statistics)
    with pytest.raises(obsdiff.UserError, match="a rank needs statistics"):
        obsdiff.prune(make_pipe(), "lowrank:4", method="magnitude")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "lowrank"}, "has no number; give one, or --budget"),
        ({"pattern": "lowrank:0"}, "lowrank is 0; it must be"),
        ({"pattern": "lowrank:4+lowrank:2"}, "joins what cannot be joined"),
        ({"pattern": "structured:0.3+lowrank:4", "budget": "latency:0.9"}, "ranks hardly change latency"),
        ({"pattern": "lowrank:4", "allocation": "owl", "budget": "parameters:0.9"}, "owl does not say how ranks"),
    ],
)
def test_requests_that_are_refused_early(options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        check_values(PruningOptions(**options))


def test_plans_keep_directions_where_they_belong(statistics, graph, tmp_path):
    options = PruningOptions(pattern="structured+lowrank", budget="parameters:0.8")
    plan = obsdiff.allocate(make_pipe(), options, statistics, PROMPTS).plan
    write_plan(plan, tmp_path / "plan.yaml", "SD3Transformer2DModel", None)
    assert read_plan(tmp_path / "plan.yaml", graph).entries == plan.entries
    for name, pattern, use in (
        (TEXT, "rank:4", "lowrank:RANK"),
        (TEXT, "structured:0.5", "lowrank:RANK"),
        ("transformer_blocks.0.attn", "lowrank:4", "structured:RATIO"),
    ):
        (tmp_path / "plan.yaml").write_text(f"pattern: structured:0.5+lowrank:4\nlayers: {{{name}: '{pattern}'}}\n")
        with pytest.raises(obsdiff.UserError, match=f"does not go with {name}; use {use}"):
            read_plan(tmp_path / "plan.yaml", graph)


def test_single_weights_of_what_reads_directions_stay(statistics):
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "lowrank:4+2:4", statistics=statistics, spare_blocks=())
    layer = pipe.transformer.get_submodule(TEXT)
    assert hasattr(layer, "basis") and bool((layer.weight != 0).all())
    feed = pipe.transformer.get_submodule("transformer_blocks.0.ff.net.2").weight
    assert float((feed == 0).float().mean()) == pytest.approx(0.5)
    assert any("keep all their weights" in note for note in report.notes)


def test_the_stage_tries_other_prompts_and_says_where_most_is_lost():
    options = PruningOptions(pattern="rank:4+lowrank:4", calibration=CalibrationOptions(num_prompts=3), spare_blocks=[])
    report = prune_stage(make_pipe(), options, PROMPTS)
    tokens = {name: found for name, found in report.ranks.items() if found["kind"] == "lowrank"}
    assert {TEXT, IMAGE} <= tokens.keys() and len(report.ranks) == len(tokens) + 2
    assert all(0 < found["error"] < 1 and "error_held_out" in found for found in tokens.values())
    *vectors, (named, figures) = rank_rows({"ranks": report.ranks})
    worst = max(tokens, key=lambda name: tokens[name]["error"])
    assert (
        [kind for kind, _ in vectors] == ["rank", "rank"]
        and named == "lowrank"
        and f"{len(tokens)} inputs" in figures
        and worst in figures
    )


def test_more_can_be_done_to_what_reads_directions(statistics):
    """Its layers are no part of later plans and statistics; blocks can still go."""
    pipe = make_pipe()
    obsdiff.prune(pipe, "rank:4+lowrank:4", statistics=statistics, spare_blocks=())
    graph = subject_of(pipe).graph
    assert not {TEXT, IMAGE} & graph.layers.keys() and not any(group.basis for group in graph.groups)
    again = obsdiff.calibrate(pipe, PROMPTS)
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=again, prune_again=True)
    assert report.sparsity == pytest.approx(0.5, abs=1e-2)
    stacks = subject_of(pipe).stacks
    assert stacks and stacks == subject_of(pipe).stacks
    shorter = obsdiff.prune(pipe, Plan(Depth(1), {}, removed=("transformer_blocks.1",)), prune_again=True)
    assert len(pipe.transformer.transformer_blocks) == 2 and shorter.parameters["pruned"] < shorter.parameters["dense"]


def test_members_of_a_share_are_all_measured(statistics, graph):
    names = [group.name for group in graph.groups if group.kind == "lowrank"][:3]
    solver = Solver(graph, statistics, SolveOptions())
    [found] = solver.candidates(names, [Structured(0.0, 0.0, lowrank=4, width=16)])
    assert found.layers.keys() == {layer for name in names for layer in graph.group_of[name].layers}


def test_single_weights_go_where_an_allocation_left_the_directions(statistics):
    options = PruningOptions(pattern="structured+lowrank+2:4", budget="parameters:0.9")
    plan = obsdiff.allocate(make_pipe(), options, statistics, PROMPTS).plan
    graph = subject_of(make_pipe()).graph
    reading = reading_directions(graph, plan)
    assert plan.weights.keys() == graph.layers.keys() - reading and len(reading) < len(graph.layers)


@pytest.mark.parametrize("method", ["magnitude", "l1", "obs"])
def test_heads_are_chosen_as_without_directions(statistics, method):
    """Rows before columns: what a head weighs is its dense weight, whatever becomes of what it reads."""
    kept = {}
    for pattern in ("structured:heads=0.5,ffn=0", "structured:heads=0.5,ffn=0+lowrank:6"):
        report = obsdiff.prune(make_pipe(), pattern, method=method, statistics=statistics, spare_blocks=())
        kept[pattern] = {name: mask.tolist() for name, mask in report.masks.items() if name.endswith(".attn")}
    assert len(set(map(str, kept.values()))) == 1


def test_without_a_budget_the_uniform_plan_says_what_stays(statistics, graph):
    options = PruningOptions(pattern="structured:0.5+lowrank:0.25", spare_blocks=[])
    found = obsdiff.allocate(make_pipe(), options, statistics, PROMPTS)
    uniform = obsdiff.prune(make_pipe(), options.pattern, statistics=statistics, spare_blocks=())
    share = uniform.parameters["pruned"] / uniform.parameters["dense"]
    assert parse_budget(found.record["budget"]).share == pytest.approx(share, rel=1e-4)


def test_the_least_that_is_named_can_be_had(statistics):
    options = PruningOptions(pattern="structured+rank+lowrank", budget="parameters:0.02")
    with pytest.raises(obsdiff.UserError, match=r"the least is ([\d.]+)%") as refused:
        obsdiff.allocate(make_pipe(), options, statistics, PROMPTS)
    least = float(re.search(r"the least is ([\d.]+)%", str(refused.value))[1]) / 100
    options = PruningOptions(pattern="structured+rank+lowrank", budget=f"parameters:{least + 1e-4}")
    assert obsdiff.allocate(make_pipe(), options, statistics, PROMPTS).record["achieved"] <= least + 1e-4
