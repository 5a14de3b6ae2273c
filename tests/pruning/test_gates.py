"""Learned gates: their values and their penalty written out, the loss against calls of the pipeline itself, and what is
chosen where it is known what can go."""

import math
import re

import pytest
import torch

import obsdiff
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.costs import calibration_cost
from obsdiff.criteria.ecodiff import hard_concrete, open_probability
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.subject import subject_of
from obsdiff.pruning import gates
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.options import PruningOptions, ScanOptions
from obsdiff.pruning.statistics import open_statistics
from tests.conftest import CALL, make_pipe

PROMPTS = ["a seven", "a two", "the digit four"]
HEADS, NEURONS = "transformer_blocks.1.attn", "transformer_blocks.1.ff"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(gates, "STEPS", 6)


def learned(pipe, **options):
    return obsdiff.calibrate(pipe, PROMPTS, needs={"gates"}, **options)


def zeroed_columns(pipe, columns_of):
    """The pipeline with input columns of some layers at zero, so that nothing depends on what makes them."""
    with torch.no_grad():
        for layer, columns in columns_of.items():
            pipe.transformer.get_submodule(layer).weight[:, columns] = 0
    return pipe


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_a_gate_is_a_stretched_concrete_variable():
    """Louizos et al. eq. 10 and 11, number by number."""
    openness, uniform = torch.linspace(-6, 6, 41), torch.rand(41, generator=torch.Generator().manual_seed(0))
    for value, u, lam in zip(
        hard_concrete(openness, uniform).tolist(), uniform.tolist(), openness.tolist(), strict=True
    ):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + lam) / 0.83))
        assert value == pytest.approx(min(1.0, max(0.0, s * 1.2 - 0.1)), abs=1e-5)
    assert {0.0, 1.0} <= set(hard_concrete(openness, uniform).tolist())


def test_the_penalty_is_the_share_of_draws_that_are_open():
    """Eq. 12: σ(λ − β log(−γ/ζ)), and 200,000 draws of each gate."""
    openness = torch.tensor([-5.0, -2.0, -1.0, 0.0, 1.0, 3.0])
    expected = [1 / (1 + math.exp(-(lam - 0.83 * math.log(0.1 / 1.1)))) for lam in openness.tolist()]
    torch.testing.assert_close(open_probability(openness), torch.tensor(expected))
    uniform = torch.rand(200_000, 6, generator=torch.Generator().manual_seed(1))
    drawn = (hard_concrete(openness.expand_as(uniform), uniform) > 0).double().mean(0)
    torch.testing.assert_close(drawn, torch.tensor(expected).double(), atol=5e-3, rtol=0)


# --- the gated model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "ffn", "channels"])
def test_a_gate_at_zero_is_the_removal_of_its_unit(kind):
    """Of units of every kind: the gated answer is that of weights without the unit's columns."""
    pipe = obsdiff.load_pipeline("digits-ddpm") if kind == "channels" else make_pipe()
    subject = subject_of(pipe)
    group = next(
        group for group in subject.graph.groups if group.kind == kind and len(group.consumers) > (kind == "heads")
    )
    [given] = subject.call.values()

    def answer():
        return subject.denoiser(**given | {"return_dict": False})[0]

    opened = torch.ones(group.count)
    opened[1] = 0
    with torch.no_grad(), gates.gates_on(subject.graph, [group], {group.name: torch.ones(group.count)}):
        before = answer()
    with torch.no_grad():
        assert torch.equal(before, answer())
        with gates.gates_on(subject.graph, [group], {group.name: opened}):
            gated = answer()
        for s in group.consumers:
            subject.graph.weight(s.layer)[:, s.entries(opened == 0)] = 0
        cut = answer()
    torch.testing.assert_close(gated, cut, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cut, before, rtol=1e-3)


def test_the_loss_is_of_the_guided_output_of_recorded_calls():
    """Against the pipeline's own calls of both rows, one by one."""
    pipe = make_pipe()
    subject = subject_of(pipe)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: calls.append(given), with_kwargs=True)
    settings = Settings({**CALL}, 0, "log_decrease", None, 2)
    recorded, rows = gates._recorded(subject, encode_prompts(pipe, PROMPTS, CALL), settings, True)
    handle.remove()
    calls = calls[-2 * 3 :]  # two batches of three steps; what came before was to see how it is called
    assert rows == 3 * 3 * 2 and len(recorded) == 9 and recorded.rows_each == 2
    groups = [subject.graph.group_of[name] for name in (HEADS, NEURONS)]
    opened = {group.name: torch.rand(group.count, generator=torch.Generator().manual_seed(7)) for group in groups}
    found = recorded.errors(torch.arange(9), subject.graph, groups, opened)
    masked = make_pipe()
    with torch.no_grad():
        for group in groups:
            for s in group.consumers:
                masked.transformer.get_submodule(s.layer).weight.mul_(opened[group.name].repeat_interleave(s.size))
        expected = []
        for call in calls:
            outputs = []
            for model in (pipe.transformer, masked.transformer):
                negative, positive = model(**{**call, "return_dict": False})[0].chunk(2)
                outputs.append(negative + 2.0 * (positive - negative))
            dense, gated = outputs
            expected += ((gated - dense).square().flatten(1).sum(1) / dense.square().flatten(1).sum(1)).tolist()
    assert sorted(found.tolist()) == pytest.approx(sorted(expected), rel=1e-3)


def test_one_step_against_autograd(monkeypatch):
    """The first step of AdamW, with the loss written out on masked weights."""
    monkeypatch.setattr(gates, "STEPS", 1)
    monkeypatch.setattr(gates, "RATE", 0.5)
    subject = subject_of(make_pipe())
    groups = list(gates.gated_groups(subject.graph, subject.graph.sites))
    prompts = encode_prompts(subject.pipe, PROMPTS, CALL)
    settings = Settings({**CALL}, 0, "log_decrease", None, 3)
    found = gates.learned_gates(subject, prompts, settings, groups)
    recorded, _ = gates._recorded(subject, prompts, settings, True)
    generator = torch.Generator().manual_seed(0)
    openness = {group.name: torch.full((group.count,), 3.0, requires_grad=True) for group in groups}
    order = []
    loss = torch.zeros(())
    for _ in range(4):
        uniform = {group.name: torch.rand(group.count, generator=generator) for group in groups}
        opened = {
            name: (((u.log() - (1 - u).log() + openness[name]) / 0.83).sigmoid() * 1.2 - 0.1).clamp(0, 1)
            for name, u in uniform.items()
        }
        for _ in range(4):
            order = order or torch.randperm(len(recorded), generator=generator).tolist()
            loss = loss + recorded.errors(torch.tensor([order.pop(0)]), subject.graph, groups, opened)[0] / 16
    penalty = sum((value - 0.83 * math.log(0.1 / 1.1)).sigmoid().mean() for value in openness.values()) / len(groups)
    (loss + 0.5 * penalty).backward()
    for name, value in openness.items():
        step = value.grad / (value.grad.abs() + 1e-8)
        torch.testing.assert_close(found.by_group[name], 3.0 * (1 - 0.5 * 0.01) - 0.5 * step, rtol=1e-3, atol=1e-3)
    assert found.losses[0] == pytest.approx(float(loss.detach()), rel=1e-4)


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_neurons_that_nothing_depends_on_go_first():
    useless = [1, 4, 5, 11]
    pipe = zeroed_columns(make_pipe(), {f"{NEURONS}.net.2": useless})
    found = learned(pipe, sites={f"{NEURONS}.net.2"}).gates.by_group[NEURONS]
    assert set(found.argsort()[: len(useless)].tolist()) == set(useless)


def test_the_one_head_that_matters_stays():
    pipe = make_pipe()
    group = subject_of(pipe).graph.group_of[HEADS]
    size = group.consumers[0].size
    others = [column for column in range(group.count * size) if column // size != 2]
    pipe = zeroed_columns(pipe, {s.layer: others for s in group.consumers})
    report = obsdiff.prune(
        pipe, "structured:heads=0.75,ffn=0", method="ecodiff", statistics=learned(pipe, sites={f"{HEADS}.to_out.0"}),
        include=[HEADS], prune_again=True,
    )  # fmt: skip
    assert report.masks[HEADS].tolist() == [False, False, True, False]


def test_the_same_seed_gives_the_same_gates_whatever_the_batch():
    first, again, small, other = (
        learned(make_pipe(), sites={f"{HEADS}.to_out.0", f"{NEURONS}.net.2"}, **options).gates.by_group
        for options in ({}, {}, {"batch_size": 1}, {"seed": 1})
    )
    for name, value in first.items():
        assert torch.equal(again[name], value)
        torch.testing.assert_close(small[name], value, rtol=0, atol=0.05)
    assert any(not torch.allclose(other[name], value, atol=0.05) for name, value in first.items())


def test_the_denoiser_is_as_before():
    pipe = make_pipe()
    model = pipe.transformer.train()
    model.proj_out.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learned(pipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.proj_out.bias.requires_grad and model.proj_out.weight.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- through the house ------------------------------------------------------------------------------------------------


def test_what_it_cost_is_in_the_ledger():
    report = obsdiff.prune(make_pipe(), "structured:0.5", method="ecodiff", statistics=learned(make_pipe()))
    kept = report.fingerprint["gates"]
    # 3 prompts, 3 steps with guidance; 6 steps of 16 calls of 2 rows, dense, gated there and (twice) back
    assert kept["rows"] == 3 * 3 * 2 + 6 * 16 * 2 * 4 and kept["steps"] == 6 and kept["inputs"] is False
    manifest = {"statistics": report.fingerprint, "time_s": report.time_s, "packages": 1}
    assert calibration_cost(manifest, 10, 1)["calibration"].denoiser_flops == 10 * kept["rows"]
    assert report.time_s["calibrate"] > 0 and kept["loss_before"] > 0


@pytest.mark.slow
def test_through_the_stage_with_a_store_a_refit_and_an_allocation(tmp_path):
    options = PruningOptions(pattern="structured:0.5", method="ecodiff", refit=True)
    report = prune_stage(make_pipe(), options, PROMPTS, Folders(statistics=tmp_path / "store"))
    assert open_statistics(tmp_path / "store").gates is None  # a store keeps none, they are learned again
    plain = prune_stage(make_pipe(), PruningOptions(pattern="structured:0.5", method="ecodiff"), PROMPTS)
    assert all(torch.equal(report.masks[name], mask) for name, mask in plain.masks.items())
    assert report.layer_error and not plain.layer_error
    options = PruningOptions(
        pattern="structured:0.3", method="ecodiff", allocation="measured", scan=ScanOptions(triples=2)
    )
    assert prune_stage(make_pipe(), options, PROMPTS).allocation["rule"] == "measured"
    options = PruningOptions(pattern="depth:1+structured:0.5", method="ecodiff", spare_blocks=[])
    assert prune_stage(make_pipe(), options, PROMPTS).fingerprint["gates"]["steps"] == 6


def test_gates_are_for_the_modules_that_are_pruned():
    few = learned(make_pipe(), sites={"transformer_blocks.1.ff.net.2"})
    assert set(few.gates.by_group) == {NEURONS}
    with pytest.raises(obsdiff.UserError, match=r"there are no gates of transformer_blocks\.1\.attn; calibrate again"):
        obsdiff.prune(make_pipe(), "structured:0.5", method="ecodiff", statistics=few)
    with pytest.raises(obsdiff.UserError, match=r"hold no gates, which method ecodiff needs \(a store keeps none\)"):
        obsdiff.prune(
            make_pipe(), "structured:0.5", method="ecodiff", statistics=obsdiff.calibrate(make_pipe(), PROMPTS)
        )


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5+2:4"])
def test_single_weights_have_none(pattern):
    told = f"ecodiff removes whole heads, neurons and channels, no single weights.*{re.escape(pattern)}"
    with pytest.raises(obsdiff.UserError, match=told):
        obsdiff.prune(make_pipe(), pattern, method="ecodiff")
    with pytest.raises(obsdiff.UserError, match=told):
        prune_stage(make_pipe(), PruningOptions(pattern=pattern, method="ecodiff"), PROMPTS)


def several(pipe, monkeypatch):
    monkeypatch.setattr(gates, "world_size", lambda: 2)


def half(pipe, monkeypatch):
    pipe.transformer.half()


@pytest.mark.parametrize(
    ("spoil", "match"), [(several, "learned by one process; run this without torchrun"), (half, "overflow in float16")]
)
def test_refusals_come_before_anything_runs(spoil, match, monkeypatch):
    pipe = make_pipe()
    subject = subject_of(pipe)
    _ = subject.graph  # a trace of the denoiser
    spoil(pipe, monkeypatch)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("the denoiser ran"))
    with pytest.raises(obsdiff.UserError, match=match):
        learned(subject)


def test_a_loss_that_is_not_finite():
    pipe = make_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("inf"))
    with pytest.raises(obsdiff.UserError, match="loss of the gates is not finite"):
        learned(pipe)
