"""Stage by stage: inputs of the pruned prefix, targets of the dense model, zeros that stay, nothing that gets worse."""

import copy
from dataclasses import replace

import pytest
import torch

from obsdiff.allocation.stage import Folders, calibration_prompts, prune_stage
from obsdiff.costs import calibration_cost
from obsdiff.diffusion.distill import feature_loss
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.export.run import prune_run
from obsdiff.models.info import call_arguments
from obsdiff.models.nested import tensors_in
from obsdiff.models.subject import subject_of
from obsdiff.paths import unfinished_stages
from obsdiff.pruning import reconstruct as reconstructing
from obsdiff.pruning.finished import remove_finished
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.options import (
    CalibrationOptions,
    EvaluationOptions,
    PruneOptions,
    PruningOptions,
    ReconstructionOptions,
)
from obsdiff.pruning.reconstruct import Call, Pair, _Way, reconstruct
from tests.conftest import make_pipe

HOW = ReconstructionOptions(steps=20, lr=1e-2, triples=24, batch_size=4)


def call_of(pipe, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = pipe.transformer.config
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    return Call(
        "",
        {
            "hidden_states": torch.randn(shape, generator=generator),
            "encoder_hidden_states": torch.randn(rows, 6, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(rows, config.pooled_projection_dim, generator=generator),
            "timestep": torch.full((rows,), 300.0),
            "return_dict": False,
        },
        rows,
    )


def pruned_by_half():
    """A pipeline whose transformer lost half of its weights, its masks, and the dense one."""
    pipe = make_pipe()
    dense = copy.deepcopy(pipe.transformer)
    report = prune_stage(pipe, PruningOptions(method="magnitude"), [])
    return pipe, report.masks, dense


@torch.no_grad()
def test_a_stage_reads_the_pruned_prefix_and_aims_at_the_dense_one():
    """Against a forward pass written out with hooks that stop nothing."""
    pipe, _, dense = pruned_by_half()
    call, seen = call_of(pipe), {}
    for name, model in (("pruned", pipe.transformer), ("dense", dense)):
        stage = model.transformer_blocks[1]
        handle = stage.register_forward_hook(
            lambda module, args, kwargs, out, name=name: seen.update({name: (kwargs, out)}), with_kwargs=True
        )
        model(**call.arguments)
        handle.remove()
    stages = {stage: stage for stage in subject_of(pipe).graph.stages}
    [(args, kwargs, wanted, _)] = _Way(Pair(pipe.transformer, dense, stages, {}), [call]).examples(
        *["transformer_blocks.1"] * 2
    )
    assert not args and torch.equal(kwargs["hidden_states"], seen["pruned"][0]["hidden_states"])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(wanted, seen["dense"][1], strict=True))
    assert not torch.equal(wanted[0], seen["pruned"][1][0])


def test_errors_fall_zeros_stay_and_what_is_said_is_what_is():
    pipe, masks, dense = pruned_by_half()
    graph = subject_of(pipe).graph
    calls = [call_of(pipe, seed=seed) for seed in range(10)]
    before = {name: parameter.clone() for name, parameter in pipe.transformer.named_parameters()}
    stages = {stage: stage for stage in graph.stages}
    found = reconstruct(Pair(pipe.transformer, dense, stages, masks), calls, ReconstructionOptions(30, 1e-2))
    assert list(found) == list(graph.stages) and all(error.after < error.before for error in found.values())
    for layer, mask in masks.items():
        assert not pipe.transformer.get_parameter(f"{layer}.weight")[~mask].any()
    outside = [name for name in before if not name.startswith(tuple(f"{stage}." for stage in graph.stages))]
    assert outside and all(torch.equal(pipe.transformer.get_parameter(name), before[name]) for name in outside)
    assert all(p.grad is None for p in pipe.transformer.parameters())
    last = graph.stages[-1]  # its inputs did not change after it was trained
    losses = []
    for args, kwargs, wanted, _ in _Way(Pair(pipe.transformer, dense, stages, {}), calls[::5]).examples(last, last):
        stage = pipe.transformer.get_submodule(last)
        with torch.no_grad():
            answer = stage(*args, **kwargs)
        mine = [part for part in answer if isinstance(part, torch.Tensor)]
        losses.append(float(feature_loss(mine, wanted, robust=False)))
    assert found[last].after == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@torch.no_grad()
def test_examples_are_the_same_whatever_is_held_of_the_stages_before():
    """With every stage's answer held, and with the latest alone; stages that run once more after they were seen."""
    pipe, _, dense = pruned_by_half()
    stages = {stage: stage for stage in subject_of(pipe).graph.stages}
    calls = [call_of(pipe, seed=seed) for seed in range(2)]
    ways = [_Way(Pair(pipe.transformer, dense, stages, {}, chains), calls) for chains in ((), {"transformer_blocks"})]
    ran = []
    for block in (*pipe.transformer.transformer_blocks, *dense.transformer_blocks):
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    for stage in stages:
        plain, passing = (way.examples(stage, stage) for way in ways)
        for mine, theirs in zip(plain, passing, strict=True):
            assert all(map(torch.equal, tensors_in(mine), tensors_in(theirs)))
    for way in ways:
        for model, made in way._calls.items():
            real = [name for name, answer in made[0].answers.items() if not next(tensors_in(answer)).is_meta]
            assert len(real) == len(stages) - (model is pipe.transformer) if way is ways[0] else len(real) == 1
    once = len(calls) * (2 * len(stages) - 1)  # through both models; the last stage of the pruned one never has to run
    assert len(ran) == 2 * once


def test_a_stage_that_training_makes_worse_keeps_its_weights():
    pipe, masks, dense = pruned_by_half()
    before = copy.deepcopy(pipe.transformer.state_dict())
    stages = {stage: stage for stage in subject_of(pipe).graph.stages}
    calls = [call_of(pipe, seed=seed) for seed in range(4)]
    found = reconstruct(Pair(pipe.transformer, dense, stages, masks), calls, ReconstructionOptions(5, 1e3))
    assert all(error.after == error.before for error in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    "pattern",
    [
        "unstructured:0.7",
        pytest.param("2:4", marks=pytest.mark.slow),
        pytest.param("structured:0.5", marks=pytest.mark.slow),
        "structured:0.25+rank:4",
        "depth:1",
    ],
)
def test_through_the_stage_with_what_it_cost(pattern):
    options = PruningOptions(
        pattern=pattern,
        allocation=None if pattern == "depth:1" else "uniform",
        spare_blocks=[],
        calibration=CalibrationOptions(num_prompts=6),
        reconstruction=replace(HOW, lr=1e-3),
    )
    pipe, plain = make_pipe(), make_pipe()
    prompts = calibration_prompts(pipe, options)
    report = prune_stage(pipe, options, prompts)
    other = prune_stage(plain, replace(options, reconstruction=ReconstructionOptions()), prompts)
    assert other.reconstruction is None and report.masks.keys() == other.masks.keys()
    assert all(torch.equal(report.masks[name], other.masks[name]) for name in other.masks)
    found = report.reconstruction
    stages = subject_of(pipe).graph.stages
    assert list(found["stages"]) == list(stages) and all(after <= before for before, after in found["stages"].values())
    assert any(after < before for before, after in found["stages"].values())
    # 6 prompts x 3 steps recorded; 18 triples of two rows in 5 calls, once through both models, and one call of each;
    # 20 steps of three passes; the call held out before and after
    call = call_arguments(pipe)
    dense, pruned = (denoiser_flops(subject_of(each), call) for each in (make_pipe(), pipe))
    through, held = 36 + 36 / 5, 8
    wanted = dense * (36 + through) + pruned * (through + 3 * 20 * 36 / 5 + 2 * held)
    assert found["calls"] == 5 and found["denoiser_flops"] == pytest.approx(wanted)
    counted = calibration_cost({"reconstruction": found, "time_s": report.time_s}, 1, 2)["reconstruction"]
    assert counted.denoiser_flops == found["denoiser_flops"] and counted.device_s == 2 * report.time_s["reconstruct"]
    assert report.time_s["reconstruct"] > 0


def test_too_few_calls_are_refused_before_anything_is_pruned():
    pipe = make_pipe()
    before = copy.deepcopy(pipe.transformer.state_dict())
    options = PruningOptions(
        method="magnitude",
        calibration=CalibrationOptions(num_prompts=2),
        reconstruction=replace(HOW, batch_size=100),
    )
    with pytest.raises(UserError, match="two batches at least"):
        prune_stage(pipe, options, ["the digit one", "the digit two"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_zeros_of_an_earlier_prune_stay_and_are_counted():
    pipe = make_pipe()
    prune_stage(pipe, PruningOptions(method="magnitude"), [])
    options = PruningOptions(
        pattern="depth:1", calibration=CalibrationOptions(num_prompts=6), reconstruction=replace(HOW, lr=1e-3)
    )
    report = prune_stage(pipe, options, calibration_prompts(pipe, options), prune_again=True)
    assert any(after < before for before, after in report.reconstruction["stages"].values())
    layers = subject_of(pipe).graph.layers
    weights = [pipe.transformer.get_parameter(f"{layer}.weight") for layer in layers]
    assert weights and all(int((weight == 0).sum()) >= weight.numel() // 2 for weight in weights)
    assert report.parameters["nonzero"] == sum(int(p.count_nonzero()) for p in pipe.transformer.parameters())


class Killed(Exception):
    """In the place of a signal."""


def prune_to(store, monkeypatch, dies_at=None, options=None):
    """Weights, report and how many stages were trained by a run that keeps what it finishes, and may die."""
    options = options or PruningOptions(
        pattern="structured:0.25+rank:4",
        allocation="uniform",
        spare_blocks=[],
        calibration=CalibrationOptions(num_prompts=6),
        reconstruction=replace(HOW, lr=1e-3),
    )
    real, trained = reconstructing._train, []

    def train(*args):
        if len(trained) == dies_at:
            raise Killed
        trained.append(1)
        return real(*args)

    pipe = make_pipe()
    with monkeypatch.context() as patch:
        patch.setattr(reconstructing, "_train", train)
        report = prune_stage(pipe, options, calibration_prompts(pipe, options), Folders(reconstruction=store))
    return pipe.transformer.state_dict(), report, len(trained)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return prune_to(tmp_path_factory.mktemp("whole") / "stages", patch)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1])
def test_a_killed_run_goes_on_with_the_first_stage_that_is_not_finished(whole, tmp_path, monkeypatch, after):
    weights, report, count = whole
    with pytest.raises(Killed):
        prune_to(tmp_path / "stages", monkeypatch, dies_at=after)
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == after
    (tmp_path / "stages" / f"{after:03d}.safetensors").write_bytes(b"torn")  # no write of ours leaves this
    found, again, trained = prune_to(tmp_path / "stages", monkeypatch)
    assert trained == count - after and found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert again.reconstruction == report.reconstruction and again.time_s["reconstruct"] > 0
    remove_finished(tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_stages_of_other_settings_or_models_are_not_taken(whole, tmp_path, monkeypatch):
    """Neither of another learning rate, nor of other weights, calls or masks."""
    pipe, masks, dense = pruned_by_half()
    stages = {stage: stage for stage in subject_of(pipe).graph.stages}
    calls = [call_of(pipe, seed=seed) for seed in range(3)]
    start, options = copy.deepcopy(pipe.transformer.state_dict()), ReconstructionOptions(2, 1e-3)

    def trained(own=calls, covered=masks, changed=options, seed=0):
        count, real = [], reconstructing._train
        with monkeypatch.context() as patch:
            patch.setattr(reconstructing, "_train", lambda *args: (count.append(1), real(*args))[1])
            reconstruct(
                Pair(pipe.transformer, dense, stages, covered), own, changed, seed=seed, store=tmp_path / "stages"
            )
        pipe.transformer.load_state_dict(start)
        return len(count)

    everything = len(stages)
    assert trained() == everything and trained() == 0
    assert trained(changed=ReconstructionOptions(2, 2e-3)) == everything and trained() == everything
    assert trained(own=[call_of(pipe, seed=9), *calls[1:]]) == everything
    assert trained(own=[replace(calls[0], rows=1), *calls[1:]]) == everything
    fewer = {name: mask for number, (name, mask) in enumerate(masks.items()) if number}
    assert trained(covered=fewer) == everything and trained(seed=1) == everything and trained(seed=1) == 0
    with torch.no_grad():
        dense.proj_out.bias[0] += 1e-3
    assert trained(seed=1) == everything
    start["proj_out.bias"][0] += 1e-3
    pipe.transformer.load_state_dict(start)
    assert trained(seed=1) == everything


def test_a_place_that_holds_something_else_is_refused_before_anything_is_pruned(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        prune_to(tmp_path / "stages", monkeypatch)
    assert (tmp_path / "stages" / "notes.txt").read_text() == "mine"


def test_a_prune_run_keeps_its_stages_beside_the_output_until_it_is_written(pipe_folder, tmp_path, monkeypatch):
    options = PruneOptions(
        pipeline=str(pipe_folder),
        output=str(tmp_path / "run"),
        method="magnitude",
        calibration=CalibrationOptions(num_prompts=6),
        reconstruction=replace(HOW, lr=1e-3),
        evaluation=EvaluationOptions(num_images=0),
    )
    real, trained = reconstructing._train, []

    def train(*args):
        if len(trained) == 1:
            raise Killed
        trained.append(1)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reconstructing, "_train", train)
        prune_run(load_pipeline(str(pipe_folder)), options, quiet=True)
    stages = unfinished_stages(str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == [stages.name] and (stages / "000.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(reconstructing, "_train", lambda *args: (trained.append(1), real(*args))[1])
        report = prune_run(load_pipeline(str(pipe_folder)), options, quiet=True)
    assert len(trained) == len(report["reconstruction"]["stages"]) and not stages.exists()
    assert (tmp_path / "run" / "pruning.json").exists()


def test_without_memory_it_says_what_takes_less_and_prunes_no_second_time(monkeypatch):
    pipe, tried = make_pipe(), []

    def fail(*_, **__):
        tried.append(1)
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("obsdiff.allocation.reconstruction.reconstruct", fail)
    options = PruningOptions(method="magnitude", calibration=CalibrationOptions(num_prompts=6), reconstruction=HOW)
    with pytest.raises(UserError, match=r"use a smaller --reconstruction\.batch_size"):
        prune_stage(pipe, options, calibration_prompts(pipe, options), prune_again=True)
    assert len(tried) == 1
