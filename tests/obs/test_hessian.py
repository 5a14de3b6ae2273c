import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from obsdiff.obs import hessian
from obsdiff.obs.hessian import Gram, activation_matrices, strip_spans, weight_matrices
from obsdiff.obs.timesteps import timestep_weights


def tokens(n, columns, seed=0):
    return torch.randn(1, n, columns, generator=torch.Generator().manual_seed(seed))


def test_equals_the_weighted_sum_of_outer_products():
    """OBS-Diff eq. 5, token by token, with eq. 4's weights; wide enough for three strips."""
    weights = timestep_weights("log_decrease", 4)
    found = Gram.empty(300)
    expected = torch.zeros(300, 300, dtype=torch.float64)
    mean = torch.zeros(300, dtype=torch.float64)
    for step, alpha in enumerate(weights):
        x = tokens(7, 300, step)
        found.add(x, alpha)
        for row in x[0].double():
            expected += alpha * torch.outer(row, row)
            mean += alpha * row
    total = 7 * sum(weights)
    torch.testing.assert_close(found.hessian().double(), expected / total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean().double(), mean / total, rtol=1e-5, atol=1e-6)
    assert found.num_tokens == 28 and found.weight_sum == pytest.approx(total)


def test_halves_merge_to_the_whole():
    whole, a, b = (Gram.empty(20) for _ in range(3))
    for part, half in ((tokens(11, 20, 1), a), (tokens(5, 20, 2), b)):
        whole.add(part, 0.9)
        half.add(part, 0.9)
    a.merge(b)
    torch.testing.assert_close(a.hessian(), whole.hessian())
    torch.testing.assert_close(a.mean(), whole.mean())
    assert (a.num_tokens, a.weight_sum) == (whole.num_tokens, whole.weight_sum)


def test_batch_split_does_not_matter():
    x = tokens(64, 30)
    whole, parts = Gram.empty(30), Gram.empty(30)
    whole.add(x, 1.1)
    for part in x.split(5, dim=1):
        parts.add(part, 1.1)
    torch.testing.assert_close(whole.hessian(), parts.hessian(), rtol=1e-5, atol=1e-6)


def test_half_precision_is_cast_before_it_is_scaled():
    """60,000 · sqrt(1.2) overflows float16, and so does its square; the published code scales first."""
    x = torch.full((1, 2, 4), 60_000.0, dtype=torch.float16)
    found = Gram.empty(4)
    found.add(x, 1.2)
    assert found.is_finite()
    torch.testing.assert_close(found.hessian(), torch.full((4, 4), 3.6e9))


def test_non_finite_inputs_are_noticed():
    x = tokens(3, 4)
    x[0, 1, 2] = float("nan")
    found = Gram.empty(4)
    found.add(x, 1.0)
    assert not found.is_finite()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "padding": (0, 1), "stride": (2, 1)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 1, "groups": 4},
    ],
)
def test_unfolded_convolution_is_a_matrix_product(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, bias=False, **options)
    x = torch.randn(2, 4, 7, 6)
    matrices, weights = activation_matrices(layer, x), weight_matrices(layer)
    products = torch.einsum("gpc,grc->grp", matrices, weights).reshape(8, -1)  # (rows, batch · positions)
    expected = layer(x).permute(1, 0, 2, 3).reshape(8, -1)
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-5)


def test_unfolded_linear_is_a_matrix_product():
    layer = nn.Linear(5, 3, bias=False)
    x = torch.randn(2, 4, 5)
    product = activation_matrices(layer, x)[0] @ weight_matrices(layer)[0].T
    torch.testing.assert_close(product, layer(x).view(-1, 3))


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="LayerNorm"):
        activation_matrices(nn.LayerNorm(4), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("columns", "device_type", "rows"),
    [
        (7, "cpu", [7]),
        (300, "cpu", [128, 128, 44]),
        (2_100, "cpu", [263] * 7 + [259]),
        (2_432, "cuda", [1_024, 1_024, 384]),
        (9_728, "cuda", [1_216] * 8),
    ],
)
def test_strips_cover_the_upper_triangle(columns, device_type, rows):
    spans = strip_spans(columns, device_type)
    assert [end - start for start, end in spans] == rows and spans[0][0] == 0 and spans[-1][1] == columns
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    shapes = Gram.shapes(2, columns, device_type)
    assert shapes == [(2, end - start, columns - start) for start, end in spans]


def test_eight_strips_take_nine_sixteenths():
    assert sum(map(math.prod, Gram.shapes(1, 2_048))) == 9 * 2_048**2 / 16


def whole_and_kept(columns=300, groups=2):
    """Inputs (groups, tokens, columns), their moments, and their covariances by a product in float64."""
    x = torch.randn(groups, 400, columns, generator=torch.Generator().manual_seed(3)) + 5
    found = Gram.empty(columns, groups)
    found.add(x, 0.7)
    u = x.double() - x.double().mean(1, keepdim=True)
    return x, found, u.mT @ u / 400


def test_strips_of_each_group_make_its_covariance():
    _, found, expected = whole_and_kept()
    for group in range(2):
        got = found.covariance(group)
        assert torch.equal(got, got.T)
        torch.testing.assert_close(got.double(), expected[group], rtol=1e-4, atol=1e-5)


def test_whole_matrices_are_strips_of_all_rows():
    """As stores of earlier versions keep them, whatever is below the diagonal; more is added to them as before."""
    x, found, expected = whole_and_kept()
    below = torch.full((300, 300), float("nan")).tril(-1)
    whole = torch.stack([(found.covariance(group) * found.weight_sum).triu() for group in range(2)]) + below
    old = Gram.of_tensors({"comoment": whole, "mean": found.centre}, found.weight_sum, found.num_tokens)
    laid_out = old.to("cpu")
    assert [strip.shape for strip in laid_out.comoment] == Gram.shapes(2, 300) and laid_out.is_finite()
    assert torch.equal(laid_out.covariance(0), old.covariance(0))
    for group in range(2):
        torch.testing.assert_close(old.covariance(group), found.covariance(group), rtol=1e-6, atol=1e-7)
    old.add(x, 0.7)
    torch.testing.assert_close(old.covariance(1).double(), expected[1], rtol=1e-4, atol=1e-5)


def test_strips_of_another_device_give_the_same(monkeypatch):
    _, found, _ = whole_and_kept(1_500, 1)
    monkeypatch.setattr(hessian, "STRIP", 1_024)
    other = Gram.empty(1_500)
    assert len(other.comoment) == 2 and len(found.comoment) == 8
    other.add(whole_and_kept(1_500, 1)[0], 0.7)
    monkeypatch.undo()
    again = Gram.of_tensors(other.tensors(), other.weight_sum, other.num_tokens).to("cpu")
    assert len(again.comoment) == 8
    again.merge(Gram.empty(1_500))
    torch.testing.assert_close(again.covariance(), found.covariance(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [slice(1, None), slice(None, -1)])
def test_strips_that_are_missing_are_noticed(changed):
    _, found, _ = whole_and_kept()
    parts = [part for name, part in found.tensors().items() if name != "mean"][changed]
    named = {"comoment" + (f".{number}" if number else ""): part for number, part in enumerate(parts)}
    with pytest.raises(ValueError, match=r"shapes \(2, .*do not belong together"):
        Gram.of_tensors(named | {"mean": found.centre}, 1.0, 1)


def test_some_columns_are_those_of_the_whole():
    x, found, expected = whole_and_kept()
    columns = torch.arange(300)[torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.7]
    few = found.of_columns(columns)
    assert few.is_finite()
    torch.testing.assert_close(few.covariance(1).double(), expected[1][columns][:, columns], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.of_columns(columns).mean(1), x[1, :, columns].double().mean(0))


def test_what_nobody_else_needs_is_let_go_with_the_last_group():
    _, found, _ = whole_and_kept()
    kept, released = found.covariance(1), found.released()
    released.covariance(0)
    assert released.comoment and torch.equal(released.covariance(1), kept) and not released.comoment
    assert torch.equal(found.covariance(1), kept)
    with pytest.raises(AssertionError, match="let go"):
        released.covariance(1)
