"""Inputs with a large mean: what is pruned does not depend on it, and every reported error is the true one."""

import pytest
import torch
from torch import nn

from obsdiff.criteria import METHODS
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.graph import Graph, Group, Site, Slices
from obsdiff.obs.hessian import Gram
from obsdiff.obs.pattern import Structured, parse_pattern
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.solve import solve_groups, solve_site

OFFSETS = [0.0, 1e2, 1e3, 1e4, 1e5]
COLUMNS, ROWS, TOKENS = 24, 10, 600


def inputs(offset, seed=0):
    """On a grid of 1/32, so that in float32 only the mean differs: a third of the channels is offset, each its way."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    x = torch.randn(TOKENS, COLUMNS, generator=generator) @ mixing / 4
    shifts = torch.zeros(COLUMNS)
    shifts[::3] = torch.tensor([1.0, -1.0, 0.5, 1.0, -0.25, 1.0, 1.0, -1.0])
    return (x * 32).round() / 32 + offset * shifts


def statistics_of(x, parts=4):
    found = Gram.empty(x.shape[1])
    for i, part in enumerate(x.chunk(parts)):
        found.add(part[None], 1.2 - 0.1 * i)
    return found


def weights_of(parts=4):
    return torch.cat([torch.full((TOKENS // parts,), 1.2 - 0.1 * i, dtype=torch.float64) for i in range(parts)])


def layer_of(bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(COLUMNS, ROWS, bias=bias).to(dtype)


def true_error(layer, x, result, channels=slice(None)):
    """By running both in float64: over the variance of the dense output."""
    weight = torch.zeros(layer.weight.shape, dtype=torch.float64)
    weight[:, channels] = result.weight.to(layer.weight.dtype).double()
    dense, alpha = layer.weight.detach().double(), weights_of()[:, None]
    shift = torch.zeros(ROWS, dtype=torch.float64)
    if result.bias_shift is not None:
        bias = layer.bias.detach()
        shift = (bias.float() + result.bias_shift).to(bias.dtype).double() - bias.double()
    x = x.double()
    output = x @ dense.T
    output = output - (alpha * output).sum(0) / alpha.sum()
    return float((alpha * (x @ (weight - dense).T + shift).square()).sum() / (alpha * output.square()).sum())


SINGLE = [name for name, method in METHODS.items() if method.solve is not None]


def solved(layer, x, method, pattern, **options):
    graph = Graph(nn.ModuleDict({"layer": layer}), SD3, (), {"layer": 0}, (Site(("layer",)),), ())
    options = SolveOptions(method, **options)
    slopes = {"layer": torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))}
    return solve_site(graph, ["layer"], [parse_pattern(pattern)], statistics_of(x), options, slopes)["layer"]


def cut(layer, x, method, **options):
    """Half the neurons, or half the heads of 4 channels, of a module whose consumer is ``layer``."""
    size = options.pop("size")
    kind, up, down = "ffn" if size == 1 else "heads", Slices("up", (0,), size), Slices("layer", (0,), size)
    group = Group("module", kind, COLUMNS // size, 0, (up,), (down,))
    graph = Graph(nn.ModuleDict({"up": nn.Linear(6, COLUMNS), "layer": layer}), SD3, (), {}, (), (group,))
    bundle, statistics = {"module": Structured(0.5, 0.5)}, {"layer": statistics_of(x)}
    generator = torch.Generator().manual_seed(2)
    slopes = {name: torch.randn(graph.weight(name).shape, generator=generator) for name in ("up", "layer")}
    gates = {"module": torch.randn(group.count, generator=generator)}
    kept, results = solve_groups(graph, bundle, statistics, SolveOptions(method, **options), slopes, gates)
    return kept["module"], results["layer"]


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4"])
@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("refit", [None, True])
def test_masks_and_weights_do_not_depend_on_an_offset(method, pattern, refit):
    """Where the bias takes up the mean, errors neither; published baselines go by raw second moments, by definition."""
    found = {offset: solved(layer_of(), inputs(offset), method, pattern, refit=refit) for offset in OFFSETS}
    refits = SolveOptions(method, refit).refits
    if method in ("sparsegpt", "wanda", "dsnot", "obs-diff"):
        assert all(bool(torch.isfinite(result.weight).all()) for result in found.values())
        return
    for result in found.values():
        assert torch.equal(result.mask, found[0.0].mask)
        torch.testing.assert_close(result.weight, found[0.0].weight, rtol=1e-3, atol=1e-3 * 0.2)
        if refits:
            assert result.error == pytest.approx(found[0.0].error, rel=1e-3)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("method", SINGLE)
def test_reported_errors_are_true(method, refit, bias, offset):
    layer, x = layer_of(bias), inputs(offset)
    for pattern in ("unstructured:0.6", "2:4"):
        result = solved(layer, x, method, pattern, refit=refit)
        assert result.error == pytest.approx(true_error(layer, x, result), rel=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["obs", "sparsegpt"])
def test_errors_count_the_rounding_of_what_is_written(method, dtype, offset):
    """Rounded to bfloat16, kept weights of an offset channel move the mean; the bias takes up what it can hold."""
    layer, x = layer_of(dtype=dtype), inputs(offset)
    result = solved(layer, x, method, "unstructured:0.5")
    assert torch.equal(result.weight, result.weight.to(dtype).float())
    assert result.error == pytest.approx(true_error(layer, x, result), rel=1e-3)


def test_an_error_the_size_of_the_variance_is_not_hidden_by_the_mean():
    """All inputs offset by 1,000: dropping half the weights is wrong by far more than the output varies."""
    layer, x = layer_of(bias=False), inputs(0.0) + 1000.0
    result = solved(layer, x, "magnitude", "unstructured:0.5", refit=False)
    assert result.error > 100
    assert result.error == pytest.approx(true_error(layer, x, result), rel=1e-3)


@pytest.mark.parametrize("offset", [3e4, 1e5])
def test_obs_needs_no_dampening_for_an_offset(offset, recwarn):
    solved(layer_of(), inputs(offset), "obs", "unstructured:0.5")
    assert not recwarn.list


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.structured])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("refit", [True, False])
def test_structured(method, size, refit):
    base, _ = cut(layer_of(), inputs(0.0), method, size=size, refit=refit)
    first = None
    for offset in OFFSETS:
        layer, x = layer_of(), inputs(offset)
        kept, result = cut(layer, x, method, size=size, refit=refit)
        channels = kept.repeat_interleave(size)
        assert result.error == pytest.approx(true_error(layer, x, result, channels), rel=1e-3)
        if refit or method not in ("obs", "obs-diff"):
            assert torch.equal(kept, base)
        if refit:
            first = result if first is None else first
            assert result.error == pytest.approx(first.error, rel=1e-3)
            torch.testing.assert_close(result.weight, first.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", SINGLE)
def test_inputs_that_do_not_vary(method):
    """One and the same token all the time: nothing fails, and a bias makes up for everything."""
    x = inputs(10.0)[:1].expand(TOKENS, -1)
    layer = layer_of()
    result = solved(layer, x, method, "unstructured:0.5", refit=True)
    assert bool(torch.isfinite(result.weight).all())
    assert result.error == pytest.approx(0.0, abs=1e-6)
    zero = layer_of()
    nn.init.zeros_(zero.weight)
    assert solved(zero, x, "magnitude", "unstructured:0.5").error == 0.0


@pytest.mark.parametrize("offset", OFFSETS)
def test_moments_do_not_depend_on_batches_or_shards(offset):
    x = inputs(offset)
    whole, split, merged = (Gram.empty(COLUMNS) for _ in range(3))
    whole.add(x[None], 0.9)
    for part in x.split([3, 1, 96, 400, 100]):
        split.add(part[None], 0.9)
        shard = Gram.empty(COLUMNS)
        shard.add(part[None], 0.9)
        merged.merge(shard)
    mean = x.double().mean(0)
    covariance = (x.double() - mean).T @ (x.double() - mean) / TOKENS
    for found in (whole, split, merged):
        torch.testing.assert_close(found.covariance().double(), covariance, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean(), mean, rtol=0, atol=1e-5)
        assert found.num_tokens == TOKENS and found.weight_sum == pytest.approx(0.9 * TOKENS)
    hessian = x.double().T @ x.double() / TOKENS
    torch.testing.assert_close(whole.hessian().double(), hessian, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.power()[0].double(), hessian.diagonal(), rtol=1e-5, atol=1e-5)


def test_nothing_is_added_by_no_inputs():
    found = Gram.empty(4)
    found.add(torch.zeros(1, 0, 4), 1.0)
    found.merge(Gram.empty(4))
    assert found.num_tokens == 0 and found.weight_sum == 0.0 and found.is_finite()
