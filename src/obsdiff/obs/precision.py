"""Products of float32 matrices with rounded factors: of floats by torch's own switch, with sums in float32, or of
integers, with exact sums."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.names import PRECISIONS

SWITCHES = {"float32": "ieee", "tf32": "tf32", "bfloat16": "bf16", "int8": "ieee"}  # our name, torch's for floats
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")  # of 8-bit integers, as torch calls what a CPU has
MOST_ROWS = 2**17  # whose products of 8-bit integers an int32 holds


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on ``device``, from factors that are rounded to ``precision`` where the hardware has
    such products; whatever was set before is set again afterwards."""
    backends: Any = torch.backends  # whose types do not know all
    cuda = device.type == "cuda"
    switch, above = (backends.cuda.matmul, backends) if cuda else (backends.mkldnn.matmul, backends.mkldnn)
    before = switch.fp32_precision
    if precision == "float32" and before in ("none", "ieee"):
        yield
        return
    if before == above.fp32_precision:  # it goes by that one, now and later
        before = "none"
    switch.fp32_precision = SWITCHES[precision]
    try:
        yield
    finally:
        switch.fp32_precision = before


def offers(precision: str, device: torch.device) -> bool:
    """Whether ``device`` has products of that precision. torch ignores what it is told where there are none, so one is
    made, of numbers that tell."""
    if precision == "float32":
        return True
    if precision == "int8":
        return device.type == "cpu" and any(map(torch.cpu.get_capabilities().get, DOT_PRODUCTS)) and _multiplies()
    if device.type not in ("cpu", "cuda"):
        return False
    barely = torch.full((256, 256), 1 + 2**-12, dtype=torch.float32, device=device)  # 1 in both
    total = torch.zeros_like(barely)
    try:
        with products_in(precision, device):
            total.addmm_(barely.T, barely)
    except RuntimeError:  # torch knows no such switch of this device
        return False
    return bool((total == len(barely)).all())


def _multiplies() -> bool:
    """Whether products of the largest 8-bit integers are exact: without the instructions, of which an environment
    variable may keep oneDNN, two of them overflow 16 bits."""
    most = torch.full((256, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(most.T, -most) == -256 * 127**2).all())


def check_precision(needs: Collection[str], device: torch.device) -> None:
    """Refuse needs of products that the device does not have.

    Raises:
        UserError: Naming those that it has.
    """
    wanted = [name for name in PRECISIONS if name in needs]
    if all(offers(name, device) for name in wanted):
        return
    there = " or ".join(name for name in PRECISIONS if offers(name, device))
    what = "this CPU" if device.type == "cpu" else f"this {device.type} device"
    raise UserError(f"{what} has no products in {wanted[0]}; use precision {there}")


def add_upper_int8_product(strips: Sequence[Tensor], x: Tensor, weight: float) -> None:
    """``H += weight · Σ x̃ x̃ᵀ`` in the strips of H's upper triangle, with each column of x rounded to 8 bits of its
    largest value: x̃ = s ∘ q, q integers from -127 to 127, so the sums over rows are exact.

    Args:
        strips: (rows, n − start) float32 each.
        x: (rows, n), at most :data:`MOST_ROWS`, overwritten; what is not finite stays so in H.
        weight: Of them.
    """
    largest = torch.maximum(x.amax(0), x.amin(0).neg_())  # aminmax takes six times as long
    scale = largest.div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    rounded = x.div_(scale).round_().to(torch.int8)
    for strip in strips:
        start = x.shape[1] - strip.shape[1]
        left, right = rounded[:, start : start + len(strip)], rounded[:, start:]
        # torch has no public name for it; what it gives is int32
        product = torch._int_mm(left.T, right) * scale[start:]
        strip.addcmul_(product, scale[start : start + len(strip), None], value=weight)
