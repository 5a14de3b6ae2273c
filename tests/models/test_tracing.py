"""What one call of a denoiser shows, on small models made for it."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from obsdiff.errors import UserError
from obsdiff.models.graph import stages_of
from obsdiff.models.tracing import dead_layers, trace


class Block(nn.Module):
    """Two layers on one input, a modulation of a vector, one layer that never runs."""

    def __init__(self, width=4):
        super().__init__()
        self.mod = nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.idle = nn.Linear(width, width)

    def forward(self, x, vector):
        return x + self.out[0](self.a(x) * self.mod(vector)[:, None] + self.b(x[:]))


class Model(nn.Module):
    def __init__(self, skip=False, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 4)
        self.skip = skip

    def forward(self, x, vector, return_dict=False):
        first = x
        for block in self.blocks:
            x = block(x + first if self.skip else x, vector)
        return (self.head(x),)


CALL = {"": {"x": torch.randn(2, 5, 4), "vector": torch.randn(2, 4)}}


def test_layers_that_read_the_same_memory_share_a_site():
    """A view of all of a tensor is the same memory, whatever object it is."""
    found = trace(Model(), CALL)
    assert found.reads[:3] == (
        ("blocks.0.a", "blocks.0.b"),
        ("blocks.0.mod", "blocks.1.mod", "blocks.2.mod"),
        ("blocks.0.out.0",),
    )
    assert found.vectors == {f"blocks.{i}.mod" for i in range(3)}
    assert found.times["blocks.0.idle"] == 0 and found.times["blocks.1.a"] == 1
    assert found.times["head"] == 1 and all("head" not in reading for reading in found.reads)  # in no stage
    assert found.told == (("blocks.0.mod", "blocks.1.mod", "blocks.2.mod"),)


def test_memory_that_was_freed_and_used_again_is_not_the_same():
    """Of twelve equal blocks, each of whose temporaries may take the place of the last one's."""
    found = trace(Model(blocks=12), CALL)
    assert len([reading for reading in found.reads if reading[0].endswith(".out.0")]) == 12


def test_what_layers_read_is_let_go_while_the_call_goes_on():
    """So that no call holds the activations of all blocks."""
    model, seen, alive = Model(blocks=6), [], []

    def see(module, args):
        alive.append(sum(not storage.expired() for storage in seen))
        seen.append(StorageWeakRef(args[0].untyped_storage()))

    for block in model.blocks:
        block.out[0].register_forward_pre_hook(see)
    trace(model, CALL)
    assert alive == [0] * 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_stages_are_a_chain_only_if_each_reads_what_the_one_before_gave(device):
    call = {"": {name: value.to(device) for name, value in CALL[""].items()}}
    assert trace(Model().to(device), call).chains == {"blocks"}
    assert not trace(Model(skip=True).to(device), call).chains


def test_a_stage_that_runs_twice_is_told():
    class Twice(Model):
        def forward(self, x, vector):
            return super().forward(super().forward(x, vector)[0], vector)

    assert trace(Twice(), CALL).repeats and not trace(Model(), CALL).repeats


def test_stages_are_in_the_order_of_execution():
    class Backwards(Model):
        def forward(self, x, vector):
            for block in reversed(self.blocks):
                x = block(x, vector)
            return x

    assert trace(Backwards(), CALL).stages == ("blocks.2", "blocks.1", "blocks.0")
    assert stages_of(Backwards()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_stages_are_the_smallest_blocks_with_two_layers():
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])  # an attention's output layer
    block = nn.ModuleDict({"q": nn.Linear(2, 2), "out": inner})
    level = nn.ModuleDict({"blocks": nn.ModuleList([block]), "down": nn.ModuleList([nn.Conv2d(2, 2, 1)])})
    assert stages_of(nn.ModuleDict({"levels": nn.ModuleList([level])})) == ["levels.0.blocks.0"]


def test_a_call_that_fails_is_one_line():
    with pytest.raises(UserError, match="a call of this Model fails"):
        trace(Model(), {"": {"x": torch.randn(2, 5, 3), "vector": torch.randn(2, 4)}})


def test_layers_that_reach_no_output_are_dead():
    class Wasteful(Model):
        def forward(self, x, vector):
            for block in self.blocks[:2]:
                x = block(x, vector)
            self.blocks[2](x, vector)
            return (x,)

    model = Wasteful()
    ran = [name for name, times in trace(model, CALL).times.items() if times]
    assert set(dead_layers(model, CALL, ran)) == {name for name in ran if name.startswith("blocks.2.")}
    assert dead_layers(Model(), CALL, ran[:4]) == []
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
