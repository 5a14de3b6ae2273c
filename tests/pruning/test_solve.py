"""One site solved: the bias takes up the mean, and a convolution's groups are solved each on its own Hessian."""

import pytest
import torch
from torch import nn

from obsdiff.criteria import METHODS
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.graph import Graph, Group, Site, Slices
from obsdiff.obs.hessian import Gram, activation_matrices, weight_matrices
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.pattern import Structured, Unstructured
from obsdiff.obs.sweep import sweep
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.solve import solve_groups, solve_site


def measured(layer, x):
    matrices = activation_matrices(layer, x)
    statistics = Gram.empty(matrices.shape[-1], matrices.shape[0])
    statistics.add(matrices, 1.0)
    return statistics


def solved(layer, x, method, **options):
    graph = Graph(nn.ModuleDict({"layer": layer}), SD3, (), {"layer": 0}, (Site(("layer",)),), ())
    options = SolveOptions(method, **options)
    return solve_site(graph, ["layer"], [Unstructured(0.5)], measured(layer, x), options)["layer"]


def output_error(layer, x, result):
    """The relative output error by running both layers: over the variance of the dense output."""
    bias = None if layer.bias is None else layer.bias + (0 if result.bias_shift is None else result.bias_shift)
    weight = result.weight.view_as(layer.weight)

    def run(weight, bias):
        if isinstance(layer, nn.Conv2d):
            return nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.functional.linear(x, weight, bias)

    dense = run(layer.weight, layer.bias)
    channels = tuple(at for at in range(dense.dim()) if at != (1 if isinstance(layer, nn.Conv2d) else dense.dim() - 1))
    variance = (dense - dense.mean(channels, keepdim=True)).square().sum()
    return float(((run(weight, bias) - dense).square().sum() / variance).detach())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["obs", "admm", "sparsegpt", "wanda"])
def test_reported_error_is_the_real_output_error(method, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 10, bias=bias)
    x = torch.randn(500, 24) @ torch.randn(24, 24) + 3.0
    result = solved(layer, x, method)
    assert (result.bias_shift is not None) is (bias and METHODS[method].refit)
    assert result.error == pytest.approx(output_error(layer, x, result), rel=1e-2)


def test_two_consumers_of_one_site_read_it_once():
    """Moments that nobody else needs are gone when they were read."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"up": nn.Linear(6, 16), "a": nn.Linear(16, 5), "b": nn.Linear(16, 7)})
    consumers = (Slices("a", (0,), 4), Slices("b", (0,), 4))
    group = Group("module", "heads", 4, 0, (Slices("up", (0,), 4),), consumers)
    graph, x = Graph(layers, SD3, (), {}, (), (group,)), torch.randn(300, 16)

    def found(seen):
        return solve_groups(graph, {"module": Structured(0.5, 0.5)}, {"a": seen, "b": seen}, SolveOptions())

    (kept, results), (units, others) = found(measured(layers["a"], x)), found(measured(layers["a"], x).released())
    assert torch.equal(kept["module"], units["module"]) and results.keys() == others.keys() == {"a", "b"}
    assert all(torch.equal(results[name].weight, others[name].weight) for name in results)


@pytest.mark.parametrize(("method", "default"), [("obs", 32), ("sparsegpt", 128), ("obs-diff", 128)])
def test_as_many_columns_are_compared_as_asked(method, default):
    torch.manual_seed(0)
    layer = nn.Linear(256, 6)
    x = torch.randn(800, 256) @ torch.randn(256, 256)
    usual = solved(layer, x, method, refit=False).mask
    factor, _ = upper_factor(measured(layer, x).hessian(), SolveOptions.damping)
    for compared in (32, 64, 128, 256):
        mask = solved(layer, x, method, refit=False, compared=compared).mask
        weights, even = [layer.weight.detach()], method != "obs"
        [(_, wanted)] = sweep(weights, factor, [Unstructured(0.5)], compared, even)
        assert torch.equal(mask, wanted) and torch.equal(mask, usual) is (compared == default)


def test_the_refit_takes_at_most_the_steps_that_are_asked():
    torch.manual_seed(0)
    layer = nn.Linear(64, 6)
    x = torch.randn(300, 64) @ torch.randn(64, 64)
    found = {steps: solved(layer, x, "obs", refit_steps=steps) for steps in (1, 4, 12)}
    assert (found[1].refit_steps, found[4].refit_steps) == (1, 4) and 4 < found[12].refit_steps <= 12
    assert found[12].error < found[4].error < found[1].error


def test_the_bias_helps_where_inputs_have_a_mean():
    torch.manual_seed(0)
    x = torch.randn(500, 24) @ torch.randn(24, 24) + 5 * torch.randn(24)
    with_bias, without = nn.Linear(24, 10), nn.Linear(24, 10, bias=False)
    without.weight = with_bias.weight
    assert solved(with_bias, x, "obs").error < solved(without, x, "obs").error


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "groups": 2}, {"stride": 2, "groups": 4, "bias": False}]
)
def test_convolutions(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, **options)
    x = torch.randn(6, 8, 9, 9) + 1.0
    result = solved(layer, x, "obs")
    assert result.weight.shape == layer.weight.shape
    kept = result.mask.view(weight_matrices(layer).shape)
    assert all(int(group.sum()) == group.numel() - round(0.5 * group.numel()) for group in kept)
    assert result.error == pytest.approx(output_error(layer, x, result), rel=1e-2)
    assert 0 < result.error < 0.5
    assert output_error(layer, x, result) < output_error(layer, x, solved(layer, x, "magnitude"))
