"""Weights that rest on the host: whatever is read of a block is read while it is on the device."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.allocation.fitting import CONTEXT_BYTES, RUN_BYTES, open_unloaded, plan_from_configs, plan_loaded
from obsdiff.allocation.shapes import bytes_at_hand, component_bytes
from obsdiff.allocation.stage import prune_stage
from obsdiff.cli.main import main
from obsdiff.export.memory_report import full_plan
from obsdiff.memory import resident_memory_bytes
from obsdiff.models import offload as offloading
from obsdiff.models.denoisers import device_of
from obsdiff.models.offload import Turns, is_offloaded, offload, turns_of
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import (
    CalibrationOptions,
    EvaluationOptions,
    PruneOptions,
    PruningOptions,
    ReconstructionOptions,
)
from obsdiff.pruning.stream import Stream
from obsdiff.pruning.surgery import undone_on_error
from tests.conftest import make_pipe
from tests.families.pipelines import PIPELINES, each
from tests.pruning.test_stream import of_family

AWAY = 7.0


class Emptied(Turns):
    """In place of a second device: weights that are away read as something else."""

    def __init__(self, device):
        super().__init__(device, None)
        self.kept, self.moves = {}, []

    def away(self, module):
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self.kept:
                self.kept[id(tensor)] = tensor, tensor.data
                tensor.data = torch.full_like(tensor.data, AWAY)

    def back(self, module):
        for tensor in (*module.parameters(), *module.buffers()):
            if (found := self.kept.pop(id(tensor), None)) is not None:
                tensor.data = found[1]

    def give(self, module):
        if self._there is not module:
            if self._there is not None:
                self.away(self._there)
            self.back(module)
            self.moves.append(module)
            self._there = module

    def lend(self, part):
        self.back(part)


@pytest.fixture
def emptied(monkeypatch):
    """Offloads a pipeline so; returns what takes turns."""
    made = []
    monkeypatch.setattr(offloading, "Turns", lambda device, _: made.append(Emptied(device)) or made[-1])

    def away(pipe):
        offload(pipe, "cpu")
        for module in turns_of(pipe):
            made[-1].away(module)
        return made[-1]

    return away


def weights_of(pipe, turns=None):
    for module in turns_of(pipe) if turns is not None else ():
        turns.back(module)
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_a_streamed_prune_reads_and_writes_blocks_while_they_are_there(prompts, emptied, pattern):
    plain, pipe = make_pipe(), make_pipe()
    wanted = obsdiff.prune(plain, pattern, statistics=obsdiff.stream(plain, prompts))
    turns = emptied(pipe)
    found = obsdiff.prune(pipe, pattern, statistics=obsdiff.stream(pipe, prompts))
    assert found.layer_error == wanted.layer_error
    for name, mask in wanted.masks.items():
        assert torch.equal(found.masks[name], mask)
    weights = weights_of(pipe, turns)
    for name, tensor in weights_of(plain).items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("name", each(PIPELINES))
def test_other_families_too(name, emptied):
    """Two kinds of blocks in a row, blocks that answer later ones, two denoisers, a head that asks a block's part."""
    plain, told, pattern = of_family(name)
    pipe, *_ = of_family(name)
    wanted = obsdiff.prune(plain, pattern, statistics=obsdiff.stream(plain, told))
    turns = emptied(pipe)
    found = obsdiff.prune(pipe, pattern, statistics=obsdiff.stream(pipe, told))
    assert found.layer_error == wanted.layer_error
    for module in turns_of(pipe):
        turns.back(module)
    for model, other in zip(subject_of(pipe).components.values(), subject_of(plain).components.values(), strict=True):
        weights = model.state_dict()
        for key, tensor in other.state_dict().items():
            assert torch.equal(weights[key], tensor), key


def test_a_block_moves_twice_while_it_is_measured_and_solved_and_goes_on(prompts, emptied):
    pipe = make_pipe()
    turns = emptied(pipe)
    stream = obsdiff.stream(pipe, prompts)
    subject = stream.subject
    subject.check(list(subject.graph.layers))
    calls, blocks = len(stream.record()), list(pipe.transformer.transformer_blocks)
    turns.moves.clear()
    obsdiff.prune(subject, "unstructured:0.5", statistics=stream)
    moved = [turns.moves.count(block) for block in blocks]
    assert calls > 3 and max(moved) <= 2


def test_without_statistics_too(emptied):
    plain, pipe = make_pipe(), make_pipe()
    obsdiff.prune(plain, "unstructured:0.5", method="magnitude")
    turns = emptied(pipe)
    obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    weights = weights_of(pipe, turns)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(plain).items())


def test_replaced_weights_wait_on_the_host_and_come_back_to_where_the_block_is():
    layer = nn.Linear(4, 4)
    dense = layer.weight.detach().clone()
    with pytest.raises(RuntimeError), undone_on_error(None, on_host=True) as edits:
        edits.set_weight(layer, torch.zeros(4, 4))
        ((_, kept),) = edits._old.values()
        assert kept.device == torch.device("cpu") and torch.equal(kept, dense)
        layer.to("meta")  # as if it had left meanwhile
        raise RuntimeError("gone")
    assert layer.weight.is_meta


def test_a_block_that_does_not_fit_leaves_nothing_there():
    moves = []

    class Large(nn.Module):
        def to(self, device):
            moves.append(str(device))
            if str(device) == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")

    turns, small = Turns(torch.device("cuda")), nn.Module()
    with pytest.raises(torch.OutOfMemoryError):
        turns.give(Large())
    assert moves == ["cuda", "cpu"]
    small.to = lambda device: moves.append(f"small {device}")
    turns.give(small)
    assert moves[2:] == ["small cuda"]


def test_what_needs_it_whole_is_refused(pipe, prompts, pipe_folder):
    statistics = obsdiff.calibrate(pipe, prompts)
    offload(pipe, "cpu")
    with pytest.raises(obsdiff.UserError, match=r"of all layers at once needs the denoiser whole.*obsdiff\.stream"):
        obsdiff.calibrate(pipe, prompts)
    with pytest.raises(obsdiff.UserError, match="a solve from statistics of all layers needs"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics)
    with pytest.raises(obsdiff.UserError, match="an allocation needs"):
        obsdiff.allocate(pipe, PruningOptions(pattern="unstructured:0.5"), statistics, prompts)
    with pytest.raises(obsdiff.UserError, match="is offloaded already"):
        offload(pipe, "cpu")
    asked = PruneOptions(pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", offload=True)
    with pytest.raises(obsdiff.UserError, match=r"add --calibration\.streamed true"):
        plan_from_configs(asked, "cuda")


def test_the_same_images(prompts, images, emptied):
    wanted = images(make_pipe())
    pipe = make_pipe()
    emptied(pipe)
    assert torch.equal(images(pipe), wanted)


def test_what_fails_leaves_the_weights_as_they_were(prompts, emptied, monkeypatch):
    pipe = make_pipe()
    dense = weights_of(pipe)
    turns = emptied(pipe)
    stream, asked = obsdiff.stream(pipe, prompts), []
    measure = Stream.__call__

    def failing(self, sites):
        asked.append(sites)
        if len(asked) == 2:
            raise RuntimeError("gone")
        return measure(self, sites)

    monkeypatch.setattr(Stream, "__call__", failing)
    with pytest.raises(RuntimeError, match="gone"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=stream)
    found = weights_of(pipe, turns)
    assert len(asked) == 2 and all(torch.equal(found[name], tensor) for name, tensor in dense.items())


def test_one_module_is_on_the_device_at_a_time():
    moves = []

    class Told(nn.Module):
        def to(self, device):
            moves.append((self.name, str(device)))
            return self

    one, two = Told(), Told()
    one.name, two.name = "one", "two"
    turns = Turns(torch.device("cuda"))
    for module in (one, one, two, two, one):
        turns.give(module)
    assert moves == [
        ("one", "cuda"), ("one", "cpu"), ("two", "cuda"), ("two", "cpu"), ("one", "cuda"),
    ]  # fmt: skip


def test_where_it_runs_is_told_and_copies_take_no_turns(pipe):
    offload(pipe, "cpu")
    pipe.transformer._hf_hook.execution_device = torch.device("meta")
    assert device_of(pipe.transformer) == torch.device("meta") and is_offloaded(pipe.transformer)
    assert not is_offloaded(copy.deepcopy(pipe.transformer))
    pipe.remove_all_hooks()
    assert not is_offloaded(pipe.transformer) and device_of(pipe.transformer) == torch.device("cpu")


def test_what_the_device_holds_is_the_largest_of_what_takes_turns_and_what_does_not(pipe_folder):
    subject = open_unloaded(str(pipe_folder), None)
    pipe = subject.pipe
    blocks = [sum(p.nbytes for p in block.parameters()) for block in pipe.transformer.transformer_blocks]
    sizes = component_bytes(pipe)
    outside = sizes["transformer"] - sum(blocks)
    texts = [size for name, size in sizes.items() if name.startswith("text_encoder")]
    assert len(texts) == 3 and bytes_at_hand(subject) == {
        "denoiser": outside + max(blocks), "text": outside + max(texts), "decode": outside + sizes["vae"]
    }  # fmt: skip


def test_the_plan_has_the_weights_on_the_host(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", dtype="bfloat16",
        calibration=CalibrationOptions(streamed=True), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    there, away = (plan_from_configs(replace(asked, offload=offload), "cuda") for offload in (False, True))
    weights, held = sum(away.shapes.weights.values()), away.shapes.at_hand
    assert held == bytes_at_hand(open_unloaded(str(pipe_folder), "bfloat16"))
    assert there.memory.device_bytes > away.memory.device_bytes
    for before, after in zip(there.memory.moments, away.memory.moments, strict=True):
        assert before.name == after.name and after.host["weights"] == weights
        if after.name != "loading":
            what = "text" if after.name == "encoding prompts" else "denoiser"
            assert after.device == {**before.device, "weights": held[what]}
    assert any("to move blocks to the device and back is not counted" in note for note in away.notes)


def test_a_plan_without_statistics_has_no_calls_and_replaced_weights_on_the_host(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", method="magnitude", offload=True,
        calibration=CalibrationOptions(streamed=True), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    planned = plan_from_configs(asked, "cuda")
    memory = planned.memory
    assert (memory.batches.recorded, memory.batches.on_disk, memory.kept_bytes) == (0, 0, 0)
    solving = [moment for moment in memory.moments if moment.name.startswith("solving")]
    assert all(moment.device["changed weights"] == 0 for moment in solving)
    *_, last = solving
    weights = sum(site.weights for site in planned.shapes.sites)
    assert 4 * weights // 2 < last.host["changed weights"] < 4 * weights and last.host["masks"] > 0
    assert len(memory.batches.packages) > 1  # as it prunes: block after block
    text = full_plan(planned)
    assert "calibration: none; " in text and "recorded calls" not in text and "solves and dense" not in text


def test_it_is_named_where_nothing_else_fits(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", dtype="bfloat16",
        calibration=CalibrationOptions(streamed=True, batch_size=1), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    least = plan_from_configs(replace(asked, offload=True), "cuda").memory.device_bytes + CONTEXT_BYTES
    with pytest.raises(obsdiff.UserError, match=r"would fit: .*--calibration.streamed true --offload true"):
        plan_from_configs(replace(asked, device_memory=least), "cuda")
    plan_from_configs(replace(asked, device_memory=least, offload=True), "cuda")
    packages = replace(asked, calibration=CalibrationOptions(packages=4), device_memory=least)
    with pytest.raises(obsdiff.UserError, match=r"--offload true in place of --calibration\.packages \("):
        plan_from_configs(packages, "cuda")
    trained = replace(asked, reconstruction=ReconstructionOptions(steps=2), device_memory=least)
    with pytest.raises(obsdiff.UserError, match="or a smaller pipeline"):
        plan_from_configs(trained, "cuda")


def test_a_run_plans_what_it_takes_beside_what_is_loaded(pipe_folder):
    pipe = offload(obsdiff.load_pipeline(pipe_folder), "cpu")
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", offload=True,
        calibration=CalibrationOptions(streamed=True), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    planned = plan_loaded(subject_of(pipe), asked).memory
    weights = sum(component_bytes(pipe).values())
    there = next(moment for moment in planned.moments if moment.name.startswith("calibrating")).host
    assert there["process"] + there["weights"] == pytest.approx(resident_memory_bytes() + RUN_BYTES, rel=0.05)
    assert there["weights"] == weights


def test_the_command(pipe_folder, tmp_path, monkeypatch):
    """With what only a second device can do left out."""
    devices = []
    monkeypatch.setattr("obsdiff.devices.choose_device", lambda name, **_: name or "cpu")
    monkeypatch.setattr(offloading, "offload", lambda pipe, device: devices.append(device) or offload(pipe, "cpu"))
    monkeypatch.setattr("obsdiff.ranks.joined_processes", nullcontext)
    given = ["prune", "--pipeline", str(pipe_folder), "--device", "cuda", "--pattern", "unstructured:0.5",
             "--calibration.streamed", "true", "--calibration.num_prompts", "4",
             "--evaluation.num_images", "4"]  # fmt: skip
    main([*given, "--output", str(tmp_path / "out"), "--offload", "true"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert devices == ["cuda"] and report["offload"] and report["evaluation"]["pruned"]["mse"] > 0
    main(["sample", str(tmp_path / "out"), "--prompt", "a seven", "--output", str(tmp_path / "seven.png")])


def test_with_fewer_stages(prompts, emptied):
    asked = PruningOptions(
        pattern="depth:1+unstructured:0.5", allocation="uniform", calibration=CalibrationOptions(streamed=True)
    )
    plain, pipe = make_pipe(), make_pipe()
    prune_stage(plain, asked, prompts)
    turns = emptied(pipe)
    prune_stage(pipe, asked, prompts)
    weights, wanted = weights_of(pipe, turns), weights_of(plain)
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda", "--dry_run", "true"], "add --calibration.streamed true"),
        (["--device", "cpu", "--calibration.streamed", "true"], "this run is on the cpu; leave it out"),
        (["--device", "cuda", "--calibration.streamed", "true", "--reconstruction.steps", "2"], "or --offload"),
        (
            [
                "--device",
                "cuda",
                "--method",
                "magnitude",
                "--calibration.streamed",
                "true",
                "--dry_run",
                "true",
                "--calibration.calls_on_disk",
                "true",
            ],
            "method magnitude measures nothing, so there are no calls; leave out --calibration.calls_on_disk",
        ),
    ],
)
def test_bad_requests(pipe_folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), "--offload", "true", *more])
    assert message in capsys.readouterr().err
