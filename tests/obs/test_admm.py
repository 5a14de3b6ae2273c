import itertools

import pytest
import torch

from obsdiff.obs.admm import Spectrum, admm_support
from obsdiff.obs.linalg import upper_factor
from obsdiff.obs.pattern import NM, Unstructured
from obsdiff.obs.refit import refit
from obsdiff.obs.sweep import sweep


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / 400


def refitted_error(dense, mask, hessian):
    return refit(dense * mask, dense, mask, hessian, 100, 0.0)[1]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)])
def test_support_is_exact_and_better_than_the_sweeps(pattern):
    dense, hessian = problem(16, 64)
    mask = admm_support(dense, Spectrum(hessian, 0.01), pattern)
    assert 1 - float(mask.float().mean()) == pytest.approx(pattern.sparsity, abs=1e-3)
    if isinstance(pattern, NM):
        assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    [(_, swept)] = sweep([dense], upper_factor(hessian)[0], [pattern])
    assert refitted_error(dense, mask, hessian) < refitted_error(dense, swept, hessian)


def test_near_the_best_support_of_small_rows():
    """Against all 70 supports of 8 weights, 30 times: on average among the best few (a heuristic, not exact)."""
    ranks = []
    for seed in range(30):
        dense, hessian = problem(1, 8, seed)
        errors = []
        for kept in itertools.combinations(range(8), 4):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, list(kept)] = True
            errors.append(refitted_error(dense, mask, hessian))
        found = refitted_error(dense, admm_support(dense, Spectrum(hessian, 0.01), Unstructured(0.5)), hessian)
        ranks.append(sum(error < 0.999 * found for error in errors))
    assert sum(ranks) / len(ranks) < 7  # a random support has rank 35
