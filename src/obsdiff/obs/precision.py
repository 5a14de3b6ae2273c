"""Products of layer inputs in reduced precision: each input is rounded, all sums stay in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.names import PRECISIONS
from obsdiff.obs.hessian import Gram, add_upper_product

SWITCHES = {"tf32": "tf32", "bfloat16": "bf16"}  # our name, torch's


def _switch(device: torch.device) -> Any:
    """What decides how torch multiplies float32 matrices there."""
    backends: Any = torch.backends  # whose types do not know the second
    return backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul


@contextmanager
def rounded(precision: str, device: torch.device) -> Iterator[None]:
    """float32 products on ``device`` from factors that are rounded to ``precision``, where the hardware has such
    products; as before afterwards."""
    switch = _switch(device)
    before = switch.fp32_precision
    switch.fp32_precision = SWITCHES[precision]
    try:
        yield
    finally:
        switch.fp32_precision = before


def offers(precision: str, device: torch.device) -> bool:
    """Whether ``device`` has products of that precision. torch ignores the switch where there are none, so one is made,
    of numbers that tell."""
    if precision == "float32":
        return True
    if device.type not in ("cpu", "cuda"):
        return False
    barely = torch.full((256, 256), 1 + 2**-12, device=device)  # 1 in both
    total = torch.zeros(256, 256, device=device)
    try:
        with rounded(precision, device):
            total.addmm_(barely.T, barely)
    except RuntimeError:  # torch knows no such switch of this device
        return False
    return bool((total == 256).all())


def check_precision(needs: Collection[str], device: torch.device) -> None:
    """Refuse needs of products that the device does not have.

    Raises:
        UserError: Naming those that it has.
    """
    wanted = [name for name in SWITCHES if name in needs]
    if not wanted or offers(wanted[0], device):
        return
    there = " or ".join(name for name in PRECISIONS if offers(name, device))
    what = "this CPU" if device.type == "cpu" else f"this {device.type} device"
    raise UserError(f"{what} has no products in {wanted[0]}; use --calibration.precision {there}, or leave it out")


class RoundedGram(Gram):
    """Co-moments of inputs that are rounded after they were centred, so that a large mean costs nothing."""

    precision: ClassVar[str]

    def accumulate(self, u: Tensor, weight: float) -> None:
        with rounded(self.precision, u.device):
            for total, inputs in zip(self.comoment, u, strict=True):
                add_upper_product(total, inputs, weight, base=256)  # narrower ones gain nothing from it


class TF32Gram(RoundedGram):
    """Of inputs with 10 bits after the point."""

    precision = "tf32"
    gives = (Gram.gives - {"float32"}) | {"tf32"}


class BFloat16Gram(RoundedGram):
    """Of inputs with 7 bits after the point."""

    precision = "bfloat16"
    gives = (Gram.gives - {"float32"}) | {"bfloat16"}
