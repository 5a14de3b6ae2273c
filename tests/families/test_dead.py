"""Layers that reach no output: found, reported, and removed for nothing where that is asked for."""

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.allocation.stage import prune_stage
from obsdiff.cli.main import main
from obsdiff.export.inspection import inspect_run
from obsdiff.files import read_json
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import subject_of
from obsdiff.models.tracing import dead_layers
from obsdiff.obs.pattern import Unstructured
from obsdiff.pruning.dead import without_dead
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.plan import make_plan
from obsdiff.pruning.planfile import read_plan, write_plan
from tests.families.pipelines import PIPELINES, PROMPTS
from tests.families.test_bad_input import make, told

WITH_TEXT = ("sd3", "qwen-image")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_last_stage_holds_all_that_are_dead(name):
    """As the rows say, which gradients of every weight prove; looking at all stages finds no more."""
    row = PIPELINES[name]
    subject = subject_of(make(name), told(name))
    before = [p.requires_grad for p in subject.denoiser.parameters()]
    prefix = "transformer." if len(row.denoisers) > 1 else ""
    expected = {prefix + layer for layer in row.dead} & subject.graph.layers.keys()
    assert set(subject.dead) == expected
    assert set(dead_layers(subject.denoiser, subject.call, list(subject.graph.site_of))) == expected
    assert [p.requires_grad for p in subject.denoiser.parameters()] == before
    assert not any(module._forward_hooks for module in subject.denoiser.modules())


def whole(name):
    """A pipeline with its text encoders."""
    row = PIPELINES[name]
    pipe = row.build()
    call = {key: value for key, value in row.call.items() if key != "output_type"}
    attach_info(pipe, PipelineInfo(row.pipeline, call))
    return pipe


def pruned(name, **options):
    pipe = whole(name)
    calibration = CalibrationOptions(num_prompts=1)
    report = prune_stage(pipe, PruningOptions(calibration=calibration, **options), list(PROMPTS[:1]))
    return pipe, report


def answer(subject, denoiser):
    with torch.no_grad():
        return denoiser(**subject.call[""])[0]


@pytest.mark.parametrize("name", WITH_TEXT)
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "unstructured:0.5", "method": "obs", "allocation": "uniform"},
        {"pattern": "2:4", "method": "magnitude"},
    ],
)
def test_dead_layers_become_zero_and_nothing_changes(name, options):
    plain, reported = pruned(name, **options)
    pipe, report = pruned(name, **options, dead="remove")
    dead = set(PIPELINES[name].dead) & {
        n for n, m in subject_of(plain).denoiser.named_modules() if isinstance(m, nn.Linear)
    }
    assert report.dead == dict.fromkeys(report.dead, "zero") and reported.dead == dict.fromkeys(reported.dead, "left")
    assert set(report.dead) == set(reported.dead) == dead
    for layer in dead:
        module = subject_of(pipe).denoiser.get_submodule(layer)
        assert not module.weight.any() and (module.bias is None or not module.bias.any())
        assert (
            not report.masks[layer].any() and report.sparsity_per_layer[layer] == 1 and layer not in report.layer_error
        )
        assert subject_of(plain).denoiser.get_submodule(layer).weight.any()
    subject = subject_of(plain)
    torch.testing.assert_close(
        answer(subject, subject_of(pipe).denoiser), answer(subject, subject_of(plain).denoiser), rtol=0, atol=0
    )
    assert report.sparsity > reported.sparsity


def test_they_are_not_looked_for_where_that_is_not_wanted():
    _, report = pruned("qwen-image", pattern="2:4", method="magnitude", dead="ignore")
    assert report.dead == {}


def test_structured_plans_cut_modules_of_nothing_else(tmp_path):
    """Qwen-Image's last text network keeps one neuron though its block is spared; its heads serve the image as well."""
    pipe, report = pruned("qwen-image", pattern="structured:0.5", method="magnitude", dead="remove")
    assert report.masks["transformer_blocks.2.txt_mlp"].sum() == 8  # the multiple that widths are kept to
    assert report.masks.keys().isdisjoint({"transformer_blocks.2.attn", "transformer_blocks.2.img_mlp"})
    fates = {layer.rpartition("2.")[2]: fate for layer, fate in report.dead.items()}
    assert fates["attn.to_add_out"] == fates["attn.add_q_proj"] == "left"
    assert {fate for layer, fate in report.dead.items() if "txt_mlp" in layer} == {"cut"}
    plain, _ = pruned("qwen-image", pattern="structured:0.5", method="magnitude")
    subject = subject_of(plain)
    torch.testing.assert_close(
        answer(subject, subject_of(pipe).denoiser), answer(subject, subject_of(plain).denoiser), rtol=0, atol=0
    )
    kept, _ = pruned("qwen-image", pattern="structured:0.5", method="magnitude", dead="remove", exclude=["*.txt_mlp"])
    assert subject_of(kept).denoiser.transformer_blocks[2].txt_mlp.net[2].in_features > 8
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    torch.testing.assert_close(answer(subject, subject_of(loaded).denoiser), answer(subject, subject_of(pipe).denoiser))


def test_plan_files_know_them(tmp_path):
    graph = subject_of(whole("sd3")).graph
    (layer,) = PIPELINES["sd3"].dead
    plan = without_dead(graph, make_plan(graph, Unstructured(0.5)), [layer])
    write_plan(plan, tmp_path / "plan.yaml", graph.family.denoiser, None)
    assert read_plan(tmp_path / "plan.yaml", graph).dead == (layer,)
    text = (tmp_path / "plan.yaml").read_text().replace(f"- {layer}", "- nothing")
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(obsdiff.UserError, match="dead is a list; it must be a list of layers that the plan names"):
        read_plan(tmp_path / "plan.yaml", graph)


def test_the_command_says_so(pipe_folder, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--pattern", "2:4", "--method", "magnitude", "--evaluation.num_images", "0", "--device", "cpu"]
    main(["prune", "--pipeline", str(pipe_folder), "--output", str(output), *options, "--dead", "remove"])
    layer = "transformer_blocks.2.attn.add_q_proj"
    assert "; 1 dead layer made zero\n" in capsys.readouterr().out
    for shown in ((output / "report.md").read_text(), inspect_run(output)):
        assert f"{layer}: made zero" in shown
    found = [read_json(output / file, "")["dead"] for file in ("pruning.json", "report.json")]
    assert found == [{layer: "zero"}, {layer: "zero"}]
    assert obsdiff.load_pipeline(output) is not None
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "b"), "--dead", "bury"])
    assert "unknown choice dead 'bury'; choose one of report, remove, ignore" in capsys.readouterr().err
