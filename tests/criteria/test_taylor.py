"""Scores by weights and gradients, each against its formula written out unit by unit."""

import pytest
import torch

from obsdiff.criteria import METHODS, GroupProblem, Problem
from obsdiff.criteria.structured import choose_groups
from obsdiff.obs.pattern import NM, Unstructured
from obsdiff.obs.structured import Consumer

COUNT = 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)])
def test_single_weights(method, pattern):
    """The weights with the lowest |w ∂L/∂w| of the layer, or of each group, go."""
    weight, gradient = drawn(5, 8), drawn(5, 8, seed=1)
    given = Problem([weight], [pattern], None, 0.01, [0], gradients=[gradient])
    [found] = METHODS[method].solve(given)
    scores = [[abs(float(weight[i, j]) * float(gradient[i, j])) for j in range(8)] for i in range(5)]
    if isinstance(pattern, NM):
        for i in range(5):
            for start in (0, 4):
                order = sorted(range(start, start + 4), key=lambda j, i=i: scores[i][j])
                assert found.mask[i, order].tolist() == [False, False, True, True]
    else:
        order = sorted(((i, j) for i in range(5) for j in range(8)), key=lambda at: scores[at[0]][at[1]])
        gone = set(order[: round(pattern.ratio * 40)])
        assert {tuple(at) for at in (~found.mask).nonzero().tolist()} == gone
    assert torch.equal(found.weight, weight * found.mask)


def group_problem(size, gradients=True):
    """Two consumers, of which the second has three more columns, and two producers, one of them gated (two slabs)."""
    consumers = [drawn(4, COUNT * size, seed=2), drawn(7, COUNT * size + 3, seed=3)]
    producers = [drawn(1, COUNT, size, 5, seed=4), drawn(2, COUNT, size, 9, seed=5)]
    by_consumer = [drawn(*w.shape, seed=10 + i) for i, w in enumerate(consumers)]
    by_producer = [drawn(*w.shape, seed=20 + i) for i, w in enumerate(producers)]
    if not gradients:
        by_consumer, by_producer = [None, None], None
    return GroupProblem(
        [Consumer(w, None, o, g) for w, o, g in zip(consumers, (0, 3), by_consumer, strict=True)],
        producers, COUNT, size, 3, "reciprocal_rank", 0.01, 0, by_producer,
    )  # fmt: skip


def pairs_of(given, unit):
    """(weight, gradient) of everything that goes with a unit, as numbers."""
    for consumer in given.consumers:
        for row in range(consumer.weight.shape[0]):
            for column in range(unit * given.size, (unit + 1) * given.size):
                yield float(consumer.weight[row, column]), float(consumer.gradient[row, column])
    for weight, gradient in zip(given.producers, given.gradients, strict=True):
        yield from zip(weight[:, unit].flatten().tolist(), gradient[:, unit].flatten().tolist(), strict=True)


@pytest.mark.parametrize("size", [1, 4])
def test_units(size):
    given = group_problem(size)
    scores = {
        "taylor": [abs(sum(w * g for w, g in pairs_of(given, unit))) for unit in range(COUNT)],
        "diff-pruning": [sum(abs(w * g) for w, g in pairs_of(given, unit)) for unit in range(COUNT)],
        "magnitude": [sum(abs(w) for w, _ in pairs_of(given, unit)) for unit in range(COUNT)],
        "l1": [sum(float(w[:, unit].abs().sum()) for w in given.producers) for unit in range(COUNT)],
    }
    for rule, expected in scores.items():
        order = sorted(range(COUNT), key=expected.__getitem__)
        assert set((~choose_groups(rule, given)).nonzero().flatten().tolist()) == set(order[:3]), rule
    assert len({tuple(sorted(range(COUNT), key=each.__getitem__)[:3]) for each in scores.values()}) > 1


@pytest.mark.parametrize("rule", ["taylor", "diff-pruning"])
def test_without_gradients(rule):
    with pytest.raises(ValueError, match="needs the gradients of a loss"):
        METHODS[rule].solve(Problem([torch.ones(2, 4)], [Unstructured(0.5)], None, 0.01, [0]))
    with pytest.raises(ValueError, match="needs the gradients of a loss"):
        choose_groups(rule, group_problem(1, gradients=False))


def test_the_first_order_change_of_the_loss_of_a_small_network():
    """Two layers, a quadratic loss: Σ w ∂L/∂w of a unit is ∂L/∂a of a gate at 1 on its rows plus one on its columns."""
    up, down = drawn(6, 5).requires_grad_(), drawn(3, 6, seed=1).requires_grad_()
    x, y = drawn(20, 5, seed=2), drawn(20, 3, seed=3)

    def loss(rows, columns):
        return ((torch.tanh(x @ (up * rows[:, None]).T) @ (down * columns).T) - y).square().mean()

    rows, columns = torch.ones(6, requires_grad=True), torch.ones(6, requires_grad=True)
    for_up, for_down, for_rows, for_columns = torch.autograd.grad(loss(rows, columns), (up, down, rows, columns))
    given = GroupProblem(
        [Consumer(down.detach(), gradient=for_down)], [up.detach().view(1, 6, 1, 5)], 6, 1, 2, "", 0.0, 0,
        [for_up.view(1, 6, 1, 5)],
    )  # fmt: skip
    expected = (for_rows + for_columns).abs().argsort()[:2]
    assert set((~choose_groups("taylor", given)).nonzero().flatten().tolist()) == set(expected.tolist())
