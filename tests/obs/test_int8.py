"""Hessian products of inputs rounded to 8 bits: what they are by brute force, and what they keep."""

import math

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.obs import hessian
from obsdiff.obs.hessian import FEW, Gram, Int8Gram
from obsdiff.obs.precision import DOT_PRODUCTS, MOST_ROWS, add_upper_int8_product, check_precision, offers
from tests.obs.same import same_sums

CPU = torch.device("cpu")


def rounded(x):
    """Each column to the nearest of 255 values up to its largest, by hand."""
    columns = []
    for column in x.T:
        step = max(map(abs, column.tolist())) / 127
        whole = torch.round(column / step) if step else column  # in float32, so that ties fall as they do
        columns.append(whole.double() * step)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("columns", [1, 5, 600])
def test_the_product_is_that_of_rounded_columns(columns):
    torch.manual_seed(0)
    x = torch.randn(70, columns) * torch.logspace(-12, 6, columns)
    x[:, 0] = 0.0
    wanted = 1.5 * rounded(x).T @ rounded(x)
    strips = [torch.zeros(end - start, columns - start) for start, end in hessian.strip_spans(columns)]
    for _ in range(2):
        add_upper_int8_product(strips, x.clone(), 0.75)
    sizes = wanted.diagonal().sqrt()
    for (start, end), strip in zip(hessian.strip_spans(columns), strips, strict=True):
        scale = (sizes[start:end, None] * sizes[start:]).clamp_min(1e-30)
        assert float(((strip.double() - wanted[start:end, start:]) / scale).abs().max()) < 2e-5


def test_parts_are_added_and_no_sum_overflows(monkeypatch):
    most = [torch.zeros(2, 2)]
    add_upper_int8_product(most, torch.full((MOST_ROWS, 2), 3.0), 1.0)
    torch.testing.assert_close(most[0], torch.full((2, 2), 9.0 * MOST_ROWS))
    torch.manual_seed(0)
    x, seen = torch.randn(2, 500, 40), []
    whole, parts = Int8Gram.empty(40, 2), Int8Gram.empty(40, 2)
    whole.add(x, 1.0)
    real = hessian.add_upper_int8_product
    monkeypatch.setattr(hessian, "MOST_ROWS", 200)
    monkeypatch.setattr(
        hessian, "add_upper_int8_product", lambda s, rows, w: seen.append(len(rows)) or real(s, rows, w)
    )
    parts.add(x, 1.0)
    assert seen == [200, 200, 100] * 2
    for group in range(2):
        torch.testing.assert_close(parts.covariance(group), whole.covariance(group), rtol=0.02, atol=0.02)
    torch.testing.assert_close(whole.covariance(1), torch.cov(x[1].T, correction=0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_parts_merge_to_the_whole_but_for_what_each_rounds_away(offset):
    torch.manual_seed(0)
    x = torch.randn(1, 300, 12) + offset * torch.randn(12)
    whole, merged, exact = Int8Gram.empty(12), Int8Gram.empty(12), Gram.empty(12)
    whole.add(x, 0.9)
    exact.add(x, 0.9)
    for part in x.split([3, 1, 96, 200], dim=1):
        shard = Int8Gram.empty(12)
        shard.add(part, 0.9)
        merged.merge(shard)
    for found in (whole, merged):
        torch.testing.assert_close(found.variances(), exact.variances(), rtol=5e-3, atol=1e-3)
    assert torch.equal(whole.centre, exact.centre) and merged.num_tokens == 300
    torch.testing.assert_close(merged.centre, exact.centre, rtol=1e-9, atol=1e-6)


def test_the_mean_is_not_rounded_and_few_rows_are_not():
    torch.manual_seed(0)
    x = torch.randn(1, 800, 300) + 1e4 * torch.randn(300)
    found, exact = Int8Gram.empty(300), Gram.empty(300)
    for moments in (found, exact):
        moments.add(x, 0.7)
    assert torch.equal(found.centre, exact.centre)
    assert float((found.covariance() - exact.covariance()).norm() / exact.covariance().norm()) < 1e-2
    few, whole = Int8Gram.empty(300), Gram.empty(300)
    for moments in (few, whole):
        moments.add(x[:, : FEW - 1], 0.7)
    assert same_sums(few, whole)
    assert Int8Gram.gives == {"gram", "diagonal", "int8"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    x = torch.randn(1, 100, 300)
    x[0, 7, 200] = value
    moments = Int8Gram.empty(300)
    moments.add(x, 1.0)
    assert not moments.is_finite()
    strips = [torch.zeros(end - start, 300 - start) for start, end in hessian.strip_spans(300)]
    add_upper_int8_product(strips, x[0], 1.0)
    assert not all(bool(torch.isfinite(strip).all()) for strip in strips)


def test_a_device_without_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_vnni": True})
    with monkeypatch.context() as patched:  # pairs of products that saturate at 16 bits, as without the instructions
        pairs = torch.tensor(-2 * 127**2).clamp_min(-(2**14))
        patched.setattr(torch, "_int_mm", lambda a, b: pairs * torch.ones(len(a), b.shape[1], dtype=torch.int32) * 128)
        assert not offers("int8", CPU)
    for name in DOT_PRODUCTS:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda name=name: {name: True})
        check_precision({"gram", "int8"}, CPU)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "amx_int8": False})
    assert not offers("int8", CPU) and not offers("int8", torch.device("cuda"))
    with pytest.raises(UserError, match=r"this CPU has no products in int8; use precision float32"):
        check_precision({"gram", "int8"}, CPU)
