"""Ranks of vectors: what is asked for, what is refused, what is reported, and what goes on from them."""

import lightning
import pytest
import torch

import obsdiff
from obsdiff.allocation import rank_check
from obsdiff.allocation.request import check_values
from obsdiff.allocation.stage import prune_stage
from obsdiff.data.digits import DigitsDataModule
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import Structured, parse_pattern
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions
from obsdiff.pruning.planfile import read_plan, write_plan
from obsdiff.training.options import Objective
from obsdiff.training.recovery import Recovery
from tests.conftest import make_pipe

PROMPTS = ["a seven", "a two", "a handwritten digit nine"]
NAME, TEXT = "transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear"


@pytest.fixture(scope="module")
def statistics():
    return obsdiff.calibrate(make_pipe(), PROMPTS)


@pytest.mark.parametrize(
    ("text", "kept", "kinds"),
    [
        ("rank:5", 5, ("rank",)),
        ("rank:0.25", 4, ("rank",)),
        ("rank:5/16", 5, ("rank",)),
        ("rank:5+structured:0.3", 5, ("heads", "ffn", "channels", "rank")),
    ],
)
def test_patterns(text, kept, kinds):
    pattern = parse_pattern(text)
    assert pattern.kept("rank", 16) == kept and pattern.kinds == kinds
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.of("rank", 16) == Structured(0.0, 0.0, rank=kept, width=16)
    assert pattern.of("rank", 16).sparsity == 1 - kept / 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank:0", "rank is 0; it must be"),
        ("rank:-3", "rank is -3; it must be"),
        ("rank:2.5", "rank is 2.5; it must be"),
        ("rank:17/16", "cannot be above the width"),
        ("rank:a", "cannot read 'a'"),
        ("rank:8+2:4", "joins what cannot be joined"),
        ("rank:8+rank:4", "joins what cannot be joined"),
    ],
)
def test_impossible_patterns(text, message):
    with pytest.raises(obsdiff.UserError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "structured+rank"}, "has no number; give one, or --budget"),
        ({"pattern": "rank:4", "allocation": "owl", "budget": "parameters:0.9"}, "owl does not say how ranks"),
        ({"pattern": "structured:0.3+rank:4", "budget": "latency:0.9"}, "ranks hardly change latency"),
    ],
)
def test_requests_that_are_refused_early(options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        check_values(PruningOptions(**options))


def test_what_a_denoiser_has_not_is_refused(statistics):
    pipe = make_pipe()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with pytest.raises(obsdiff.UserError, match="rank above the width 16"):
        obsdiff.prune(pipe, "rank:17", statistics=statistics)
    with pytest.raises(obsdiff.UserError, match="a rank needs statistics"):
        obsdiff.prune(pipe, "rank:4", method="magnitude")
    diagonal = obsdiff.calibrate(pipe, PROMPTS, needs=["diagonal"])
    with pytest.raises(obsdiff.UserError, match="hold only the diagonal"):
        obsdiff.prune(pipe, "rank:4", method="magnitude", statistics=diagonal)
    now = pipe.transformer.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["obs", "wanda", "magnitude"])
def test_a_rank_does_not_depend_on_the_method(statistics, method):
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "rank:4", method=method, statistics=statistics)
    groups = [subject_of(make_pipe()).graph.group_of[name] for name in (NAME, TEXT)]
    layers = {layer for group in groups for layer in group.layers}
    assert report.masks.keys() == {NAME, TEXT} and report.layer_error.keys() == layers
    lost = sum(12 * make_pipe().transformer.get_submodule(n).weight.shape[0] for n in layers) - 2 * 4 * 16
    assert report.parameters["dense"] - report.parameters["pruned"] == lost
    assert [basis.weight.shape for basis in pipe.transformer.bases.children()] == [(4, 16), (4, 16)]
    with pytest.raises(obsdiff.UserError, match="none in its blocks that is whole"):
        obsdiff.prune(pipe, "rank:2", statistics=statistics, prune_again=True)


def test_a_whole_rank_needs_no_basis(statistics, tmp_path, images):
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "rank:16", statistics=statistics)
    assert report.parameters["pruned"] == report.parameters["dense"] and not hasattr(pipe.transformer, "bases")
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "out")), images(make_pipe()))


def test_the_stage_tries_other_prompts_and_says_so(tmp_path):
    options = PruningOptions(pattern="rank:4", calibration=CalibrationOptions(num_prompts=3))
    report = prune_stage(make_pipe(), options, PROMPTS)
    assert report.ranks.keys() == {NAME, TEXT}
    for found in report.ranks.values():
        assert found["rank"] == 4 and found["width"] == 16
        assert 0 < found["input_left_out"] < 1 and 0 < found["error"] < found["error_held_out"]


def test_other_prompts_are_weighed_as_those_of_the_calibration(monkeypatch):
    seen = []
    calibrate = rank_check.calibrate
    monkeypatch.setattr(rank_check, "calibrate", lambda *a, **given: seen.append(given) or calibrate(*a, **given))
    settings = CalibrationOptions(num_prompts=3, weighting="linear_increase", tokens=2, steps=2)
    prune_stage(make_pipe(), PruningOptions(pattern="rank:4", calibration=settings), PROMPTS)
    (given,) = seen
    assert (given["weighting"], given["tokens"], given["steps"]) == ("linear_increase", 2, 2)


def test_plans_keep_ranks(statistics, tmp_path):
    pipe = make_pipe()
    options = PruningOptions(pattern="structured+rank", budget="parameters:0.8")
    plan = obsdiff.allocate(pipe, options, statistics, PROMPTS).plan
    assert NAME in plan.entries
    report = obsdiff.prune(pipe, plan, statistics=statistics)
    assert report.parameters["pruned"] <= 0.8 * report.parameters["dense"]
    write_plan(plan, tmp_path / "plan.yaml", "SD3Transformer2DModel", None)
    graph = subject_of(make_pipe()).graph
    assert read_plan(tmp_path / "plan.yaml", graph).entries == plan.entries
    (tmp_path / "plan.yaml").write_text(f"pattern: rank:4\nlayers: {{{NAME}: rank:40}}\n")
    with pytest.raises(obsdiff.UserError, match="has 16 directions"):
        read_plan(tmp_path / "plan.yaml", graph)


def test_a_flops_budget_counts_what_a_basis_costs(statistics):
    pipe = make_pipe()
    options = PruningOptions(pattern="structured+rank", budget="flops:0.8")
    found = obsdiff.allocate(pipe, options, statistics, PROMPTS)
    assert found.record["achieved"] <= 0.8


def test_a_recovery_trains_what_is_left(pipe_folder, tmp_path):
    options = PruningOptions(pattern="structured:0.3+rank:4", calibration=CalibrationOptions(num_prompts=3, steps=2))
    module = Recovery(
        str(pipe_folder),
        str(tmp_path / "run"),
        options,
        Objective(denoise=1.0),
        evaluation=EvaluationOptions(num_images=0),
    )
    runner = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    runner.fit(module, datamodule=DigitsDataModule(batch_size=4))
    start = obsdiff.load_pipeline(tmp_path / "run" / "pruned").transformer.bases.get_submodule("0").weight
    trained = module.denoiser.bases.get_submodule("0").weight
    assert trained.shape == start.shape and len(start) < 16 and not torch.equal(trained, start)
