"""Reduced precision without the hardware: inputs are rounded, then multiplied in float32."""

import torch
from torch.overrides import TorchFunctionMode

from obsdiff.obs import hessian, precision
from obsdiff.pruning import collect

BITS = {"tf32": 10, "bfloat16": 7}  # after the point


def to_precision(x, name):
    """Float32 ``x`` with that many bits, rounded to nearest, ties to even."""
    if name == "float32":
        return x
    mantissa, exponent = torch.frexp(x.double())
    scale = 2.0 ** (BITS[name] + 1)
    return torch.ldexp((mantissa * scale).round() / scale, exponent).float()


def round_everywhere(monkeypatch):
    """From now on every device has every precision."""
    product, state = hessian.add_upper_product, []

    class Rounded:
        def __init__(self, name, device):
            self.name = name

        def __enter__(self):
            state.append(self.name)

        def __exit__(self, *_):
            state.pop()

    def of_rounded(strips, x, weight):
        product(strips, to_precision(x, state[-1]), weight)

    class RoundedCalls(TorchFunctionMode):
        def __init__(self, name, device):
            super().__init__()
            self.name = name

        def __torch_function__(self, function, types, given=(), more=None):
            if function is torch.nn.functional.linear:
                x, weight, *bias = given
                given = to_precision(x, self.name), to_precision(weight, self.name), *bias
            return function(*given, **(more or {}))

    monkeypatch.setattr(hessian, "products_in", Rounded)
    monkeypatch.setattr(collect, "products_in", RoundedCalls)
    monkeypatch.setattr(hessian, "add_upper_product", of_rounded)
    monkeypatch.setattr(precision, "offers", lambda name, device: True)
