"""The blocked sweep against column-by-column OBS, and its theorems."""

import pytest
import torch

from obsdiff.obs.linalg import damped, quadratic_error, upper_factor
from obsdiff.obs.pattern import NM, Unstructured
from obsdiff.obs.sweep import sweep


def problem(rows=12, columns=40, samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(samples, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x.T @ x / samples


def brute_force_obs(weight, hessian, kept):
    """Column-order OBS for a fixed mask (Hassibi & Stork): at column q, with the earlier columns frozen, the inverse is
    taken afresh of the Hessian of the remaining ones, w_q is removed and the remaining weights are updated by eq. 2."""
    w = weight.double().clone()
    h = hessian.double()
    for row in range(len(w)):
        for q in range(w.shape[1]):
            if not kept[row, q]:
                inverse = torch.linalg.inv(h[q:, q:])
                w[row, q:] -= w[row, q] / inverse[0, 0] * inverse[:, 0]
    return w * kept


def brute_force_selection(weight, hessian, ratio, block, even=True):
    """SparseGPT's mask: scores w² / [H⁻¹]_qq with earlier columns frozen, compared over a block of columns."""
    rows, columns = weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)
    total = round(ratio * rows * columns)
    lowest = (weight**2 * hessian.diagonal()).flatten().argsort()[:total]
    uncompensated = torch.zeros(rows * columns).index_fill_(0, lowest, 1).view(rows, columns)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        w = brute_force_obs(weight, hessian, kept)  # columns before start are pruned, later ones are updated
        diagonal = torch.stack([torch.linalg.inv(hessian.double()[q:, q:])[0, 0] for q in range(start, end)])
        scores = (w[:, start:end] ** 2 / diagonal).flatten()
        count = round(total * end / columns) - round(total * start / columns)
        if not even:
            count = int(uncompensated[:, start:end].sum())
        dropped = torch.zeros(len(scores), dtype=torch.bool)
        dropped[scores.argsort()[:count]] = True
        kept[:, start:end] = ~dropped.view(rows, end - start)
    return kept


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_unstructured_equals_brute_force(ratio, at_once):
    weight, hessian = problem()
    factor, damping = upper_factor(hessian)
    [(pruned, mask)] = sweep([weight], factor, [Unstructured(ratio)], at_once=at_once)
    h = damped(hessian, damping)
    assert torch.equal(mask, brute_force_selection(weight, h, ratio, 128))
    expected = brute_force_obs(weight, h, mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)  # float32 against float64


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("compared", [128, 64, 32])
def test_selection_over_several_blocks_equals_brute_force(compared, even):
    weight, hessian = problem(rows=4, columns=160, samples=600, seed=3)
    factor, damping = upper_factor(hessian)
    [(_, mask)] = sweep([weight], factor, [Unstructured(0.5)], compared, even)
    assert torch.equal(mask, brute_force_selection(weight, damped(hessian, damping), 0.5, compared, even))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 5)])
def test_nm_keeps_n_of_every_m_and_compensates_as_brute_force(pattern, at_once):
    weight, hessian = problem()
    factor, damping = upper_factor(hessian)
    [(pruned, mask)] = sweep([weight], factor, [pattern], at_once=at_once)
    assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    expected = brute_force_obs(weight, damped(hessian, damping), mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(7, 300), (3, 129), (1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.37, 0.5, 0.999])
@pytest.mark.parametrize("even", [True, False])
def test_sparsity_is_exact_over_blocks(rows, columns, ratio, even):
    weight, hessian = problem(rows, columns, samples=2 * columns + 2)
    [(pruned, mask)] = sweep([weight], upper_factor(hessian)[0], [Unstructured(ratio)], even=even)
    assert int((~mask).sum()) == round(ratio * rows * columns)
    assert bool((pruned[~mask] == 0).all())


def test_ties_do_not_change_the_count():
    weight = torch.ones(12, 40)
    [(_, mask)] = sweep([weight], upper_factor(torch.eye(40))[0], [Unstructured(0.5)])
    assert int(mask.sum()) == 240


def test_layers_of_a_site_together_equal_each_alone():
    weight, hessian = problem(rows=24)
    factor, _ = upper_factor(hessian)
    patterns = [Unstructured(0.5), NM(2, 4), Unstructured(0.25)]
    together = sweep(weight.split(8), factor, patterns)
    for part, pattern, (pruned, mask) in zip(weight.split(8), patterns, together, strict=True):
        [(alone, alone_mask)] = sweep([part], factor, [pattern])
        assert torch.equal(mask, alone_mask)
        torch.testing.assert_close(pruned, alone, rtol=1e-4, atol=1e-5)


def test_columns_at_once_are_those_one_by_one(monkeypatch):
    """Of several layers whose groups differ, over blocks, with a last one that is not full and rows in parts."""
    monkeypatch.setattr("obsdiff.obs.sweep.ROWS", 10)
    weight, hessian = problem(rows=24, columns=312, samples=700, seed=5)
    factor, _ = upper_factor(hessian)
    patterns = [NM(2, 4), Unstructured(0.5), NM(4, 8), Unstructured(0.0)]
    asked = [sweep(weight.split(6), factor, patterns, even=False, at_once=kind) for kind in (False, True)]
    for (one, mask), (other, other_mask) in zip(*asked, strict=True):
        assert torch.equal(mask, other_mask)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_scale_of_the_hessian_changes_nothing():
    weight, hessian = problem()
    [(a, mask_a)] = sweep([weight], upper_factor(hessian)[0], [Unstructured(0.5)])
    [(b, mask_b)] = sweep([weight], upper_factor(hessian * 4.0)[0], [Unstructured(0.5)])
    assert torch.equal(mask_a, mask_b)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loss_identity():
    """Σ ½ w_q² / [H⁻¹]_qq over the removals equals ½ tr(ΔW H ΔWᵀ) (eq. 2), with the damped H."""
    weight, hessian = problem(rows=3, columns=20)
    factor, damping = upper_factor(hessian)
    [(pruned, mask)] = sweep([weight], factor, [Unstructured(0.5)])
    h = damped(hessian, damping).double()
    loss = 0.0
    w = weight.double().clone()
    for row in range(3):
        for q in range(20):
            if not mask[row, q]:
                inverse = torch.linalg.inv(h[q:, q:])
                loss += 0.5 * float(w[row, q] ** 2 / inverse[0, 0])
                w[row, q:] -= w[row, q] / inverse[0, 0] * inverse[:, 0]
    assert 0.5 * quadratic_error(pruned - weight, h.float()) == pytest.approx(loss, rel=1e-3)


def test_inputs_are_not_changed():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    sweep([weight], upper_factor(hessian)[0], [Unstructured(0.5)])
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
