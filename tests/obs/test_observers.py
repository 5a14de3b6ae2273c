"""What is accumulated at a site: the cheaper observer gives the diagonal of what the dearer one gives."""

import pytest
import torch

from obsdiff.criteria import METHODS
from obsdiff.errors import UserError
from obsdiff.obs.diagonal import Diagonal
from obsdiff.obs.hessian import Gram
from obsdiff.obs.observers import OBSERVERS, gradient_for, observer_for

OFFSETS = (0.0, 1e3, 1e5)


def inputs(offset, groups=2, tokens=300, columns=12):
    x = torch.randn(groups, tokens, columns, generator=torch.Generator().manual_seed(0)).mul(32).round() / 32
    x[:, :, ::2] += offset
    return x


def brute_force(x, alpha):
    """Weighted mean and Σ α (x − μ)², in float64: (groups, n) each."""
    x, alpha = x.double(), alpha.double()[None, :, None]
    mean = (alpha * x).sum(1) / alpha.sum()
    return mean, (alpha * (x - mean[:, None]).square()).sum(1)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_diagonal_is_that_of_the_brute_force(offset):
    x = inputs(offset)
    alpha = torch.cat([torch.full((100,), 0.5), torch.full((200,), 1.5)])
    found, gram = Diagonal.empty(12, groups=2), Gram.empty(12, groups=2)
    for part, weight in ((x[:, :7], 0.5), (x[:, 7:100], 0.5), (x[:, 100:101], 1.5), (x[:, 101:], 1.5)):
        found.add(part, weight)
        gram.add(part, weight)
    mean, squares = brute_force(x, alpha)
    torch.testing.assert_close(found.variances().double(), squares, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.centre, mean, rtol=0, atol=1e-5)
    assert torch.equal(found.centre, gram.centre)
    assert (found.weight_sum, found.num_tokens) == (gram.weight_sum, gram.num_tokens) == (350.0, 300)
    torch.testing.assert_close(found.variances(), gram.variances(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.power(), gram.power(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in OBSERVERS.values() if kind.precision != "int8"])  # see test_int8.py
@pytest.mark.parametrize("offset", OFFSETS)
def test_parts_merge_to_the_whole(kind, offset):
    x = inputs(offset)
    whole, merged = kind.empty(12, groups=2), kind.empty(12, groups=2)
    whole.add(x, 0.9)
    for part in x.split([3, 1, 96, 200], dim=1):
        shard = kind.empty(12, groups=2)
        shard.add(part, 0.9)
        merged.merge(shard)
    merged.merge(kind.empty(12, groups=2))
    torch.testing.assert_close(merged.variances(), whole.variances(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(merged.power(), whole.power(), rtol=1e-5, atol=1e-5)
    assert merged.num_tokens == 300 and merged.weight_sum == pytest.approx(270)


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_what_a_store_keeps_is_the_same_again(kind):
    found = kind.empty(12, groups=2)
    found.add(inputs(1e3), 0.9)
    again = kind.of_tensors(found.tensors(), found.weight_sum, found.num_tokens)
    assert torch.equal(again.power(), found.power()) and again.num_tokens == 300
    for other in (other for other in OBSERVERS.values() if other.shapes(2, 12) != kind.shapes(2, 12)):
        with pytest.raises(ValueError, match="do not belong together"):
            other.of_tensors(found.tensors(), 1.0, 1)


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_non_finite_inputs_are_noticed(kind):
    found = kind.empty(12, groups=2)
    x = inputs(0.0)
    x[1, 4, 3] = float("inf")
    found.add(x, 1.0)
    assert not found.is_finite()


@pytest.mark.parametrize(
    ("needs", "name"), [((), "diagonal"), (["diagonal"], "diagonal"), ("gram", "gram"), ({"gram", "diagonal"}, "gram")]
)
def test_the_cheapest_that_serves(needs, name):
    assert (
        observer_for(needs) == name and set(needs if not isinstance(needs, str) else [needs]) <= OBSERVERS[name].gives
    )


def test_an_unknown_need():
    with pytest.raises(UserError, match="nothing measures gradient; needs are of diagonal, gram"):
        observer_for({"gradient", "diagonal"})


def test_every_method_can_be_served():
    assert {name: observer_for(method.needs) for name, method in METHODS.items() if method.needs} == {
        "obs": "gram", "obs-diff": "gram", "admm": "gram", "sparsegpt": "gram", "wanda": "diagonal",
        "dsnot": "diagonal", "taylor": "diagonal", "diff-pruning": "diagonal", "ecodiff": "diagonal",
    }  # fmt: skip
    assert not any(METHODS[name].needs for name in ("magnitude", "l1", "random"))
    assert {name: gradient_for(method.needs) for name, method in METHODS.items() if gradient_for(method.needs)} == {
        "taylor": "loss_gradient", "diff-pruning": "large_loss_gradient"
    }  # fmt: skip


def test_one_gradient_at_a_time():
    assert gradient_for({"gram"}) is None and gradient_for("loss_gradient") == "loss_gradient"
    with pytest.raises(UserError, match="one gradient, not large_loss_gradient and loss_gradient"):
        gradient_for(["gram", "loss_gradient", "large_loss_gradient"])
