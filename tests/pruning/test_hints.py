"""A site that cannot be solved says why: more dampening is no cure for damaged statistics."""

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.criteria import METHODS
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.graph import Graph, Site
from obsdiff.obs.hessian import Gram
from obsdiff.obs.pattern import Unstructured
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.solve import solve_site


def nan_inside(found):
    found.comoment[0][0, 1, 5] = float("nan")


def infinite(found):
    found.comoment[0][0, 2, 2] = float("inf")


def nan_mean(found):
    found.centre[0, 3] = float("nan")


def negative(found):
    found.comoment[0][0, 4, 4] = -1.0


def nothing(found):
    found.comoment[0].zero_()
    found.centre.zero_()


SINGLE = [name for name, method in METHODS.items() if method.solve is not None]


def other_layer(found):
    found.comoment, found.centre = [found.comoment[0][:, :6, :6]], found.centre[:, :6]


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (nan_inside, "statistics hold non-finite values"),
        (infinite, "statistics hold non-finite values"),
        (nan_mean, "statistics hold non-finite values"),
        (negative, "statistics hold negative variances"),
        (nothing, "statistics saw only zeros"),
        (other_layer, "statistics of layer layer are of 6 inputs, the layer has 8"),
    ],
)
def test_the_cause_is_named(method, damage, cause):
    torch.manual_seed(0)
    graph = Graph(nn.ModuleDict({"layer": nn.Linear(8, 4)}), SD3, (), {"layer": 0}, (Site(("layer",)),), ())
    found = Gram.empty(8)
    found.add(torch.randn(1, 50, 8), 1.0)
    damage(found)
    with pytest.raises(obsdiff.UserError, match=cause) as refused:
        solve_site(graph, ["layer"], [Unstructured(0.5)], found, SolveOptions(method))
    assert "damping" not in str(refused.value) and "calibrate again" in str(refused.value)
