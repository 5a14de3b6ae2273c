import pytest
import torch

from obsdiff.obs.lowrank import directions


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs = inputs * torch.logspace(0, -2, 12) + torch.randn(12, generator=generator)
    weights = [torch.randn(rows, 12, generator=generator) * scale for rows, scale in ((7, 1.0), (20, 0.2))]
    return inputs.double(), weights


def lost(inputs, weights, encode, decode):
    """Brute force: the mean squared change of all outputs, the biases taking up the mean."""
    centred = inputs - inputs.mean(0)
    error = sum(((centred - centred @ encode.T @ decode.T) @ w.double().T).square().sum() for w in weights)
    return float(error / sum((centred @ w.double().T).square().sum() for w in weights))


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_the_error_is_the_least_that_the_rank_allows(given, rank):
    """Eckart and Young: no map of this rank changes the outputs of the inputs that were seen less."""
    inputs, weights = given
    centred = inputs - inputs.mean(0)
    found = directions(centred.T @ centred / len(inputs), weights)
    encode, decode = found.first(rank)
    assert encode.shape == (rank, 12) and decode.shape == (12, rank)
    outputs = torch.cat([centred @ w.double().T for w in weights], dim=1)
    values = torch.linalg.svdvals(outputs).square()
    least = float(values[rank:].sum() / values.sum())
    assert lost(inputs, weights, encode, decode) == pytest.approx(least, rel=1e-6)
    assert float(found.left_out[rank]) == pytest.approx(least, rel=1e-6)


def test_without_weights_it_is_principal_components(given):
    inputs, weights = given
    centred = inputs - inputs.mean(0)
    covariance = centred.T @ centred / len(inputs)
    plain, aware = directions(covariance), directions(covariance, weights)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    encode, decode = plain.first(4)
    torch.testing.assert_close((encode @ axes[:4].T).abs(), torch.eye(4).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode @ encode, axes[:4].T @ axes[:4], rtol=1e-6, atol=1e-6)
    for rank in (2, 4, 8):
        assert lost(inputs, weights, *aware.first(rank)) < lost(inputs, weights, *plain.first(rank))


def test_what_never_varied_gets_no_direction(given):
    inputs, weights = given
    flat = inputs.clone()
    flat[:, 5:] = flat[:, :1] * 2 + 1
    centred = flat - flat.mean(0)
    found = directions((centred.T @ centred / len(flat)).float(), weights)
    assert len(found) == 5
    encode, decode = found.first(9)
    assert encode.shape == (9, 12) and not encode[5:].any() and not decode[:, 5:].any()
    assert lost(flat, weights, encode, decode) < 1e-10
