"""Stages that go whole: which ones, that the shorter model is the one that skips them, and what goes on from it."""

import itertools
import json
import operator
from dataclasses import replace

import lightning
import pytest
import torch
from diffusers import DiffusionPipeline

import obsdiff
from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.request import check_values
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.cli.prune import main
from obsdiff.data.digits import DigitsDataModule
from obsdiff.export.inspection import inspect_run
from obsdiff.files import read_json
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import PipelineInfo, attach_info, call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import Depth
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, Limits, PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan, make_plan
from obsdiff.pruning.planfile import read_plan, write_plan
from obsdiff.training.options import Objective
from obsdiff.training.recovery import Recovery
from tests.conftest import CALL, make_pipe

PROMPTS = ["a seven", "a two", "a handwritten digit nine"]
FEW = CalibrationOptions(num_prompts=3)


def skipping(pipe, stages):
    """The whole pipeline, whose stages hand on what they read."""
    for name in stages:
        stage = pipe.transformer.get_submodule(name)
        stage.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    return pipe


def plainly(folder, **options):
    """What diffusers alone loads, called as the tiny pipeline is."""
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo("plain", CALL))
    return pipe


def removing(*stages):
    return Plan(Depth(len(stages)), {}, removed=stages)


def asking(pattern, **changes):
    return PruningOptions(pattern=pattern, calibration=FEW, **changes)


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2), (1, 2, 3)])
def test_the_shorter_model_is_the_one_that_skips(gone, images):
    stages = [f"transformer_blocks.{i}" for i in gone]
    whole = make_pipe(blocks=5)
    dense = sum(p.numel() for p in whole.transformer.parameters())
    held = sum(p.numel() for name in stages for p in whole.transformer.get_submodule(name).parameters())
    pipe = make_pipe(blocks=5)
    report = obsdiff.prune(pipe, removing(*stages))
    assert len(pipe.transformer.transformer_blocks) == pipe.transformer.config.num_layers == 5 - len(gone)
    assert torch.equal(images(pipe), images(skipping(make_pipe(blocks=5), stages)))
    assert report.parameters == {"dense": dense, "pruned": dense - held, "nonzero": dense - held}
    assert report.sparsity == pytest.approx(held / dense) and report.masks == {} and report.sparsity_per_layer == {}
    assert report.depth["kept"] == {"transformer_blocks": [i for i in range(5) if i not in gone]}


def test_what_lists_blocks_by_number_follows(images):
    """Of SD3.5-medium's blocks with a second attention the numbers move up."""
    stages = ["transformer_blocks.0", "transformer_blocks.2"]
    pipe = make_pipe(blocks=5, dual_attention_layers=(0, 1, 3))
    report = obsdiff.prune(pipe, removing(*stages))
    assert list(pipe.transformer.config.dual_attention_layers) == [0, 1]
    assert report.depth["config"] == {"": {"num_layers": 3, "dual_attention_layers": [0, 1]}}
    whole = make_pipe(blocks=5, dual_attention_layers=(0, 1, 3))
    assert torch.equal(images(pipe), images(skipping(whole, stages)))


def output_error(pipe, probe, stages):
    """Relative squared change of the guided output when these stages are skipped, calls weighted; call by call."""

    def outputs():
        with torch.no_grad():
            return [pipe.transformer(**call.arguments)[0].double() for call in probe.calls]

    def guided(out):
        return out[0] + probe.guidance * (out[1] - out[0])

    dense = outputs()
    kept = pipe.transformer.transformer_blocks
    pipe.transformer.transformer_blocks = torch.nn.ModuleList(
        block for i, block in enumerate(kept) if f"transformer_blocks.{i}" not in stages
    )
    changed = outputs()
    pipe.transformer.transformer_blocks = kept
    weights = [call.weight for call in probe.calls]
    off = [float((guided(a) - guided(b)).square().sum()) for a, b in zip(dense, changed, strict=True)]
    size = [float(guided(a).square().sum()) for a in dense]
    return sum(map(operator.mul, weights, off)) / sum(map(operator.mul, weights, size))


def test_the_choice_is_the_brute_force_one():
    pipe = make_pipe(blocks=6)
    found = obsdiff.allocate(pipe, asking("depth:3"), None, PROMPTS)
    call = call_arguments(pipe)
    probe = record_probe(subject_of(pipe), encode_prompts(pipe, PROMPTS, call), Settings(call), found.record["triples"])
    wanted, errors, alone = [], [], {}
    for _ in range(3):
        left = [f"transformer_blocks.{i}" for i in range(5)]  # the last one is of another kind
        errors_now = {name: output_error(pipe, probe, [*wanted, name]) for name in left if name not in wanted}
        alone = alone or errors_now
        wanted.append(min(errors_now, key=errors_now.get))
        errors.append(errors_now[wanted[-1]])
    assert found.plan.removed == tuple(wanted)
    assert found.record["errors"] == pytest.approx(errors, rel=1e-4)
    assert found.record["alone"] == pytest.approx(alone, rel=1e-4)
    best = min(itertools.combinations(left, 2), key=lambda pair: output_error(pipe, probe, pair))
    assert output_error(pipe, probe, best) <= errors[1] * 1.0001
    assert len(pipe.transformer.transformer_blocks) == pipe.transformer.config.num_layers == 6


def test_spared_stages_stay():
    found = obsdiff.allocate(make_pipe(blocks=6), asking("depth:2", spare_blocks=[0, 1, -1]), None, PROMPTS)
    assert set(found.record["alone"]) == {f"transformer_blocks.{i}" for i in (2, 3, 4)}


@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        (
            "depth:3",
            {},
            "3 of 3 stages, and at most 2 can go: one has to stay; transformer_blocks.2 stays: SD3",
        ),
        ("depth:7", {}, "asks for 7 of 3 stages"),
        ("depth:0.1", {}, "of 3 stages is none"),
        ("depth:2", {"spare_blocks": [0]}, "transformer_blocks.0 stays: it is spared"),
        ("depth:1", {"spare_blocks": [5]}, "blocks 0 to 2"),
        ("depth:1+structured:0.3", {"method": "wanda"}, "cannot prune heads"),
        ("depth:3+2:4", {}, "asks for 3 of 3"),
    ],
)
def test_what_cannot_be_met_is_refused(pattern, changes, message):
    pipe = make_pipe()
    with pytest.raises(obsdiff.UserError, match=message):
        prune_stage(pipe, asking(pattern, **changes), PROMPTS)
    assert pipe.transformer.config.num_layers == 3 and len(pipe.transformer.transformer_blocks) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "depth:1", "budget": "parameters:0.5"}, "says how many stages go; leave out --budget"),
        ({"pattern": "depth:1+structured", "budget": "latency:0.5"}, "in latency does not choose stages"),
        ({"pattern": "depth:1", "method": "wanda"}, "--method has no effect"),
        ({"pattern": "depth:1", "allocation": "measured"}, "--allocation has no effect"),
        ({"pattern": "depth:1", "exclude": ["*.0.*"]}, "--exclude has no effect"),
        ({"pattern": "depth:1", "limits": Limits(share=["*"])}, "--limits has no effect"),
        ({"pattern": "depth:1", "dead": "remove"}, "--dead remove has no effect"),
        ({"pattern": "depth:1", "scan": ScanOptions(levels=[0.5])}, "--scan.levels has no effect"),
        ({"pattern": "depth:1", "calibration": CalibrationOptions(tokens=4)}, "--calibration.tokens has no effect"),
    ],
)
def test_options_without_effect_are_refused_early(options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        check_values(PruningOptions(**options))


def test_folders_that_nothing_would_be_kept_in_are_refused(tmp_path):
    with pytest.raises(obsdiff.UserError, match="keeps no statistics"):
        prune_stage(make_pipe(), asking("depth:1"), PROMPTS, Folders(statistics=tmp_path / "s"))


def test_without_calls_there_is_no_choice(pipe):
    with pytest.raises(obsdiff.UserError, match=r"plan that obsdiff.allocate makes"):
        obsdiff.prune(pipe, "depth:1")
    with pytest.raises(obsdiff.UserError, match="prune by its plan, and allocate"):
        obsdiff.allocate(pipe, asking("depth:1+structured:0.3"), None, PROMPTS)
    with pytest.raises(obsdiff.UserError, match="no stage that can be removed"):
        obsdiff.prune(pipe, removing("transformer_blocks.9"))
    with pytest.raises(obsdiff.UserError, match="cannot be removed: SD3Transformer2DModel builds"):
        obsdiff.prune(pipe, removing("transformer_blocks.2"))


def test_blocks_that_form_no_chain_stay(pipe):
    """A block that reads what an earlier one gave, as in a U."""
    blocks, kept = pipe.transformer.transformer_blocks, []

    def keep(module, args, kwargs):
        kept.append(kwargs["hidden_states"])

    def skip(module, args, kwargs):
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + kept.pop()}

    blocks[1].register_forward_pre_hook(keep, with_kwargs=True)
    blocks[2].register_forward_pre_hook(skip, with_kwargs=True)
    with pytest.raises(obsdiff.UserError, match="runs as a chain, and a SD3Transformer2DModel has none"):
        prune_stage(pipe, asking("depth:1"), PROMPTS)


def test_a_failure_takes_everything_back(pipe, monkeypatch):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("obsdiff.allocation.stage.calibrate", fail)
    with pytest.raises(KeyboardInterrupt):
        prune_stage(pipe, asking("depth:1+unstructured:0.5", allocation="uniform"), PROMPTS)
    now = pipe.transformer.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
    assert pipe.transformer.config.num_layers == 3


def command(folder, output, pattern, *more):
    quick = ["--calibration.num_prompts", "3", "--evaluation.num_images", "2", "--evaluation.batch_size", "2"]
    main(["--pipeline", str(folder), "--output", str(output), "--pattern", pattern, *quick, *more])
    return read_json(output / "report.json", "a report")


@pytest.mark.slow
def test_the_folder_is_a_plain_one(pipe_folder, tmp_path, images, capsys):
    """Plain diffusers loads it by its config, and it draws the same; it can be inspected, and its plan repeats it."""
    report = command(pipe_folder, tmp_path / "out", "depth:1")
    assert "depth" in capsys.readouterr().out
    component = tmp_path / "out" / "pipeline" / "transformer"
    assert not list(component.glob("*.py"))
    config = json.loads((component / "config.json").read_text())
    assert config["num_layers"] == 2 and config["_class_name"] == "SD3Transformer2DModel" and "shrunk" not in config
    plain = plainly(tmp_path / "out" / "pipeline")
    assert type(plain.transformer).__name__ == "SD3Transformer2DModel"
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    assert torch.equal(images(plain), images(loaded))
    assert report["parameters"]["pruned"] < report["parameters"]["dense"] and report["rule"] == "uniform"
    assert report["flops"]["pruned"] < report["flops"]["dense"] and len(report["depth"]["errors"]) == 1
    [gone] = report["depth"]["removed"]
    assert f"1 of 3 stages removed: {gone}" in inspect_run(tmp_path / "out")
    assert f"first {gone} go" in inspect_run(tmp_path / "out" / "plan.yaml")
    again = command(pipe_folder, tmp_path / "again", "unstructured:0.5", "--plan", str(tmp_path / "out" / "plan.yaml"))
    assert again["depth"]["removed"] == [gone] and again["parameters"] == report["parameters"]
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "again")), images(loaded))


def test_a_changed_count_is_noticed(pipe_folder, tmp_path):
    command(pipe_folder, tmp_path / "out", "depth:1")
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    manifest["depth"]["config"][""]["num_layers"] = 1
    (tmp_path / "out" / "pruning.json").write_text(json.dumps(manifest))
    with pytest.raises(obsdiff.UserError, match="num_layers is not the 1 that the manifest says is left"):
        obsdiff.load_pipeline(tmp_path / "out")
    manifest["depth"] = None
    (tmp_path / "out" / "pruning.json").write_text(json.dumps(manifest))
    with pytest.raises(obsdiff.UserError, match="does not say which stages are removed"):
        obsdiff.load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("then", ["structured:0.5", "2:4", "structured:0.5+rank:4"])
def test_what_is_left_is_pruned_next(then, tmp_path, images):
    """One command does what two do: remove, then calibrate and prune the shorter model."""
    asked = asking(f"depth:2+{then}", allocation="uniform", spare_blocks=[0])
    pipe = make_pipe(blocks=5)
    report = prune_stage(pipe, asked, PROMPTS)
    stages = report.depth["removed"]
    assert str(report.pattern) == f"depth:2+{then}" and report.plan.removed == tuple(stages)
    two = make_pipe(blocks=5)
    obsdiff.prune(two, removing(*stages))
    second = obsdiff.prune(two, then, statistics=obsdiff.calibrate(two, PROMPTS), spare_blocks=[0])
    assert torch.equal(images(pipe), images(two))
    assert report.masks.keys() == second.masks.keys() and report.parameters["pruned"] == second.parameters["pruned"]
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "out")), images(pipe))
    plan = read_plan(tmp_path / "out" / "plan.yaml", subject_of(make_pipe(blocks=5)).graph)
    repeated = make_pipe(blocks=5)
    obsdiff.prune(repeated, plan, statistics=lambda sites: obsdiff.calibrate(repeated, PROMPTS, sites=sites))
    torch.testing.assert_close(images(repeated), images(pipe), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_a_plan_that_removes_stages_takes_dead_layers_too(pattern, tmp_path):
    """What is dead is told of the shorter model, whose last block is another one."""
    stage = "transformer_blocks.1"
    two = make_pipe(blocks=4)
    obsdiff.prune(two, removing(stage))
    options = {"method": "magnitude", "dead": "remove"}
    wanted = prune_stage(two, asking(pattern, allocation="uniform", **options), PROMPTS, prune_again=True)
    plain = make_plan(subject_of(two).graph, wanted.pattern) if pattern[0] == "u" else wanted.plan
    write_plan(replace(plain, removed=(stage,), dead=()), tmp_path / "plan.yaml", "SD3Transformer2DModel", None)
    pipe = make_pipe(blocks=4)
    found = prune_stage(pipe, asking(pattern, plan=str(tmp_path / "plan.yaml"), **options), PROMPTS)
    assert found.dead == wanted.dead and set(found.dead.values()) <= {"zero", "left"} and found.dead
    assert found.plan.dead == wanted.plan.dead and bool(found.plan.dead) is (pattern[0] == "u")
    there = two.transformer.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_it_allocates_what_is_left(tmp_path):
    pipe = make_pipe(blocks=5)
    report = prune_stage(pipe, asking("depth:1+structured:0.4", scan=ScanOptions(triples=6)), PROMPTS)
    assert report.plan.rule == "measured" and report.allocation["joint_error"] > 0
    assert len(report.depth["errors"]) == 1 and report.depth["triples"] == 6


@pytest.mark.parametrize("first", ["structured:0.5", "structured:0.5+rank:4", "depth:1"])
def test_depth_on_top_of_an_earlier_prune(first, tmp_path, images):
    """The description of what was cut before follows the blocks that move up."""
    pipe = make_pipe(blocks=5)
    report = prune_stage(pipe, asking(first, **({} if first == "depth:1" else {"allocation": "uniform"})), PROMPTS)
    obsdiff.save_pipeline(pipe, tmp_path / "first", report)
    pipe = obsdiff.load_pipeline(tmp_path / "first")
    with pytest.raises(obsdiff.UserError, match="pruned already"):
        prune_stage(pipe, asking("depth:1"), PROMPTS)
    found = obsdiff.allocate(pipe, asking("depth:1"), None, PROMPTS)
    removed = found.plan.removed
    whole = images(skipping(obsdiff.load_pipeline(tmp_path / "first"), removed))
    second = obsdiff.prune(pipe, found.plan, prune_again=True)
    assert torch.equal(images(pipe), whole)
    obsdiff.save_pipeline(pipe, tmp_path / "second", second)
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "second")), whole)
    plain = plainly(tmp_path / "second" / "pipeline", trust_remote_code=True)
    assert torch.equal(images(plain), whole)


@pytest.mark.slow
@pytest.mark.parametrize("given", [pytest.param("dense", marks=pytest.mark.slow), "folder"])
@pytest.mark.parametrize("objective", [Objective(distill_output=1.0, distill_features=0.1), Objective(denoise=1.0)])
def test_a_recovery_trains_what_is_left(given, objective, pipe_folder, tmp_path):
    options = asking("depth:1")
    source = pipe_folder
    if given == "folder":
        command(pipe_folder, tmp_path / "pruned", "depth:1")
        source, options = tmp_path / "pruned", None
    module = Recovery(
        str(source), str(tmp_path / "run"), options, objective, evaluation=EvaluationOptions(num_images=2, batch_size=2)
    )
    runner = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    runner.fit(module, datamodule=DigitsDataModule(batch_size=4))
    assert module.start.manifest["depth"]["of"] == 3 and module.start.masks == {}
    start = obsdiff.load_pipeline(module.start.folder).transformer.state_dict()
    trained = module.denoiser.state_dict()
    assert trained.keys() == start.keys() and any(not torch.equal(trained[name], start[name]) for name in start)
