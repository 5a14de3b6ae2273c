"""Weights that rest on the host: whatever is read of a block is read while it is on the device."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.allocation.fitting import CONTEXT_BYTES, open_unloaded, plan_from_configs
from obsdiff.allocation.shapes import bytes_at_hand, component_bytes
from obsdiff.allocation.stage import prune_stage
from obsdiff.cli.main import main
from obsdiff.models import offload as offloading
from obsdiff.models.denoisers import device_of
from obsdiff.models.offload import Turns, is_offloaded, offload, turns_of
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruneOptions, PruningOptions
from obsdiff.pruning.stream import Stream
from tests.conftest import make_pipe
from tests.pruning.test_stream import of_family

AWAY = 7.0


class Emptied(Turns):
    """In place of a second device: weights that are away read as something else."""

    def __init__(self, device):
        super().__init__(device)
        self.kept = {}

    def away(self, module):
        for parameter in module.parameters():
            self.kept[id(parameter)] = parameter, parameter.data
            parameter.data = torch.full_like(parameter.data, AWAY)

    def back(self, module):
        for parameter in module.parameters():
            if (found := self.kept.pop(id(parameter), None)) is not None:
                parameter.data = found[1]

    def give(self, module):
        if self._there is not module:
            if self._there is not None:
                self.away(self._there)
            self.back(module)
            self._there = module


@pytest.fixture
def emptied(monkeypatch):
    """Offloads a pipeline so; returns what takes turns."""
    made = []
    monkeypatch.setattr(offloading, "Turns", lambda device: made.append(Emptied(device)) or made[-1])

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


@pytest.mark.parametrize("name", ["flux", "sd15", "wan22", "qwen-image"])
def test_other_families_too(name, emptied):
    """Two kinds of blocks in a row; blocks that answer later ones; two denoisers."""
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


def test_what_the_device_holds_is_the_largest_block_and_what_is_in_none(pipe_folder):
    pipe = open_unloaded(str(pipe_folder), None).pipe
    blocks = [sum(p.nbytes for p in block.parameters()) for block in pipe.transformer.transformer_blocks]
    sizes = component_bytes(pipe)
    others = [size for name, size in sizes.items() if name != "transformer"]
    outside = sizes["transformer"] - sum(blocks)
    assert bytes_at_hand(pipe) == outside + max(*blocks, *others)


def test_the_plan_has_the_weights_on_the_host(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", dtype="bfloat16",
        calibration=CalibrationOptions(streamed=True), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    there, away = (plan_from_configs(replace(asked, offload=offload), "cuda") for offload in (False, True))
    weights, held = sum(away.shapes.weights.values()), away.shapes.at_hand
    assert held == bytes_at_hand(open_unloaded(str(pipe_folder), "bfloat16").pipe) < weights
    assert there.memory.device_bytes - away.memory.device_bytes == weights - held
    at_hand = [moment for moment in away.memory.moments if moment.name != "loading"]
    assert all(moment.device["weights"] == held and moment.host["weights"] == weights for moment in at_hand)
    assert any("to move blocks to the device and back is not counted" in note for note in away.notes)


def test_it_is_named_where_nothing_else_fits(pipe_folder):
    asked = PruneOptions(
        pipeline=str(pipe_folder), output="-", pattern="unstructured:0.5", allocation="uniform", dtype="bfloat16",
        calibration=CalibrationOptions(streamed=True, batch_size=1), evaluation=EvaluationOptions(num_images=0),
    )  # fmt: skip
    least = plan_from_configs(replace(asked, offload=True), "cuda").memory.device_bytes + CONTEXT_BYTES
    with pytest.raises(obsdiff.UserError, match=r"would fit: .*--calibration.streamed true --offload true"):
        plan_from_configs(replace(asked, device_memory=least), "cuda")
    plan_from_configs(replace(asked, device_memory=least, offload=True), "cuda")


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
    ],
)
def test_bad_requests(pipe_folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), "--offload", "true", *more])
    assert message in capsys.readouterr().err
