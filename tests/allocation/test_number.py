"""How many stages go under a budget: the number of least measured error, every number tried by hand."""

import math

import pytest
import torch

import obsdiff
from obsdiff.allocation.allocate import allocate
from obsdiff.allocation.budget import dense_cost
from obsdiff.allocation.depth import probe_of
from obsdiff.allocation.request import check_values
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.stage import prune_stage
from obsdiff.cli.prune import main
from obsdiff.files import read_json
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import Depth, parse_request
from obsdiff.pruning.options import CalibrationOptions, PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan
from tests.conftest import make_pipe

PROMPTS = ["a seven", "a two", "a handwritten digit nine"]
FEW = CalibrationOptions(num_prompts=3)


def asking(pattern, budget, **changes):
    scan = ScanOptions(triples=6)
    return PruningOptions(pattern=pattern, budget=budget, calibration=FEW, scan=scan, **changes)


@pytest.mark.parametrize("text", ["depth", "depth+structured:0.5", "depth:1+structured:0.5+rank:0.25+2:4"])
def test_patterns(text):
    found = parse_request(text)
    assert isinstance(found, Depth) and parse_request(str(found)) == found
    assert (found.amount is None) == text.startswith(("depth+", "depth")) ^ ("depth:" in text)


@pytest.mark.parametrize(
    ("pattern", "budget", "message"),
    [
        ("depth+structured", None, "has no number; give one, or --budget"),
        ("depth", None, "has no number; give one, or --budget"),
        ("depth+structured", "sparsity:0.5", "in sparsity does not choose stages; use parameters"),
        ("depth+structured", "latency:0.5", "in latency does not choose stages; use parameters"),
        ("depth:1", "parameters:0.5", "says how many stages go; leave out --budget"),
        ("depth+2:4", "parameters:0.5", r"not with 2:4 alone; use depth\+structured\+2:4"),
        ("depth+depth:1", "parameters:0.5", "needs one number of stages"),
    ],
)
def test_requests_that_are_refused_early(pattern, budget, message):
    with pytest.raises(obsdiff.UserError, match=message):
        check_values(asking(pattern, budget))


def by_hand(stages, options, budget):
    """Error of the guided output with these stages removed and the rest allocated, all on pipelines of their own."""
    whole = make_pipe(blocks=4)
    subject = subject_of(whole)
    restart = Restart(subject.graph, probe_of(subject, Depth(None), options, PROMPTS))
    total = sum(p.numel() for p in whole.transformer.parameters())
    pipe = make_pipe(blocks=4)
    if stages:
        obsdiff.prune(pipe, Plan(Depth(len(stages)), {}, removed=tuple(stages)))
    left = sum(p.numel() for p in pipe.transformer.parameters())
    if left > budget * total:
        share = f"parameters:{budget * total / left}"
        own = PruningOptions(pattern="structured+rank", budget=share, calibration=FEW, scan=options.scan)
        statistics = obsdiff.calibrate(pipe, PROMPTS)
        plan = allocate(pipe, own, statistics, PROMPTS).plan
        obsdiff.prune(pipe, plan, statistics=statistics, prune_again=True)
    error = 0.0
    power = 0.0
    for (_, arguments, weights), dense in zip(restart.probe.batches(), restart.dense, strict=True):
        with torch.no_grad():
            now = restart.probe.guided(pipe.transformer(**arguments)[0], len(weights))
        error += float((weights * (now - dense).square().flatten(1).sum(1)).sum())
        power += float((weights * dense.square().flatten(1).sum(1)).sum())
    return error / power


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.8, 0.5])
def test_every_number_is_what_it_is_by_hand(budget):
    options = asking("depth+structured+rank", f"parameters:{budget}")
    pipe = make_pipe(blocks=4)
    report = prune_stage(pipe, options, PROMPTS)
    stages = report.allocation["stages"]
    errors = [trial["error"] for trial in stages["tried"]]
    assert [len(trial["removed"]) for trial in stages["tried"]] == list(range(len(errors)))
    for trial in stages["tried"]:
        if trial["error"] is not None and len(trial["removed"]) < 2:
            assert trial["error"] == pytest.approx(by_hand(trial["removed"], options, budget), rel=2e-2)
    known = [math.inf if error is None else error for error in errors]
    best = known.index(min(known))
    assert len(known) == best + 2 or best == len(known) - 1
    assert list(report.plan.removed) == stages["tried"][best]["removed"]
    assert len(pipe.transformer.transformer_blocks) == 4 - best
    dense = sum(p.numel() for p in make_pipe(blocks=4).transformer.parameters())
    assert 0.95 * budget * dense < report.parameters["pruned"] <= budget * dense or not report.plan.entries
    assert report.parameters["dense"] == dense and report.plan.budget == f"parameters:{budget}"
    assert any(note.startswith("stages removed of 4") for note in report.notes)


@pytest.mark.parametrize("kind", [pytest.param("bytes", marks=pytest.mark.slow), "flops"])
def test_other_budgets_are_of_the_whole_denoiser(kind):
    """A fixed number of stages, and what the rest has to lose for the whole to meet the budget."""
    pipe = make_pipe(blocks=4)
    before = dense_cost(subject_of(pipe), kind, call_arguments(pipe))
    report = prune_stage(pipe, asking("depth:1+structured", f"{kind}:0.6"), PROMPTS)
    now = dense_cost(subject_of(pipe), kind, call_arguments(pipe))
    assert len(report.plan.removed) == 1 and 0.55 * before < now <= 0.6 * before
    assert report.allocation["achieved"] == pytest.approx(now / before, abs=1e-6)


def test_depth_alone_removes_as_many_as_the_budget_asks():
    pipe = make_pipe(blocks=5)
    dense = sum(p.numel() for p in pipe.transformer.parameters())
    block = sum(p.numel() for p in pipe.transformer.transformer_blocks[0].parameters())
    share = 1 - 1.5 * block / dense
    report = prune_stage(pipe, asking("depth", f"parameters:{share}"), PROMPTS)
    assert len(pipe.transformer.transformer_blocks) == 3 and report.parameters["pruned"] == dense - 2 * block
    assert str(report.pattern) == "depth:2" and report.plan.entries == {}


def test_what_cannot_be_met_is_refused_and_nothing_changes():
    pipe = make_pipe(blocks=3)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with pytest.raises(obsdiff.UserError, match=r"parameters:0\.01 cannot be met with up to 2 stages removed"):
        prune_stage(pipe, asking("depth+structured", "parameters:0.01"), PROMPTS)
    now = pipe.transformer.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.slow
def test_the_whole_way(pipe_folder, tmp_path, images):
    """From the command line, with folders that are kept, single weights after it; loads again, and says what it did."""
    arguments = [
        "--pipeline", str(pipe_folder), "--pattern", "depth+structured+rank+2:4", "--budget", "parameters:0.6",
        "--calibration.num_prompts", "3", "--scan.triples", "4", "--evaluation.num_images", "2",
        "--statistics", str(tmp_path / "stats"), "--sensitivity", str(tmp_path / "scan"),
    ]  # fmt: skip
    main([*arguments, "--output", str(tmp_path / "out")])
    manifest = read_json(tmp_path / "out" / "pruning.json", "a manifest")
    report = read_json(tmp_path / "out" / "report.json", "a report")
    assert manifest["parameters"]["pruned"] <= 0.6 * manifest["parameters"]["dense"]
    assert report["allocation"]["stages"]["tried"][0]["removed"] == []
    drawn = images(obsdiff.load_pipeline(tmp_path / "out"))
    assert torch.isfinite(drawn).all()
    assert (tmp_path / "stats").is_dir() and (tmp_path / "stats-without-1").is_dir()
    main([*arguments, "--output", str(tmp_path / "again")])
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "again")), drawn)
