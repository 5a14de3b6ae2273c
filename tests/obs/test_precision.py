"""Products of rounded inputs with sums in float32: what a device that has them gives, and one that has not."""

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.obs import precision
from obsdiff.obs.hessian import Gram
from obsdiff.obs.observers import OBSERVERS
from obsdiff.obs.precision import SWITCHES, check_precision, offers, rounded
from tests.obs.rounding import to_precision

CPU = torch.device("cpu")
KINDS = {name: OBSERVERS[f"gram in {name}"] for name in SWITCHES}


@pytest.mark.parametrize("name", SWITCHES)
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


@pytest.mark.parametrize("name", SWITCHES)
def test_products_elsewhere_stay_as_they_were(name):
    x = torch.randn(512, 512)
    before = x.T @ x
    switch = torch.backends.mkldnn.matmul
    was = switch.fp32_precision
    with pytest.raises(KeyError), rounded(name, CPU):
        raise KeyError
    assert switch.fp32_precision == was and torch.equal(x.T @ x, before)


def test_a_device_without_it(monkeypatch):
    assert offers("float32", torch.device("meta")) and not offers("tf32", torch.device("meta"))
    check_precision({"gram"}, torch.device("meta"))
    check_precision({"gram", "float32"}, torch.device("meta"))
    with pytest.raises(UserError, match=r"this meta device has no products in bfloat16; use .*precision float32, or"):
        check_precision({"gram", "bfloat16"}, torch.device("meta"))
    monkeypatch.setattr(precision, "offers", lambda name, device: name != "tf32")
    with pytest.raises(
        UserError, match=r"this CPU has no products in tf32; use --calibration.precision float32 or bfl"
    ):
        check_precision({"gram", "tf32"}, CPU)


def test_what_the_switch_does_decides(monkeypatch):
    """A product is made: that torch has a switch says nothing of the hardware."""
    monkeypatch.setattr(precision, "rounded", lambda name, device: rounded("bfloat16", device))
    assert offers("tf32", CPU) == offers("bfloat16", CPU)
