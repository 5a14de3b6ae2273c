import pytest
import torch

from obsdiff.obs.linalg import damped, inverse, quadratic_error
from obsdiff.obs.structured import Consumer, compensate, fuse, group_errors, select_groups


def problem(rows=6, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / 300


def best_without(weight, hessian, kept):
    """Constrained least squares by brute force: minimise tr((W' − W) H (W' − W)ᵀ) over W' zero off ``kept``."""
    h, w = hessian.double(), weight.double()
    result = torch.zeros_like(w)
    result[:, kept] = torch.linalg.solve(h[kept][:, kept], (w @ h[:, kept]).T).T
    return result


@pytest.mark.parametrize("size", [1, 4])
def test_group_error_is_the_exact_error_of_its_deletion(size):
    weight, hessian = problem()
    h = damped(hessian, 0.01)
    errors = group_errors(weight, inverse(hessian, 0.01)[0], size)
    for group in range(24 // size):
        kept = torch.ones(24, dtype=torch.bool)
        kept[group * size : (group + 1) * size] = False
        delta = (best_without(weight, h, kept) - weight.double()).float()
        assert float(errors[group]) == pytest.approx(quadratic_error(delta, h), rel=1e-3)


def test_compensation_is_the_closed_form():
    weight, hessian = problem()
    kept = torch.ones(24, dtype=torch.bool)
    kept[[3, 4, 17]] = False
    expected = best_without(weight, damped(hessian, 0.01), kept)[:, kept]
    torch.testing.assert_close(compensate(weight, hessian, kept).double(), expected, rtol=1e-3, atol=1e-4)
    everything = torch.ones(24, dtype=torch.bool)
    assert torch.equal(compensate(weight, hessian, everything), weight)


@pytest.mark.parametrize(("size", "remove"), [(1, 7), (4, 3)])
def test_greedy_selection_equals_brute_force(size, remove):
    """At each step the group whose deletion, with all earlier ones deleted too, costs least."""
    weight, hessian = problem(seed=5)
    h = damped(hessian, 0.01)
    kept = torch.ones(24 // size, dtype=torch.bool)
    for _ in range(remove):
        costs = {}
        for group in kept.nonzero().flatten().tolist():
            trial = kept.clone()
            trial[group] = False
            delta = best_without(weight, h, trial.repeat_interleave(size)) - weight.double()
            costs[group] = quadratic_error(delta.float(), h)
        kept[min(costs, key=costs.get)] = False
    assert torch.equal(select_groups([Consumer(weight, hessian)], size, remove, chunk=1), kept)


def test_reciprocal_rank_is_equation_8():
    """Σ 1 / (60 + rank), the highest sum pruned first: here group 1 (ranks 1 and 2)."""
    image, text = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 5.0, 9.0])
    expected = torch.tensor([1 / 63 + 1 / 61, 1 / 61 + 1 / 62, 1 / 62 + 1 / 63])
    torch.testing.assert_close(fuse([image, text], "reciprocal_rank"), -expected)


def test_relative_error_fusion_weighs_by_size():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([50.0, 50.0])
    torch.testing.assert_close(fuse([a, b], "relative_error"), torch.tensor([0.75, 1.25]))


@pytest.mark.parametrize("streams", [1, 2])
def test_an_unknown_fusion_is_an_error(streams):
    with pytest.raises(ValueError, match="unknown fusion 'recipocal_rank'"):
        fuse([torch.rand(4)] * streams, "recipocal_rank")


def test_joint_selection_removes_the_same_heads_from_both_streams():
    (wa, ha), (wb, hb) = problem(seed=1), problem(seed=2)
    kept = select_groups([Consumer(wa, ha), Consumer(wb, hb)], 4, 2)
    assert kept.shape == (6,) and int(kept.sum()) == 4
