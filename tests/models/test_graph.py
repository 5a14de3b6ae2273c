"""Slices, shapes and cuts: what is computed is what happens."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from obsdiff.models.families.base import Family
from obsdiff.models.graph import Attribute, Graph, Group, Slices, shapes_with, units_parameters
from obsdiff.models.obsdiff_shrunk import apply_shapes, select
from obsdiff.pruning.surgery import Edits, cut


class Gated(nn.Module):
    """Six units of two channels, twice in ``up``, with a norm, in front of three other channels of ``down``."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 27)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Conv2d(15, 4, 3)
        self.units = 6


GROUP = Group(
    "",
    "ffn",
    6,
    0,
    (Slices("up", (0, 12), 2),),
    (Slices("down", (3,), 2),),
    (Slices("norm", (0,), 2),),
    attributes=(Attribute("", "units", 1),),
)


@pytest.fixture
def graph():
    return Graph(Gated(), Family("Gated"), (), {}, (), (GROUP,))


def test_entries_of_units():
    chosen = torch.tensor([True, False, True])
    assert Slices("x", (1, 10), 2).entries(chosen).tolist() == [1, 2, 5, 6, 10, 11, 14, 15]


def test_a_cut_gives_the_shapes_that_were_computed(graph):
    planned = shapes_with(graph, {"": 4})
    kept = torch.tensor([True, True, False, True, False, True])
    before = {name: tensor.clone() for name, tensor in graph.denoiser.state_dict().items()}
    parameters = sum(p.numel() for p in graph.denoiser.parameters())
    edits = Edits()
    columns = torch.ones(15, dtype=torch.bool)
    columns[Slices("", (3,), 2).entries(~kept)] = False
    cut(edits, graph, {"": kept}, {"down": (before["down.weight"][:, columns], None)})
    model = graph.denoiser
    assert planned["tensors"] == {
        name: list(model.get_parameter(name).shape)
        for name in ("up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight")
    }
    assert planned["attributes"] == {"": {"units": 4}} and model.units == 4
    assert parameters - sum(p.numel() for p in model.parameters()) == 2 * units_parameters(
        Graph(Gated(), Family("Gated"), (), {}, (), (GROUP,)), GROUP
    )
    rows = [r for slab in (0, 12) for u in (0, 1, 3, 5) for r in (slab + 2 * u, slab + 2 * u + 1)] + [24, 25, 26]
    assert torch.equal(model.up.weight, before["up.weight"][rows])
    assert (model.up.out_features, model.norm.normalized_shape, model.down.in_channels) == (19, (8,), 11)
    edits.undo()
    assert model.units == 6 and model.up.out_features == 27
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shapes_are_applied_to_every_kind_of_layer(graph):
    shapes = shapes_with(graph, {"": 2})
    apply_shapes(graph.denoiser, shapes)
    model = graph.denoiser
    assert model.down(torch.randn(1, 7, 4, 4)).shape == (1, 4, 2, 2)
    assert model.norm(torch.randn(1, 4)).shape == (1, 4) and model.up(torch.randn(1, 5)).shape == (1, 11)


def test_shapes_as_they_were_written_before():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4, bias=False)})
    apply_shapes(model, {"layers": {"a": [3, 4], "b": [4, 3]}, "attributes": {"b": {"heads": 3}}})
    assert model["b"](model["a"](torch.randn(1, 4))).shape == (1, 4)
    assert model["a"].bias.shape == (3,) and model["b"].heads == 3


@pytest.mark.parametrize("norm", [nn.RMSNorm(12), RMSNorm(12, 1e-5)])
def test_a_norm_over_all_units_gives_the_kept_ones(norm):
    """Normalised by all of them; and again, of those that were left."""
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
    x = torch.randn(2, 3, 12)
    whole = norm(x)
    select(norm, [0, 2, 3], 3)
    assert torch.equal(norm(x), whole[..., [0, 1, 2, 6, 7, 8, 9, 10, 11]])
    select(norm, [3], 3)
    assert torch.equal(norm(x), whole[..., 9:])
    assert norm.weight.shape == (12,) and list(norm.state_dict()) == ["weight"]


def test_groups_that_share_an_axis_are_bundled():
    def group(name, *layers):
        return Group(name, "ffn", 2, 0, (), tuple(Slices(layer, (0,), 1) for layer in layers))

    groups = (group("a", "x"), group("b", "y"), group("c", "z"), group("d", "x", "z"))
    graph = Graph(nn.Identity(), Family("Identity"), (), {}, (), groups)
    found = [{member.name for member in bundle} for bundle in graph.bundles(["a", "b", "c", "d"])]
    assert found == [{"b"}, {"a", "c", "d"}]
    assert [[member.name for member in bundle] for bundle in graph.bundles(["a", "b"])] == [["a"], ["b"]]
