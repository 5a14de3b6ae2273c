"""All methods through one door."""

import pytest
import torch

from obsdiff.criteria import METHODS, Problem, find_method
from obsdiff.errors import UserError
from obsdiff.obs.pattern import NM, Unstructured

SINGLE = [name for name, method in METHODS.items() if method.solve is not None]


def problem(pattern, seeds=(1, 2)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weights = [torch.randn(rows, 32, generator=generator) for rows in (8, 5)]
    return Problem(
        weights,
        [pattern] * 2,
        x.T @ x / 200,
        0.01,
        seeds,
        mean=x.mean(0),
        variance=x.var(0, correction=0),
        gradients=[torch.randn(w.shape, generator=generator) for w in weights],
    )


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), Unstructured(0.0), NM(2, 4), NM(4, 8)])
@pytest.mark.parametrize("name", SINGLE)
def test_exact_sparsity_and_zeros(name, pattern):
    given = problem(pattern)
    for weight, solution in zip(given.weights, METHODS[name].solve(given), strict=True):
        assert solution.mask.shape == weight.shape and solution.mask.dtype == torch.bool
        assert bool((solution.weight[~solution.mask] == 0).all())
        expected = round(pattern.sparsity * weight.numel())
        assert int((~solution.mask).sum()) == expected
        if isinstance(pattern, NM):
            assert bool((solution.mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())


@pytest.mark.parametrize("name", ["wanda", "dsnot", "taylor", "diff-pruning", "magnitude", "l1", "random"])
def test_uncompensated_methods_keep_the_weights(name):
    given = problem(Unstructured(0.5))
    for weight, solution in zip(given.weights, METHODS[name].solve(given), strict=True):
        assert torch.equal(solution.weight, weight * solution.mask)


def test_wanda_is_weight_times_input_norm_per_row():
    given = problem(Unstructured(0.5))
    scores = given.weights[0].abs() * given.hessian.diagonal().sqrt()
    mask = METHODS["wanda"].solve(given)[0].mask
    for row, kept in zip(scores, mask, strict=True):
        assert int(kept.sum()) == 16
        assert float(row[kept].min()) >= float(row[~kept].max())


def test_wanda_spreads_the_rounding_over_rows():
    given = problem(Unstructured(0.7))
    dropped = (~METHODS["wanda"].solve(given)[0].mask).sum(1)
    assert int(dropped.sum()) == round(0.7 * 8 * 32) and set(dropped.tolist()) <= {22, 23}


def test_random_depends_on_the_layers_seed_alone():
    a = METHODS["random"].solve(problem(Unstructured(0.5), seeds=(7, 8)))
    b = METHODS["random"].solve(problem(Unstructured(0.5), seeds=(7, 9)))
    assert torch.equal(a[0].mask, b[0].mask) and not torch.equal(a[1].mask, b[1].mask)


def test_unknown_method():
    with pytest.raises(UserError, match=r"unknown method 'obd'; choose one of obs, .*dsnot"):
        find_method("obd")
