"""The formulas of a memory plan, against what real solves and calls make."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from obsdiff.allocation.fitting import plan_from_configs
from obsdiff.criteria import METHODS
from obsdiff.criteria.base import GroupProblem
from obsdiff.criteria.structured import RULES
from obsdiff.models.live import Live, live_in
from obsdiff.obs.diagonal import Diagonal
from obsdiff.obs.hessian import Gram
from obsdiff.obs.pattern import parse_pattern
from obsdiff.obs.structured import Consumer, compensate
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.memory_plan import changed_bytes, cut_bytes, memory_plan, scan_bytes, solve_bytes, statistics_bytes
from obsdiff.pruning.memory_shapes import Batches, Scan, Shapes, SiteShape, Solving
from obsdiff.pruning.options import EvaluationOptions, PruneOptions
from obsdiff.pruning.solve import solve_layers


def inputs(columns):
    mixed = torch.randn(1, 3 * columns, columns) @ torch.randn(columns, columns) / columns**0.5
    return mixed + torch.randn(columns)


@pytest.mark.parametrize("method", ["obs", "obs-diff", "sparsegpt", "admm", "wanda", "dsnot", "magnitude"])
@pytest.mark.parametrize(("columns", "rows"), [(768, (64,)), (384, (384,)), (256, (256, 256, 512)), (192, (1536,))])
def test_a_solve_takes_what_is_planned(method, columns, rows):
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(columns, outputs) for i, outputs in enumerate(rows)}
    graph = SimpleNamespace(layer=layers.__getitem__, weight=lambda name: layers[name].weight)
    options = SolveOptions(method)
    gram = "gram" in options.needs
    statistics = (Gram if gram else Diagonal).empty(columns)
    statistics.add(inputs(columns), 1.0)
    held = statistics.comoment
    patterns = [parse_pattern("unstructured:0.5")] * len(rows)
    with Live() as live:
        solve_layers(graph, list(layers), patterns, statistics.released() if options.needs else None, options)
    site = SiteShape("layer0", columns, rows)
    solving = Solving(method, options.refits, gram, bool(options.needs), METHODS[method].centred)
    let_go = sum(strip.nbytes for strip in held) if gram else 0
    within = 0.25 if method != "admm" or rows != (64,) else 1.5  # LAPACK's workspace is planned, but not seen
    assert solve_bytes(site, solving) == pytest.approx(live.peak - let_go, rel=within)


@pytest.mark.parametrize("changed", ["no bias", "kept statistics", "bfloat16", "no refit"])
def test_a_solve_takes_more_where_more_is_held(changed):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if changed == "bfloat16" else torch.float32
    layer = nn.Linear(384, 384, bias=changed != "no bias").to(dtype)
    graph = SimpleNamespace(layer=lambda name: layer, weight=lambda name: layer.weight)
    options = SolveOptions("obs", False if changed == "no refit" else None)
    statistics = Gram.empty(384)
    statistics.add(inputs(384), 1.0)
    once = changed != "kept statistics"
    with Live() as live:
        given = statistics.released() if once else statistics
        solve_layers(graph, ["layer"], [parse_pattern("unstructured:0.5")], given, options)
    site = SiteShape("layer", 384, (384,), biased=changed != "no bias")
    # Without a refit nothing takes up the mean.
    centred = METHODS["obs"].centred and options.refits
    solving = Solving("obs", options.refits, True, centred=centred, once=once)
    let_go = sum(strip.nbytes for strip in statistics.comoment) if once else 0
    assert solve_bytes(site, solving, dtype.itemsize) == pytest.approx(live.peak - let_go, rel=0.25)


@pytest.mark.parametrize("rule", ["obs", "obs-diff"])
@pytest.mark.parametrize(("columns", "rows", "streams"), [(768, 64, 1), (512, 512, 1), (512, 512, 2)])
def test_cutting_units_takes_what_is_planned(rule, columns, rows, streams):
    torch.manual_seed(0)
    consumers = []
    for _ in range(streams):
        x = inputs(columns)[0]
        consumers.append(Consumer(torch.randn(rows, columns), x.T @ x / len(x)))
    problem = GroupProblem(consumers, [], columns // 64, 64, columns // 128, "reciprocal_rank", 0.01, 0)
    with Live() as live:
        kept = RULES[rule](problem).repeat_interleave(64)
        for consumer in consumers:
            compensate(consumer.weight, consumer.hessian, kept)
    sites = [SiteShape(f"stream{i}", columns, (rows,), masked=False, cut=True) for i in range(streams)]
    solving = Solving(rule, True, True, centred=True)
    # what was there before: dense weights in float32, and Hessians, for whose sake their strips are let go
    strips = sum(map(math.prod, Gram.shapes(1, columns)))
    beside = sum(4 * (rows * columns + columns**2 - strips) for _ in sites)
    assert cut_bytes(sites, solving) == pytest.approx(live.peak + beside, rel=0.5)


@pytest.mark.parametrize("columns", [48, 300, 2_500])
def test_statistics_and_changes_are_counted_to_the_byte(columns):
    gram, diagonal = Gram.empty(columns, 2), Diagonal.empty(columns, 2)
    for observer, whole in ((gram, True), (diagonal, False)):
        held = sum(t.numel() * t.element_size() for t in (*observer.comoment, observer.centre))
        assert statistics_bytes(SiteShape("conv", columns, (8,), groups=2), Solving("obs", True, whole)) == held
    site = SiteShape("layer", 10, (4, 6))
    assert site.weights == 100
    assert changed_bytes(site, 2) == (200, 13)
    cut = SiteShape("layer", 10, (4,), masked=False, cut=True, kept=0.5, producers=30)
    assert changed_bytes(cut, 4) == ((20 + 30) * 4, 0)


SITES = tuple(SiteShape(name, 100, (50,)) for name in ("a", "b", "c"))
SHAPES = Shapes({"transformer": 60_000, "vae": 1_000}, 4, SITES, 700, 900, 5_000, 300, 2_000, 40, 12, 10**6)
SOLVING = Solving("obs", True, True, centred=True)


def plan(packages=(("a", "b", "c"),), prompts=2, images=8, solving=SOLVING, **more):
    given = {"prompts": 10, "images": 16, "on_host": True} | more
    return memory_plan(SHAPES, solving, Batches(prompts, images, packages), **given)


def moment(planned, name):
    return next(found for found in planned.moments if found.name == name)


def test_the_moments_of_a_run():
    planned = plan()
    own = statistics_bytes(SITES[0], SOLVING)
    calibrating = moment(planned, "calibrating, pass 1 of 1")
    assert calibrating.device == {"weights": 61_000, "changed weights": 0, "Hessians": 3 * own, "activations": 1_800}
    assert calibrating.host == {"process": 10**6, "images": 192, "prompts": 400, "masks": 0}
    assert moment(planned, "drawing").device["activations"] == 8 * 2_000
    last = moment(planned, "solving c")
    assert last.device["changed weights"] == 2 * 50 * 100 * 4 and last.host["masks"] == 2 * 50 * 100 / 8
    assert last.device["Hessians"] == own  # the others were let go
    every = [sum(m.device.values()) + sum(m.host.values()) for m in planned.moments]
    assert planned.host_bytes == max(every) and planned.device_bytes == 0


def test_the_host_and_a_device_of_its_own_are_counted_apart():
    planned = plan(on_host=False)
    assert planned.device_bytes == max(sum(m.device.values()) for m in planned.moments)
    assert planned.host_bytes == max(sum(m.host.values()) for m in planned.moments)
    assert moment(planned, "loading").host == {"process": 10**6, "weights": 61_000}  # read there first


def test_packages_hold_the_statistics_of_their_own_sites():
    planned = plan((("a",), ("b", "c")))
    own = statistics_bytes(SITES[0], SOLVING)
    second = moment(planned, "calibrating, pass 2 of 2")
    assert second.device["Hessians"] == 2 * own and second.device["changed weights"] == 50 * 100 * 4
    assert planned.host_bytes < plan().host_bytes


def test_a_store_holds_all_statistics_on_disk():
    planned = plan(solving=Solving("obs", True, True, centred=True, once=False, stored=True))
    own = statistics_bytes(SITES[0], SOLVING)
    assert planned.store_bytes == 3 * own
    # solves are kept then: on the disk results, masks and dense weights, and no dense weight beside its new one
    assert planned.kept_bytes == 3 * 50 * 100 * (4 + 1 + 4) + 3 * 50 * 100 // 8 and plan().kept_bytes == 0
    last = moment(planned, "solving c")
    assert last.device["changed weights"] == last.host["masks"] == 0
    assert moment(planned, "writing").host["masks"] == 3 * 50 * 100 // 8  # all at once
    assert moment(planned, "solving a").device["Hessians"] == own
    reused = plan(solving=Solving("obs", True, True, centred=True, once=False, stored=True, reused=True))
    assert not [m for m in reused.moments if m.name.startswith("calibrating")]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_each_process_has_on_the_disk_counts_as_often(on_disk):
    """Solves are written once; dense weights that they replace, weights that rest and masks by every process."""
    solving = Solving("obs", True, True, centred=True, once=False, stored=True)

    def planned(processes):
        given = {"prompts": 10, "images": 16, "on_host": True, "processes": processes}
        shapes = replace(SHAPES, on_disk=on_disk)
        return memory_plan(shapes, solving, Batches(2, 8, (("a", "b", "c"),)), **given)

    weights, one, four = 3 * 50 * 100, planned(1), planned(4)
    assert four.kept_bytes == weights * 5 + 4 * (weights // 8 + (0 if on_disk else 4 * weights))
    assert one.kept_bytes == weights * 5 + weights // 8 + (0 if on_disk else 4 * weights)
    assert one.resting_bytes == (61_000 + 4 * weights if on_disk else 0)
    assert four.resting_bytes == 4 * one.resting_bytes
    assert four.host_bytes == one.host_bytes and four.store_bytes == one.store_bytes


def test_a_scan_holds_all_levels_of_a_stage():
    scan = Scan(4, 12, 32, (5_000, 10_000), 800)
    planned = plan(scan=scan, solving=Solving("obs", True, True, centred=True, once=False))
    held = moment(planned, "scanning").device["scan"]
    assert held == scan_bytes(scan, SHAPES, Solving("obs", True, True, centred=True, once=False))
    assert held > 12 * 10_000 * 5 + 800


def test_ranks_are_tried_beside_the_statistics_that_chose_them(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="rank:8", allocation="uniform",
        evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    planned = plan_from_configs(asked, "cpu")
    moments = {moment.name: moment for moment in planned.memory.moments}
    ranked = [site for site in planned.shapes.sites if site.ranked]
    own = sum(statistics_bytes(site, SOLVING) for site in ranked)
    assert ranked and moments["calibrating, pass 1 of 1"].device["Hessians"] == own
    assert moments["trying ranks"].device["Hessians"] == 2 * own
    plain = plan_from_configs(replace(asked, pattern="structured:0.5"), "cpu")
    assert "trying ranks" not in {moment.name for moment in plain.memory.moments}


def test_a_hybrid_keeps_all_statistics_until_its_weights_are_solved(pipe_folder):
    """Single weights go by the moments that units were chosen by."""
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="structured:0.5+2:4", allocation="uniform",
        evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    held = {}
    for pattern in ("structured:0.5+2:4", "structured:0.5"):
        planned = plan_from_configs(replace(asked, pattern=pattern), "cpu")
        moments = [moment for moment in planned.memory.moments if moment.name.startswith(("calibrating", "solving"))]
        held[pattern] = [moment.device["Hessians"] for moment in moments]
    assert len(set(held["structured:0.5+2:4"])) == 1 < len(set(held["structured:0.5"]))


def test_what_is_alive_is_counted_and_views_are_not():
    kept = []

    def call():
        x = torch.ones(100)  # 400 bytes
        y = x * 2
        del x
        kept.append(y[:50])
        z = y.add_(1).view(10, 10) @ torch.ones(10, 10)
        return z

    live = live_in(call)
    assert live.peak == 400 * 3  # y, the matrix, their product
    assert live.made == 400 * 4
    assert live.now == 400  # what is kept of y


def test_a_call_without_weights_makes_what_it_makes_with_them():
    def call(device):
        torch.manual_seed(0)
        with torch.device(device):
            layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.zeros(2, 16, 32)
            query = torch.zeros(2, 4, 64, 8)
        return live_in(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query) + 1), live_in(
            lambda: layer.linear2(torch.relu(layer.linear1(x)))
        )

    for real, meta in zip(call("cpu"), call("meta"), strict=True):
        assert meta.peak == pytest.approx(real.peak, rel=0.1)
