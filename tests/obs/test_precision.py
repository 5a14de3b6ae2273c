"""Products of rounded inputs with sums in float32: what a device that has them gives, and one that has not."""

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.obs import precision
from obsdiff.obs.hessian import FEW, Gram
from obsdiff.obs.observers import OBSERVERS
from obsdiff.obs.precision import check_precision, offers, products_in
from tests.obs.rounding import to_precision
from tests.obs.same import same_sums

CPU = torch.device("cpu")
KINDS = {name: OBSERVERS[f"gram in {name}"] for name in ("tf32", "bfloat16")}


@pytest.mark.parametrize("name", KINDS)
def test_moments_are_those_of_rounded_inputs_or_nothing_is_rounded(name):
    torch.manual_seed(0)
    x = torch.randn(1, 700, 600) * torch.rand(600) + 1e3 * torch.randn(600)
    found, whole, rounding = KINDS[name].empty(600), Gram.empty(600), Gram.empty(600)
    rounding.accumulate = lambda u, weight: Gram.accumulate(rounding, to_precision(u, name), weight)
    for part, weight in zip(x.split(350, dim=1), (0.8, 1.2), strict=True):
        for moments in (found, whole, rounding):
            moments.add(part, weight)
    wanted = (rounding if offers(name, CPU) else whole).covariance()
    got = found.covariance()
    assert float((got - wanted).norm() / wanted.norm()) < 2e-6
    # centred first, so a mean of thousands of times the spread costs nothing
    assert float((got - whole.covariance()).norm() / wanted.norm()) < 2e-3
    assert torch.equal(found.centre, whole.centre)


def test_rounding_is_to_the_nearest_of_so_many_bits():
    value = torch.tensor([1 + 2**-7, 1 + 2**-10, 1 + 2**-12])
    assert to_precision(value, "bfloat16").tolist() == [1 + 2**-7, 1, 1]
    assert to_precision(value, "tf32").tolist() == [1 + 2**-7, 1 + 2**-10, 1]


@pytest.mark.parametrize("name", KINDS)
def test_few_rows_are_not_rounded(name):
    """torch would round some products of a dozen rows and others not, and their sum would not be positive any more."""
    x = torch.randn(1, FEW - 1, 700)
    few, whole = KINDS[name].empty(700), Gram.empty(700)
    few.add(x, 1.0)
    whole.add(x, 1.0)
    assert same_sums(few, whole)


@pytest.fixture
def switches():
    """torch's, as they were afterwards."""
    held = torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul
    before = [switch.fp32_precision for switch in held]
    yield held
    for switch, was in zip(held, before, strict=True):
        switch.fp32_precision = was


@pytest.mark.parametrize("name", KINDS)
def test_products_elsewhere_stay_as_they_were(name, switches):
    x = torch.randn(512, 512)
    before = x.T @ x
    was = switches[-1].fp32_precision
    with pytest.raises(KeyError), products_in(name, CPU):
        raise KeyError
    assert switches[-1].fp32_precision == was and torch.equal(x.T @ x, before)


@pytest.mark.parametrize("at", range(3))
def test_what_a_user_set_is_set_again(at, switches):
    switches[at].fp32_precision = "bf16"
    for name, there in (("float32", "ieee"), ("tf32", "tf32")):
        with products_in(name, CPU):
            assert switches[-1].fp32_precision == there
    assert switches[-1].fp32_precision == "bf16"
    switches[at].fp32_precision = "ieee"
    assert switches[-1].fp32_precision == "ieee"


def test_float32_is_float32_whatever_was_set(switches):
    x, found, wanted = torch.randn(1, 300, 300), Gram.empty(300), Gram.empty(300)
    wanted.add(x, 1.0)
    switches[-1].fp32_precision = "bf16"
    found.add(x, 1.0)
    assert same_sums(found, wanted)


def test_a_device_without_it(monkeypatch):
    assert offers("float32", torch.device("meta")) and not offers("tf32", torch.device("meta"))
    check_precision({"gram"}, torch.device("meta"))
    check_precision({"gram", "float32"}, torch.device("meta"))
    with pytest.raises(UserError, match=r"this meta device has no products in bfloat16; use precision float32$"):
        check_precision({"gram", "bfloat16"}, torch.device("meta"))
    monkeypatch.setattr(precision, "offers", lambda name, device: name != "tf32")
    with pytest.raises(UserError, match=r"this CPU has no products in tf32; use precision float32 or bfloat16"):
        check_precision({"gram", "tf32"}, CPU)


def test_what_the_switch_does_decides(monkeypatch):
    """A product is made: that torch has a switch says nothing of the hardware."""
    monkeypatch.setattr(precision, "products_in", lambda name, device: products_in("bfloat16", device))
    assert offers("tf32", CPU) == offers("bfloat16", CPU)
