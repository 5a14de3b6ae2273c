"""Layers of a stage solved again: against normal equations written out, with zeros, ranks and lost outputs kept."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.stage import calibration_prompts, prune_stage
from obsdiff.costs import calibration_cost
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.models.info import call_arguments
from obsdiff.models.obsdiff_shrunk import project
from obsdiff.models.subject import subject_of
from obsdiff.pruning.closed_form import RIDGE, Stage, solve_again
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.options import CalibrationOptions, PruningOptions, ReconstructionOptions
from obsdiff.pruning.reconstruct import Call, Pair, reconstruct
from tests.conftest import make_pipe
from tests.families.test_gradients import Measured


class Block(nn.Module):
    """Two layers that read one tensor, one behind them, and a convolution where tokens are an image's."""

    def __init__(self, bias=True, hidden=6, conv=False):
        super().__init__()
        self.a, self.b = nn.Linear(5, hidden, bias=bias), nn.Linear(5, hidden, bias=bias)
        self.c = nn.Linear(hidden, 4, bias=bias)
        self.conv = nn.Conv2d(4, 3, 3, padding=1, bias=bias) if conv else None

    def forward(self, x, gate):
        made = self.c(torch.tanh(self.a(x)) * self.b(x)) * gate
        return made if self.conv is None else self.conv(made.transpose(1, 2).unflatten(2, (3, 3)))


SITES = [["a", "b"], ["c"]]


def inputs(count=6, drift=0.3):
    """Of a pruned stage and of the dense one, which read other things."""
    generator = torch.Generator().manual_seed(1)
    calls = []
    for _ in range(count):
        x = torch.randn(2, 9, 5, generator=generator) + 2
        seen = x + drift * torch.randn(2, 9, 5, generator=generator)
        gate = torch.rand(2, 1, 1, generator=generator) + 0.5
        calls.append((((seen,), {"gate": gate}), ((x,), {"gate": gate})))
    return calls


def half(layer, seed=0):
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    with torch.no_grad():
        layer.weight *= mask
    return mask


def read_by(block, name, given):
    """What a layer reads and answers in a call: tokens as rows, of a convolution its fields."""
    found = {}
    layer = block.get_submodule(name)
    handle = layer.register_forward_hook(lambda _, args, out: found.update(x=args[0], y=out))
    block(*given[0], **given[1])
    handle.remove()
    x, y = found["x"], found["y"]
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
        y = y.flatten(2).transpose(1, 2)
    return x.flatten(0, -2).double(), y.flatten(0, -2).double()


def normal_equations(block, before, dense, name, calls, mask=None, rows=slice(None)):
    """The weights and the bias that the text of the module asks for, row by row, in float64: of a layer as it was
    ``before``, on what ``block`` gives it."""
    layer = before.get_submodule(name)
    x = torch.cat([read_by(block, name, given)[0] for given, _ in calls])
    y = torch.cat([read_by(dense, name, given)[1] for _, given in calls])[:, rows]
    old = layer.weight.double().flatten(1)
    biased = layer.bias is not None
    centre = x.mean(0) if biased else torch.zeros(x.shape[1], dtype=x.dtype)
    offset = y.mean(0) if biased else torch.zeros(y.shape[1], dtype=x.dtype)
    u = x - centre
    ridge = RIDGE * (u.square().mean(0)).mean()
    new = torch.zeros_like(old)
    for row in range(len(old)):
        kept = torch.ones(x.shape[1], dtype=torch.bool) if mask is None else mask.flatten(1)[row]
        some = u[:, kept]
        left = some.T @ some / len(x) + ridge * torch.eye(int(kept.sum()), dtype=x.dtype)
        right = some.T @ (y[:, row] - offset[row]) / len(x) + ridge * old[row, kept]
        new[row, kept] = torch.linalg.solve(left, right)
    return new.view(layer.weight.shape), (offset - new @ centre if biased else None)


def objective(block, dense, name, calls, weight, bias, old):
    """``E‖y − V x̂ − b‖² + λ ‖V − W‖²``, float64."""
    x = torch.cat([read_by(block, name, given)[0] for given, _ in calls])
    y = torch.cat([read_by(dense, name, given)[1] for _, given in calls])
    mean = x.mean(0) if bias is not None else 0
    left = y - x @ weight.double().flatten(1).T - (0 if bias is None else bias.double())
    ridge = RIDGE * (x - mean).square().mean()
    return float(left.square().sum() / len(x) + ridge * (weight - old).double().square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("conv", [False, True])
@torch.no_grad()
def test_layers_are_the_least_squares_one_behind_the_other(bias, masked, conv):
    torch.manual_seed(0)
    dense = Block(bias, conv=conv)
    block = copy.deepcopy(dense)
    sites = [*SITES, ["conv"]] if conv else SITES
    masks = {name: half(block.get_submodule(name)) for site in sites for name in site} if masked else {}
    calls, before = inputs(), copy.deepcopy(block)
    assert solve_again(Stage(block, dense, sites, masks), lambda: iter(calls)) == len(sites)
    for name in (name for site in sites for name in site):  # what is in front of a layer is as it found it
        weight, offset = normal_equations(block, before, dense, name, calls, masks.get(name))
        layer = block.get_submodule(name)
        old = before.get_submodule(name).weight
        least = objective(block, dense, name, calls, weight, offset, old)
        found = objective(block, dense, name, calls, layer.weight, layer.bias, old)
        assert least * (1 - 1e-9) <= found <= least * (1 + 1e-6)
        if not masked:
            torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-3, atol=1e-4)
    for name, mask in masks.items():
        assert not block.get_submodule(name).weight[~mask].any() and not mask.all()
    assert all(module._forward_hooks == {} for model in (block, dense) for module in model.modules())


@torch.no_grad()
def test_outputs_that_are_gone_are_asked_for_no_more():
    torch.manual_seed(0)
    dense, block = Block(), Block(hidden=4)
    kept, gone = torch.tensor([0, 2, 3, 5]), torch.tensor([4, 1])
    for name in ("a", "b"):
        block.get_submodule(name).weight.copy_(dense.get_submodule(name).weight[kept])
        block.get_submodule(name).bias.copy_(dense.get_submodule(name).bias[kept])
    block.c.weight.copy_(dense.c.weight[:, kept])
    calls = inputs()
    weight, bias = normal_equations(block, block, dense, "a", calls, rows=kept)
    solve_again(Stage(block, dense, SITES, lost={"a": gone, "b": gone}), lambda: iter(calls))
    torch.testing.assert_close(block.a.weight, weight.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(block.a.bias, bias.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_layer_behind_a_basis_is_solved_on_what_the_basis_makes():
    torch.manual_seed(0)
    dense = Block()
    block = copy.deepcopy(dense)
    basis = nn.Linear(5, 3, bias=False)
    before = basis.weight.clone()
    block.a.weight = nn.Parameter(block.a.weight @ torch.linalg.pinv(basis.weight))
    project(block.a, "basis", basis)
    plain = copy.deepcopy(dense)
    calls = inputs()
    read = [((basis(given[0]),), {}) for (given, _), _ in calls]
    alone, target = nn.Linear(3, 6), nn.Linear(5, 6)
    alone.load_state_dict(block.a.state_dict())
    target.load_state_dict(dense.a.state_dict())
    pairs = [(mine, (theirs[0], {})) for mine, (_, theirs) in zip(read, calls, strict=True)]
    alone, target = (nn.Sequential(OrderedDict(a=layer)) for layer in (alone, target))
    weight, bias = normal_equations(alone, alone, target, "a", pairs)
    assert solve_again(Stage(block, dense, SITES), lambda: iter(calls)) == 3  # a and b read other numbers
    torch.testing.assert_close(block.a.weight, weight.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(block.a.bias, bias.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(basis.weight, before) and not torch.equal(block.b.weight, plain.b.weight)


@torch.no_grad()
def test_inputs_that_are_always_the_same_leave_the_bias_alone_to_be_solved():
    torch.manual_seed(0)
    dense = Block()
    block, x = copy.deepcopy(dense), torch.ones(2, 9, 5)
    calls = [(((x,), {"gate": torch.ones(())}), ((3 * x,), {"gate": torch.ones(())}))] * 2
    before = block.a.weight.clone()
    solve_again(Stage(block, dense, SITES), lambda: iter(calls))
    assert torch.equal(block.a.weight, before)
    torch.testing.assert_close(block(x, 1.0), dense(3 * x, 1.0))


HOW = ReconstructionOptions(closed_form=True, triples=24, batch_size=4)


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("unstructured:0.7", 10),
        ("2:4", 0),
        ("structured:0.5", 0),
        pytest.param("structured:0.25+rank:4", 0, marks=pytest.mark.slow),
        pytest.param("structured:0.25+lowrank:8", 0, marks=pytest.mark.slow),
        pytest.param("depth:1", 0, marks=pytest.mark.slow),
        ("depth:1+structured:0.5", 0),
    ],
)
def test_through_the_stage_with_what_it_cost(pattern, steps):
    options = PruningOptions(
        pattern=pattern,
        allocation=None if pattern == "depth:1" else "uniform",
        spare_blocks=[],
        calibration=CalibrationOptions(num_prompts=6),
        reconstruction=replace(HOW, steps=steps),
    )
    pipe, plain = make_pipe(), make_pipe()
    prompts = calibration_prompts(pipe, options)
    report = prune_stage(pipe, options, prompts)
    other = prune_stage(plain, replace(options, reconstruction=ReconstructionOptions()), prompts)
    assert all(torch.equal(report.masks[name], other.masks[name]) for name in other.masks)
    found, stages = report.reconstruction, subject_of(pipe).graph.stages
    assert list(found["stages"]) == list(stages) and all(after <= before for before, after in found["stages"].values())
    assert any(after < before for before, after in found["stages"].values())
    assert found["closed_form"] and found["steps"] == steps
    weights = zip(pipe.transformer.parameters(), plain.transformer.parameters(), strict=True)
    assert any(not torch.equal(mine, theirs) for mine, theirs in weights)
    for name, mask in report.masks.items():
        if name in subject_of(pipe).graph.layers:
            assert not pipe.transformer.get_parameter(f"{name}.weight")[~mask].any()
    # as tests/pruning/test_reconstruct.py counts; and four of five calls, once for each site of a block, in both
    call = call_arguments(pipe)
    dense, pruned = (denoiser_flops(subject_of(each), call) for each in (make_pipe(), pipe))
    sites = subject_of(pipe if "depth" in pattern else make_pipe()).graph.sites  # without layers that are projected
    behind = [[vars(pipe.transformer.get_submodule(name)).get("basis") for name in site.layers] for site in sites]
    assert any(map(any, behind)) == ("lowrank" in pattern)
    begun = sum(len(set(bases)) for bases in behind)
    solved = (36 - 8) * begun / len(stages)
    through, held = 36 + 36 / 5, 8
    checks = 3 if steps else 2
    wanted = dense * (36 + through + solved) + pruned * (through + 3 * steps * 36 / 5 + solved + checks * held)
    assert found["denoiser_flops"] == pytest.approx(wanted)
    counted = calibration_cost({"reconstruction": found, "time_s": report.time_s}, 1, 2)["reconstruction"]
    assert counted.denoiser_flops == found["denoiser_flops"]


def test_training_that_makes_it_worse_is_taken_back_alone():
    options = PruningOptions(
        pattern="structured:0.5",
        allocation="uniform",
        spare_blocks=[],
        calibration=CalibrationOptions(num_prompts=6),
        reconstruction=HOW,
    )
    pipe, again = make_pipe(), make_pipe()
    prompts = calibration_prompts(pipe, options)
    wanted = prune_stage(pipe, options, prompts).reconstruction["stages"]
    spoilt = replace(options, reconstruction=replace(HOW, steps=5, lr=1e3))
    assert prune_stage(again, spoilt, prompts).reconstruction["stages"] == wanted
    weights = zip(pipe.transformer.parameters(), again.transformer.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in weights)


def test_layers_that_are_dead_stay_zero():
    case = Measured("qwen-image")
    pipe, conditioning = case.traced(), case.conditioning
    subject = subject_of(pipe, conditioning)
    graph, dense = subject.graph, copy.deepcopy(subject.denoiser)
    dead = [layer for layer in subject.dead if layer in graph.layers]
    settings = Settings(call_arguments(pipe), 0, "uniform", batch_size=2)
    probe = record_probe(subject, conditioning, settings, 6)
    calls = [Call(of, given, len(weights)) for of, given, weights in probe.batches(probe.calls[0].rows)]
    masks = {layer: torch.zeros_like(graph.weight(layer), dtype=torch.bool) for layer in dead}
    with torch.no_grad():
        for layer in dead:
            graph.weight(layer).zero_()
            graph.layer(layer).bias.zero_()
        next(iter(graph.layer(name) for name in graph.layers if name not in dead)).weight.mul_(0.5)
    before = {name: p.clone() for name, p in subject.denoiser.named_parameters()}
    stages, sites = {stage: stage for stage in graph.stages}, [site.layers for site in graph.sites]
    pair = Pair(subject.denoiser, dense, stages, masks, sites=sites, still=frozenset(dead))
    reconstruct(pair, calls, replace(HOW, steps=5))
    changed = {name.rpartition(".")[0] for name, p in subject.denoiser.named_parameters() if (p != before[name]).any()}
    assert dead and changed and not changed & set(dead)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-2}, "reconstruction.lr is for --reconstruction.steps"),
        ({"closed_form": False}, "need --reconstruction.steps, which is 0, or --reconstruction.closed_form"),
    ],
)
def test_what_would_be_ignored_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prune_stage(make_pipe(), PruningOptions(method="magnitude", reconstruction=replace(HOW, **changes)), ["one"])
