import pytest
import torch
from torch import nn

from obsdiff.obs.hessian import Gram, activation_matrices, weight_matrices
from obsdiff.obs.timesteps import timestep_weights


def tokens(n, columns, seed=0):
    return torch.randn(1, n, columns, generator=torch.Generator().manual_seed(seed))


def test_equals_the_weighted_sum_of_outer_products():
    """OBS-Diff eq. 5, token by token, with eq. 4's weights; wide enough to be halved twice."""
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
