"""Which blocks a class can be built without, seen without weights."""

import diffusers
import pytest
from accelerate import init_empty_weights

from obsdiff.models.families import find_family
from obsdiff.models.graph import stages_of
from obsdiff.models.stacks import Stack, Uncounted, shortened, stacks_of
from tests.families.pipelines import PIPELINES


def found_in(model):
    """The stacks, if every list is a chain."""
    stages = stages_of(model)
    return stacks_of(model, find_family(model), stages, {stage.rpartition(".")[0] for stage in stages})


def build(name):
    return PIPELINES[name].build(encoders=False).transformer


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("sd3", {"transformer_blocks": "num_layers"}),
        ("flux", {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}),
        ("lumina2", {"layers": "num_layers"}),  # one entry counts both of its refiners
        ("chroma", {}),  # its modulations are told apart by the blocks' number
        ("wan21", {"blocks": "num_layers"}),
    ],
)
def test_counts_are_found_in_the_config(name, stacks):
    assert {stack.name: stack.key for stack in found_in(build(name))} == stacks


def test_blocks_that_know_their_number_are_told_it():
    model = build("z-image")
    [stack] = found_in(model)
    assert shortened(model, find_family(model), {stack: {1}}).follow == (("layers.1", "layer_id", 1),)


def test_several_stacks_at_once():
    model = build("flux")
    double, single = found_in(model)
    assert shortened(model, find_family(model), {double: {0}, single: {0, 2}}).config == {
        "num_layers": 1,
        "num_single_layers": 1,
    }
    with pytest.raises(Uncounted, match="would hold none"):
        shortened(model, find_family(model), {double: {0, 1}})


def test_what_the_class_builds_otherwise_stays():
    model = build("sd35")
    [stack] = found_in(model)
    assert stack == Stack("transformer_blocks", "", "num_layers", 3)
    with pytest.raises(Uncounted, match=r"builds transformer_blocks\.1\.\S+ otherwise"):
        shortened(model, find_family(model), {stack: {2}})
    assert shortened(model, find_family(model), {stack: {0}}).config == {"num_layers": 2, "dual_attention_layers": [0]}


def test_a_public_configuration_takes_no_memory():
    """SD3.5-medium: 24 blocks, of which the first 13 have a second attention."""
    with init_empty_weights():
        model = diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pos_embed_max_size=8,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    [stack] = found_in(model)
    changes = shortened(model, find_family(model), {stack: {3, 4, 15}}).config
    assert changes == {"num_layers": 21, "dual_attention_layers": list(range(11))}
    with pytest.raises(Uncounted):
        shortened(model, find_family(model), {stack: {23}})
