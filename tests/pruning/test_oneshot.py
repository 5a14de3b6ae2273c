"""The whole driver on a tiny pipeline."""

from functools import cache

import pytest
import torch

import obsdiff
from obsdiff.criteria import METHODS
from obsdiff.models.content import model_hash
from obsdiff.models.subject import subject_of
from obsdiff.pruning.plan import make_plan, packages_of
from tests.conftest import make_pipe


def state(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def unchanged(pipe, before):
    now = pipe.transformer.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


SINGLE = [name for name, method in METHODS.items() if method.solve is not None]


@pytest.fixture(scope="module")
def calibrated(prompts):
    """Statistics of one of the two pipelines by method: with layer errors, whatever the method needs."""

    @cache
    def by_needs(changes, needs):
        return obsdiff.calibrate(make_pipe(**dict(changes)), prompts, needs=needs)

    return lambda method, **changes: by_needs(tuple(changes.items()), frozenset({"gram"} | METHODS[method].needs))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "unstructured:0.7", "2:4", "4:8"])
@pytest.mark.parametrize("method", SINGLE)
def test_every_method_and_pattern(pipe, calibrated, method, pattern):
    before = state(pipe)
    report = obsdiff.prune(pipe, pattern, method=method, statistics=calibrated(method))
    assert report.sparsity == pytest.approx(report.pattern.sparsity, abs=1e-3)
    assert len(report.masks) == len(subject_of(pipe).graph.layers) == 3 * 12 - 3
    for name, mask in report.masks.items():
        weight = pipe.transformer.get_submodule(name).weight
        assert bool((weight[~mask] == 0).all())
        assert report.sparsity_per_layer[name] == pytest.approx(report.pattern.sparsity, abs=2e-3)
    touched = {name + ".weight" for name in report.masks}
    touched |= {name + ".bias" for name in report.masks if report.refit}
    for name, tensor in pipe.transformer.state_dict().items():
        assert name in touched or torch.equal(tensor, before[name])
    assert set(report.layer_error) == set(report.masks)


SCORED = ["obs", "taylor", "diff-pruning", "magnitude", "l1", "random"]


@pytest.mark.parametrize("method", [*SCORED, pytest.param("ecodiff", marks=pytest.mark.slow)])
def test_structured(dual_pipe, calibrated, images, method):
    pipe = dual_pipe
    dense = sum(p.numel() for p in pipe.transformer.parameters())
    statistics = calibrated(method, dual_attention_layers=(0, 1))
    report = obsdiff.prune(pipe, "structured:0.5", method=method, statistics=statistics)
    assert set(report.plan.entries) == {f"transformer_blocks.1.{m}" for m in ("attn", "attn2", "ff", "ff_context")}
    attention = pipe.transformer.transformer_blocks[1].attn
    assert attention.heads == 2 and attention.to_q.weight.shape == (8, 16) and attention.inner_dim == 8
    assert attention.to_add_out.weight.shape == (16, 8) and attention.add_k_proj.bias.shape == (8,)
    assert pipe.transformer.transformer_blocks[1].attn2.heads == 2
    assert pipe.transformer.transformer_blocks[1].ff.net[2].weight.shape == (16, 32)
    assert pipe.transformer.transformer_blocks[0].attn.heads == 4
    assert report.parameters["pruned"] == sum(p.numel() for p in pipe.transformer.parameters()) < dense
    assert bool(torch.isfinite(images(pipe)).all())


@pytest.mark.parametrize("method", ["obs", "diff-pruning", "magnitude"])
def test_shrunk_model_equals_masked_model(calibrated, images, method):
    """Same function as the dense shapes with the removed rows and columns zeroed."""
    shrunk, masked = make_pipe(), make_pipe()
    report = obsdiff.prune(shrunk, "structured:0.5", method=method, statistics=calibrated(method))
    graph = subject_of(masked).graph
    with torch.no_grad():
        for name, mask in report.masks.items():
            group = graph.group_of[name]
            for slices in group.consumers:
                layer = masked.transformer.get_submodule(slices.layer)
                cut = shrunk.transformer.get_submodule(slices.layer)
                layer.weight.zero_()
                layer.weight[:, slices.entries(mask)] = cut.weight
                layer.bias.copy_(cut.bias)
            for slices in group.producers:
                layer = masked.transformer.get_submodule(slices.layer)
                layer.weight[slices.entries(~mask)] = 0
                layer.bias[slices.entries(~mask)] = 0
    torch.testing.assert_close(images(shrunk), images(masked), rtol=1e-4, atol=1e-5)


def test_obs_beats_the_others_in_layer_error(calibrated):
    error = {}
    for method in SINGLE:
        report = obsdiff.prune(make_pipe(), "unstructured:0.5", method=method, statistics=calibrated(method))
        error[method] = report.mean_layer_error
    assert error["admm"] < error["obs"] < error["sparsegpt"] < error["wanda"] < error["random"]


def test_refit_is_an_option_for_every_method(calibrated):
    for method in SINGLE:
        reports = []
        for refit in (False, True):
            asked = {"method": method, "refit": refit, "statistics": calibrated(method)}
            reports.append(obsdiff.prune(make_pipe(), "unstructured:0.5", **asked))
        off, on = reports
        assert METHODS[method].centred or all(torch.equal(off.masks[name], on.masks[name]) for name in off.masks)
        assert on.mean_layer_error < off.mean_layer_error


def test_packages_recalibrate_with_earlier_layers_pruned(prompts):
    pipe = make_pipe()
    passes, dense = [], model_hash(pipe.transformer)

    def calibrate(sites):
        zeros = sum(int((p == 0).sum()) for p in pipe.transformer.parameters())
        passes.append((sites, zeros))
        return obsdiff.calibrate(pipe, prompts, sites=sites)

    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=calibrate, packages=3)
    assert len(passes) == 3 and passes[0][1] == 0 < passes[1][1] < passes[2][1]
    sites = [site.name for site in subject_of(pipe).graph.sites]
    assert set().union(*(found for found, _ in passes)) == set(sites)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.fingerprint["model"] == report.model == dense  # by which a recovery knows its teacher


def test_packages_are_contiguous_and_near_equal(pipe):
    graph = subject_of(pipe).graph
    plan = make_plan(graph, obsdiff.Unstructured(0.5))
    cut = packages_of(graph, plan, 4)
    assert [name for package in cut for name in package] == [site.name for site in graph.sites]
    assert [len(package) for package in cut] == [6, 6, 5, 4] or max(map(len, cut)) - min(map(len, cut)) <= 1
    assert len(packages_of(graph, plan, 1000)) == len(graph.sites)


def test_same_seed_same_masks_whatever_the_batch(prompts):
    masks = []
    for batch_size in (1, 3):
        pipe = make_pipe()
        statistics = obsdiff.calibrate(pipe, prompts, batch_size=batch_size)
        masks.append(obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics).masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_include_exclude_and_spared_blocks(pipe, prompts):
    report = obsdiff.prune(
        pipe,
        "unstructured:0.5",
        method="magnitude",
        include=["*.ff.*"],
        exclude=["*.net.2"],
        spare_blocks=[0],
    )
    assert set(report.masks) == {f"transformer_blocks.{i}.ff.net.0.proj" for i in (1, 2)}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pattern": "unstructured:1.5"}, "below 1"),
        ({"pattern": "3:7"}, "multiple of 7"),
        ({"method": "nope"}, "nope"),
        ({"method": "wanda", "pattern": "structured:0.3"}, "cannot prune heads"),
        ({"include": ["nothing*"]}, "matches none"),
        ({"exclude": ["*"]}, "matches no layer"),
        ({"spare_blocks": [7]}, "block 7"),
        ({"spare_blocks": [0, 1, 2]}, "matches no layer"),
        ({"packages": 0}, "packages"),
        ({"packages": 2}, "packages"),
        ({"damping": float("nan")}, "damping"),
        ({"fusion": "mean"}, "fusion"),
        ({"statistics": None}, "needs statistics"),
    ],
)
def test_bad_requests_change_nothing(pipe, prompts, options, word):
    before = state(pipe)
    given = {"pattern": "unstructured:0.5", "statistics": obsdiff.calibrate(pipe, prompts[:1]), **options}
    with pytest.raises(obsdiff.UserError, match=word):
        obsdiff.prune(pipe, **given)
    assert unchanged(pipe, before)


@pytest.mark.parametrize("solved", [None, "solved"])  # dense weights in memory, or on the disk
@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_a_failure_half_way_takes_everything_back(pipe, prompts, images, monkeypatch, tmp_path, pattern, solved):
    """Interrupted at the third solve: weights, shapes, head counts, class and config are as before."""
    from obsdiff.pruning import apply

    before, drawn, kind = state(pipe), images(pipe), type(pipe.transformer)
    config = dict(pipe.transformer.config)
    statistics = obsdiff.calibrate(pipe, prompts)
    name = "solve_groups" if "structured:" in pattern[:11] else "solve_site"
    real, calls = getattr(apply, name), []

    def fail_late(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(apply, name, fail_late)
    with pytest.raises(KeyboardInterrupt):
        obsdiff.prune(pipe, pattern, statistics=statistics, solved=solved and tmp_path / solved)
    assert unchanged(pipe, before) and type(pipe.transformer) is kind and dict(pipe.transformer.config) == config
    assert torch.equal(images(pipe), drawn)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_pruning_twice_needs_to_be_asked_for(pipe, prompts, images, pattern):
    obsdiff.prune(pipe, pattern, statistics=obsdiff.calibrate(pipe, prompts))
    before = state(pipe)
    again = obsdiff.calibrate(pipe, prompts)
    with pytest.raises(obsdiff.UserError, match="pruned already"):
        obsdiff.prune(pipe, pattern, statistics=again)
    assert unchanged(pipe, before)
    report = obsdiff.prune(pipe, "unstructured:0.7", statistics=again, prune_again=True)
    assert report.sparsity == pytest.approx(0.7, abs=2e-3)
    assert bool(torch.isfinite(images(pipe)).all())


def test_structured_twice_describes_all_shapes(prompts, images, tmp_path):
    pipe = make_pipe()
    obsdiff.prune(pipe, "structured:heads=0.5,ffn=0", method="magnitude")
    report = obsdiff.prune(pipe, "structured:heads=0,ffn=0.5", method="magnitude", prune_again=True)
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(images(obsdiff.load_pipeline(tmp_path / "out")), images(pipe))


def test_what_has_no_denoiser_is_named(pipe):
    from types import SimpleNamespace

    with pytest.raises(obsdiff.UserError, match="a SimpleNamespace is no pipeline"):
        obsdiff.prune(SimpleNamespace(), "2:4", method="magnitude")
    pipe.transformer = None
    with pytest.raises(obsdiff.UserError, match="neither a transformer nor a unet"):
        obsdiff.prune(pipe, "2:4", method="magnitude")
