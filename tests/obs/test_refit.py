import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.obs.linalg import quadratic_error
from obsdiff.obs.refit import refit


def problem(rows, columns, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    return weight, x.T @ x / samples, mask


def exact(dense, mask, hessian):
    """Each row's own least squares: w_S = W₀ H_:S H_SS⁻¹."""
    result = torch.zeros_like(dense, dtype=torch.float64)
    for row in range(len(dense)):
        s = mask[row]
        if s.any():
            target = dense[row].double() @ hessian[:, s].double()
            result[row, s] = torch.linalg.solve(hessian[s][:, s].double(), target)
    return result


def test_converges_to_row_wise_least_squares():
    dense, hessian, mask = problem(6, 24, 200, 0)
    found, error, _ = refit(dense * mask, dense, mask, hessian, steps=200, tolerance=0.0)
    torch.testing.assert_close(found.double(), exact(dense, mask, hessian), rtol=2e-2, atol=2e-3)
    best = quadratic_error(exact(dense, mask, hessian) - dense.double(), hessian.double())
    assert error == pytest.approx(best, rel=1e-3)
    assert quadratic_error(found - dense, hessian) == pytest.approx(best, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 40),
    samples=st.integers(1, 60),
    steps=st.integers(0, 12),
    seed=st.integers(0, 10_000),
)
def test_never_increases_the_error_and_keeps_the_mask(rows, columns, samples, steps, seed):
    dense, hessian, mask = problem(rows, columns, samples, seed)
    start = dense * mask
    found, error, _ = refit(start, dense, mask, hessian, steps=steps)
    before = quadratic_error(start - dense, hessian)
    assert quadratic_error(found - dense, hessian) <= before * (1 + 1e-4) + 1e-5 * quadratic_error(dense, hessian)
    power = quadratic_error(dense, hessian)
    assert error == pytest.approx(quadratic_error(found - dense, hessian), rel=1e-2, abs=1e-3 * power)
    assert bool((found[~mask] == 0).all())
    assert bool(torch.isfinite(found).all())


def test_a_full_mask_returns_the_dense_weight():
    dense, hessian, _ = problem(4, 10, 50, 1)
    full = torch.ones_like(dense, dtype=torch.bool)
    found, error, _ = refit(dense, dense, full, hessian)
    assert torch.equal(found, dense) and error == 0


def test_a_singular_hessian_is_solved_and_measured_rightly():
    """Five samples for twelve columns: most rows are solved within the steps, and further steps must not stray."""
    for seed in range(200):
        dense, hessian, mask = problem(7, 12, 5, seed)
        found, error, _ = refit(dense * mask, dense, mask, hessian, steps=40, tolerance=0.0)
        power = quadratic_error(dense, hessian)
        assert error == pytest.approx(quadratic_error(found - dense, hessian), rel=1e-2, abs=1e-3 * power)
        best = quadratic_error(exact_lstsq(dense, mask, hessian) - dense.double(), hessian.double())
        assert error <= best + 1e-3 * power


def exact_lstsq(dense, mask, hessian):
    """Like :func:`exact`, for a singular H."""
    result = torch.zeros_like(dense, dtype=torch.float64)
    for row, s in enumerate(mask):
        if s.any():
            target = dense[row].double() @ hessian[:, s].double()
            result[row, s] = torch.linalg.pinv(hessian[s][:, s].double(), hermitian=True, rtol=1e-6) @ target
    return result


def test_the_steps_that_were_taken_are_counted():
    """Two eigenvalues are solved in two steps (on all columns, columns scaled alike), so the third settles it."""
    dense, _, _ = problem(5, 8, 50, 2)
    mask = torch.ones_like(dense, dtype=torch.bool)
    hessian = torch.diag(torch.ones(8)) + 0.5 * torch.ones(8, 8)  # eigenvalues 1 (seven times) and 5
    start = 0.5 * dense
    assert refit(start, dense, mask, hessian, steps=0).steps == 0
    assert refit(start, dense, mask, hessian, steps=1).steps == 1
    found = refit(start, dense, mask, hessian, steps=20, tolerance=0.004)
    assert found.steps in (2, 3) and found.error < 1e-6 * quadratic_error(dense, hessian)
    assert refit(start, dense, mask, hessian, steps=20, tolerance=0.0).steps <= 20
