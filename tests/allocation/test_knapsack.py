"""The allocator against brute force, and its promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.allocation.knapsack import Infeasible, choose


def brute_force(errors, costs, limit):
    best = None
    for picked in itertools.product(*(range(len(unit)) for unit in errors)):
        cost = sum(unit[i] for unit, i in zip(costs, picked, strict=True))
        error = sum(unit[i] for unit, i in zip(errors, picked, strict=True))
        if cost <= limit and (best is None or error < best):
            best = error
    return best


numbers = st.integers(0, 30)
units = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(units, st.integers(0, 120))
def test_equals_brute_force_on_whole_numbers(options, limit):
    errors = [[float(e) for e, _ in unit] for unit in options]
    costs = [[float(c) for _, c in unit] for unit in options]
    best = brute_force(errors, costs, limit)
    if best is None:
        with pytest.raises(Infeasible):
            choose(errors, costs, limit)
        return
    found = choose(errors, costs, limit)
    assert found.error == best and found.cost <= limit and found.bound <= best


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_on_curves(seed):
    """Errors that rise as the kept share falls, as measured ones do, with unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.linspace(1, 0.1, 5)
    sizes = torch.rand(6, generator=generator) * 9 + 1
    steep = torch.rand(6, generator=generator) * 3 + 0.5
    weight = torch.rand(6, generator=generator).exp()
    errors = [(w * (1 - kept) ** s).tolist() for w, s in zip(weight, steep, strict=True)]
    costs = [(size * kept).tolist() for size in sizes]
    limit = 0.5 * float(sizes.sum())
    found = choose(errors, costs, limit)
    assert found.error == pytest.approx(brute_force(errors, costs, limit), rel=1e-12)
    assert found.cost <= limit and found.bound <= found.error


def test_many_units_stay_within_the_limit_and_near_the_bound():
    generator = torch.Generator().manual_seed(0)
    kept = torch.linspace(1, 0.05, 20)
    errors = [(torch.rand(1, generator=generator) * (1 - kept) ** 3).tolist() for _ in range(80)]
    costs = [(size * kept).round().tolist() for size in torch.randint(100, 9000, (80,), generator=generator)]
    limit = 0.4 * sum(unit[0] for unit in costs)
    found = choose(errors, costs, limit, max_states=500)
    assert found.cost <= limit and found.bound <= found.error <= 1.001 * found.bound


def test_the_least_is_named_when_nothing_fits():
    with pytest.raises(Infeasible) as raised:
        choose([[0.0, 1.0]], [[3.0, 2.0]], 1.5)
    assert raised.value.least == 2.0
    assert choose([[0.0, 1.0]], [[3.0, 2.0]], 2.0).picked == (1,)
