"""Statistics of the real pipeline against what its layers really saw."""

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import obsdiff
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.models.conditioning import encode_prompts, token_mask
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info, info_of
from obsdiff.models.subject import subject_of
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning import collect
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.statistics import open_statistics
from tests.families.pipelines import PIPELINES
from tests.obs.same import same_sums


def recorded_inputs(pipe, layer, prompts):
    """Every input of ``layer`` over one pipeline call, in order."""
    seen = []
    handle = pipe.transformer.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().clone())
    )
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipe(prompt=prompts, generator=generators, output_type="latent", **info_of(pipe).call)
    handle.remove()
    return seen


@pytest.mark.parametrize("layer", ["transformer_blocks.1.attn.to_q", "transformer_blocks.2.ff.net.2"])
def test_image_sites_equal_the_recorded_weighted_sum(pipe, prompts, layer):
    expected = 0.0
    for alpha, x in zip(timestep_weights("log_decrease", 3), recorded_inputs(pipe, layer, prompts), strict=True):
        x = x.flatten(0, 1).double()
        expected = expected + alpha * x.T @ x
    site = obsdiff.calibrate(pipe, prompts).sites[layer]
    found = site.hessian().double() * site.weight_sum
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert site.num_tokens == len(prompts) * 2 * 3 * 16  # guidance doubles, 3 steps, 4 x 4 tokens


def test_padded_text_tokens_do_not_count(pipe, prompts):
    layer = "transformer_blocks.0.attn.add_q_proj"
    call = info_of(pipe).call
    positive, negative = token_mask(pipe, SD3, prompts, call), token_mask(pipe, SD3, [""], call)
    assert positive.shape == (len(prompts), 20) and int(negative.sum()) == 3  # CLIP: begin, end; T5: end
    mask = torch.cat([negative.expand_as(positive), positive])
    expected = 0.0
    for alpha, x in zip(timestep_weights("log_decrease", 3), recorded_inputs(pipe, layer, prompts), strict=True):
        x = x[mask].double()
        expected = expected + alpha * x.T @ x
    site = obsdiff.calibrate(pipe, prompts).sites[layer]
    torch.testing.assert_close(site.hessian().double() * site.weight_sum, expected, rtol=1e-4, atol=1e-4)
    assert site.num_tokens == 3 * int(mask.sum())


def test_padded_text_tokens_count_if_asked(pipe, prompts, tmp_path):
    layer = "transformer_blocks.0.attn.add_q_proj"
    seen = torch.cat(recorded_inputs(pipe, layer, prompts))
    options = PruningOptions(
        pattern="2:4", calibration=CalibrationOptions(padding=True, weighting="uniform", batch_size=len(prompts))
    )
    prune_stage(pipe, options, prompts, Folders(statistics=tmp_path / "kept"))
    site = open_statistics(tmp_path / "kept").site(layer)
    x = seen.flatten(0, 1).double()
    torch.testing.assert_close(site.hessian().double() * site.num_tokens, x.T @ x, rtol=1e-4, atol=1e-4)
    assert site.num_tokens == len(x) == 3 * 2 * len(prompts) * 20


@pytest.mark.parametrize(("name", "told"), [("sana", "does not attend to padding"), ("dit", "nothing says what")])
def test_padding_that_cannot_count_is_refused(name, told):
    row = PIPELINES[name]
    pipe = row.build()
    attach_info(pipe, PipelineInfo(name, {k: v for k, v in row.call.items() if k in CALL_ARGUMENTS}))
    options = PruningOptions(pattern="2:4", calibration=CalibrationOptions(padding=True))
    with pytest.raises(obsdiff.UserError, match=told):
        prune_stage(pipe, options, ["1", "2"])


@pytest.mark.parametrize("tokens", [None, 5])
def test_batch_size_does_not_matter(pipe, prompts, tokens):
    a = obsdiff.calibrate(pipe, prompts, batch_size=1, tokens=tokens)
    b = obsdiff.calibrate(pipe, prompts, batch_size=4, tokens=tokens)
    assert a.fingerprint == b.fingerprint
    for name in a:
        assert a.sites[name].num_tokens == b.sites[name].num_tokens
        torch.testing.assert_close(a.sites[name].hessian(), b.sites[name].hessian(), rtol=1e-3, atol=1e-4)


def test_the_time_of_bare_calls_is_that_between_hooks(pipe, prompts, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(collect, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    statistics = obsdiff.calibrate(pipe, prompts, batch_size=len(prompts))
    # of 3 calls: one second from the begin to the first layer, between two of them, and from the last to the end
    assert statistics.time_s["forward_only"] == 3 * (len(statistics.sites) + 1)


def test_tokens_are_subsampled(pipe, prompts):
    site = obsdiff.calibrate(pipe, prompts, tokens=5).sites["transformer_blocks.1.attn.to_q"]
    assert site.num_tokens == len(prompts) * 2 * 3 * 5


def test_halves_of_the_prompts_merge_to_the_whole(pipe, prompts):
    conditioning = encode_prompts(pipe, prompts, info_of(pipe).call)
    assert len(conditioning) == 6
    whole = obsdiff.calibrate(pipe, prompts)
    store = obsdiff.calibrate(pipe, prompts[:3])
    from obsdiff.pruning import calibrate as module

    rest = module.Settings(module.call_arguments(pipe))
    assert store.prompts_done == 3
    subject = subject_of(pipe)
    module._measure(subject, (*subject.graph.vectors, *subject.graph.sites), conditioning, rest, store, None, True)
    for name in whole:
        torch.testing.assert_close(whole.sites[name].hessian(), store.sites[name].hessian(), rtol=1e-3, atol=1e-4)


def test_the_pipeline_is_not_changed(pipe, prompts, images):
    before = images(pipe)
    obsdiff.calibrate(pipe, prompts)
    assert torch.equal(images(pipe), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.transformer.modules())


def test_every_wired_site_is_measured_with_dual_attention(dual_pipe, prompts):
    statistics = obsdiff.calibrate(dual_pipe, prompts)
    assert "transformer_blocks.0.attn2.to_q" in statistics
    assert "transformer_blocks.2.attn2.to_q" not in statistics
    assert "transformer_blocks.2.ff_context.net.2" not in statistics  # context-free last block
    graph = subject_of(dual_pipe).graph
    assert set(statistics) == {site.name for site in (*graph.vectors, *graph.sites)}


def test_a_second_order_sampler_is_indexed_by_denoiser_call(pipe, prompts):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    calls = recorded_inputs(pipe, "transformer_blocks.0.attn.to_q", prompts[:1])
    assert len(calls) == 5  # 2 · 3 − 1
    site = obsdiff.calibrate(pipe, prompts[:1]).sites["transformer_blocks.0.attn.to_q"]
    assert site.weight_sum == pytest.approx(2 * 16 * sum(timestep_weights("log_decrease", 5)), rel=1e-5)


def test_store_is_reused_and_equal(pipe, prompts, tmp_path, monkeypatch):
    first = obsdiff.calibrate(pipe, prompts, store=tmp_path / "store")
    monkeypatch.setattr("obsdiff.pruning.calibrate._measure", partial(pytest.fail, "measured again"))
    again = obsdiff.calibrate(pipe, prompts, store=tmp_path / "store")
    assert set(again) == set(first)
    for name in again:
        assert same_sums(again.site(name), first.site(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize(
    "change", [{"steps": 2}, {"guidance_scale": 1.5}, {"seed": 1}, {"weighting": "uniform"}, {"tokens": 4}]
)
def test_store_of_other_settings_is_refused(pipe, prompts, tmp_path, change):
    obsdiff.calibrate(pipe, prompts, store=tmp_path / "store")
    with pytest.raises(obsdiff.UserError, match="other settings"):
        obsdiff.calibrate(pipe, prompts, store=tmp_path / "store", **change)


def test_store_of_another_model_prompts_or_sampler_is_refused(pipe, prompts, tmp_path):
    store = tmp_path / "store"
    obsdiff.calibrate(pipe, prompts, store=store)
    with pytest.raises(obsdiff.UserError, match="prompts"):
        obsdiff.calibrate(pipe, prompts[1:], store=store)
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler)(shift=3.0)
    with pytest.raises(obsdiff.UserError, match="sampler"):
        obsdiff.calibrate(pipe, prompts, store=store)
    pipe.scheduler = scheduler
    with torch.no_grad():
        next(pipe.transformer.parameters()).view(-1)[0] += 1
    with pytest.raises(obsdiff.UserError, match="model"):
        obsdiff.calibrate(pipe, prompts, store=store)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "index"])
def test_a_damaged_store_is_an_error(pipe, prompts, tmp_path, damage):
    store = tmp_path / "store"
    obsdiff.calibrate(pipe, prompts, store=store)
    victim = store / "sites" / "00003.safetensors"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[-9] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (store / "statistics.json").write_text('{"format": 1')
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with pytest.raises(obsdiff.UserError, match=r"damaged|statistics\.json"):
        obsdiff.prune(pipe, "unstructured:0.5", statistics=obsdiff.calibrate(pipe, prompts, store=store))
    assert all(torch.equal(before[k], v) for k, v in pipe.transformer.state_dict().items())


def test_an_interrupted_calibration_continues(pipe, prompts, tmp_path, monkeypatch):
    """Killed after two of three batches: the third run adds only what is missing and gives the same sums."""
    from obsdiff.pruning import calibrate as module

    store = tmp_path / "store"
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    real = module.save_statistics
    saves = []

    def save_then_die(statistics, folder):
        real(statistics, folder)
        saves.append(statistics.prompts_done)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_statistics", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        obsdiff.calibrate(pipe, prompts, batch_size=2, store=store)
    assert saves == [2, 4] and [path.name for path in tmp_path.iterdir()] == ["store.unfinished"]
    monkeypatch.setattr(module, "save_statistics", real)
    with pytest.raises(obsdiff.UserError, match="other settings"):
        obsdiff.calibrate(pipe, prompts, batch_size=2, store=store, seed=1)
    continued = obsdiff.calibrate(pipe, prompts, batch_size=2, store=store)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 1e9)
    whole = obsdiff.calibrate(pipe, prompts, batch_size=2)
    assert continued.prompts_done == 6
    for name in whole:
        assert same_sums(continued.site(name), whole.site(name))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert json.loads((store / "statistics.json").read_text())["prompts_done"] == 6


def test_an_interrupted_calibration_continues_on_the_device_that_is_asked_for(pipe, prompts, tmp_path):
    from obsdiff.pruning import calibrate as module

    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=tmp_path / "store")
    wanted, sites = replace(open_statistics(tmp_path / "store"), prompts=()), subject_of(pipe).graph.sites
    for device in ("cpu", "meta"):
        found = module._with_sums_of(tmp_path / "store", wanted, sites, torch.device(device))
        tensors = [tensor for site in found.sites.values() for tensor in (site.centre, *site.comoment)]
        assert tensors and {tensor.device.type for tensor in tensors} == {device}


def test_a_users_folder_is_no_store(pipe, prompts, tmp_path, monkeypatch):
    """Refused before anything is measured, with all that it holds."""
    from obsdiff.pruning import calibrate as module

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(obsdiff.UserError, match="holds something else than a statistics store"):
        obsdiff.calibrate(pipe, prompts, store=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(obsdiff.UserError, match="cannot write"):
        obsdiff.calibrate(pipe, prompts, store=tmp_path / "file" / "store")


def test_non_finite_activations_are_an_error(pipe, prompts):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn.to_q.bias[0] = float("nan")
    with pytest.raises(obsdiff.UserError, match="non-finite"):
        obsdiff.calibrate(pipe, prompts)


def test_a_layer_without_input_is_an_error(pipe, prompts):
    block = pipe.transformer.transformer_blocks[1]
    block.ff.forward = lambda x: x
    with pytest.raises(obsdiff.UserError, match=r"transformer_blocks\.1\.ff\.net\.0\.proj saw no input"):
        obsdiff.calibrate(pipe, prompts)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"tokens": 0}, "tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"weighting": "cosine"}, "cosine"),
    ],
)
def test_bad_settings(pipe, prompts, change, word):
    with pytest.raises(obsdiff.UserError, match=word):
        obsdiff.calibrate(pipe, prompts, **change)


def test_no_prompts_is_an_error_and_wipes_nothing(pipe):
    with pytest.raises(obsdiff.UserError, match="no calibration prompts"):
        obsdiff.calibrate(pipe, [])
