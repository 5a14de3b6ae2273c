import pytest
import torch

from obsdiff.obs.linalg import (
    BLOCKED,
    MIRRORED,
    SingularHessian,
    all_finite,
    damped,
    inverse,
    mirror_,
    quadratic_error,
    quadratic_forms,
    upper_factor,
)


def test_factor_is_the_upper_factor_of_the_hessian():
    x = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    factor, used = upper_factor(hessian)
    assert used == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, damped(hessian, 0.01), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse(hessian)[0], torch.linalg.inv(damped(hessian, 0.01)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("columns", [1, BLOCKED - 1, BLOCKED, BLOCKED + 1, 3 * BLOCKED + 44])
def test_factoring_by_blocks_is_as_exact_as_float32_can_be(columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.T @ x
    factor, used = upper_factor(hessian)
    exact = torch.linalg.cholesky(damped(hessian.double(), used).flip(0, 1)).flip(0, 1)
    assert torch.equal(factor, factor.triu())
    assert float((factor - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("column", [0, BLOCKED, 2 * BLOCKED - 1, 2 * BLOCKED + 5])
def test_a_failure_is_noticed_in_every_block(column):
    diagonal = torch.ones(2 * BLOCKED + 6)
    diagonal[column] = -0.05
    with pytest.warns(RuntimeWarning, match="not positive definite at dampening 0.01"):
        factor, used = upper_factor(torch.diag(diagonal))
    assert used == pytest.approx(0.1)
    assert bool(torch.isfinite(factor).all())


@pytest.mark.parametrize("columns", [1, 30, MIRRORED, 2 * MIRRORED + 1])
def test_the_lower_triangle_becomes_the_upper_one_whatever_it_was(columns):
    matrix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))
    wanted = matrix.triu() + matrix.triu(1).T
    matrix[torch.ones_like(matrix, dtype=torch.bool).tril(-1)] = float("nan")
    assert mirror_(matrix) is matrix
    assert torch.equal(matrix, wanted)


@pytest.mark.parametrize("columns", [1, BLOCKED - 1, BLOCKED, 3 * BLOCKED + 44])
@pytest.mark.parametrize("rows", [1, 70])
def test_quadratic_forms_are_those_of_each_row_from_the_upper_triangle(columns, rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator)
    hessian, changes = x.T @ x, torch.randn(rows, columns, generator=generator)
    exact = torch.stack([row @ hessian.double() @ row for row in changes.double()])[:, None]
    below = torch.ones_like(hessian, dtype=torch.bool).tril(-1)
    below &= torch.arange(columns)[:, None] // BLOCKED > torch.arange(columns) // BLOCKED  # own blocks are whole
    found = quadratic_forms(changes, hessian.masked_fill(below, float("nan")))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert quadratic_error(changes, hessian) == pytest.approx(float(exact.sum()), rel=1e-6)


def test_a_failed_factorisation_is_retried_and_says_so():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        _, used = upper_factor(indefinite)
    assert used == pytest.approx(0.1)


def test_a_hopeless_hessian_is_an_error():
    with pytest.warns(RuntimeWarning), pytest.raises(SingularHessian):
        upper_factor(torch.full((2, 2), float("nan")))


def test_rank_deficient_statistics_factorise():
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    factor, used = upper_factor(x.T @ x)
    assert used == 0.01
    assert bool(torch.isfinite(factor).all())


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_one_odd_entry_is_found(odd):
    values = torch.full((20, 30), 3e38)
    assert all_finite(values)  # their sum is not
    values[7, 11] = odd
    assert not all_finite(values)
