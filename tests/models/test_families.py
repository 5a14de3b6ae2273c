"""Each family's row against the model class it describes."""

import inspect

import diffusers
import pytest
import torch

from obsdiff.bench.presets import PRESETS
from obsdiff.models.families import FAMILIES, find_family
from obsdiff.models.graph import units_parameters
from obsdiff.models.subject import graph_of, subject_of
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import kept_units, make_plan
from tests.conftest import make_pipe


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.denoiser)
def test_row_names_what_diffusers_has(family):
    kind = getattr(diffusers, family.denoiser)
    accepted = inspect.signature(kind.forward).parameters
    named = {family.sample, family.time, *(argument for argument, _ in family.conditions)}
    assert named | ({family.mask} - {None}) <= accepted.keys()
    assert set(family.components) <= {"transformer", "unet", "transformer_2"}


def test_sites_really_share_their_input():
    """Every layer of a site is called with the very tensor that its first layer reads."""
    subject = subject_of(make_pipe(dual_attention_layers=(0, 1)))
    graph, seen = subject.graph, {}
    for layer in graph.site_of:
        graph.layer(layer).register_forward_pre_hook(lambda _, inputs, layer=layer: seen.__setitem__(layer, inputs[0]))
    with torch.no_grad():
        subject.denoiser(**subject.call[""])
    assert seen.keys() == graph.site_of.keys()
    for site in graph.vectors:  # silu of the same, made anew in each block
        assert all(torch.equal(seen[layer], seen[site.name]) for layer in site.layers)
    for site in graph.sites:
        assert all(seen[layer] is seen[site.name] for layer in site.layers)
        assert seen[site.name].shape[1] == (20 if site.tokens == ("text",) else 16)


def test_every_linear_layer_of_attention_and_ffn_is_covered():
    graph = subject_of(make_pipe(dual_attention_layers=(0, 1))).graph
    found = {
        name
        for name, module in graph.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(part in name for part in (".attn.", ".attn2.", ".ff.", ".ff_context."))
    }
    assert found == {layer for site in graph.sites for layer in site.layers} == set(graph.layers)
    assert graph.chains == {"transformer_blocks"} and not graph.repeats
    assert graph.stages == tuple(f"transformer_blocks.{i}" for i in range(3))


@pytest.mark.parametrize(
    ("preset", "ratio", "billions"),
    [
        ("sd3-medium", 0.10, 1.911),
        ("sd3-medium", 0.15, 1.834),
        ("sd3-medium", 0.20, 1.776),
        ("sd3-medium", 0.25, 1.717),
        ("sd35-large", 0.15, 7.277),
        ("sd35-large", 0.20, 7.016),
        ("sd35-large", 0.25, 6.756),
        ("sd35-large", 0.30, 6.541),
    ],
)
def test_structured_parameter_counts_are_the_papers(preset, ratio, billions):
    """OBS-Diff tables 9 and 4: heads and neurons of all blocks but the first and last, unaligned widths."""
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**{**PRESETS[preset].config, "sample_size": 128})
    graph = graph_of(model)
    pattern = Structured(ratio, ratio, multiple_of=1)
    plan = make_plan(graph, pattern)
    parameters = sum(p.numel() for p in model.parameters())
    for group in plan.groups(graph):
        parameters -= (group.count - kept_units(group, pattern)) * units_parameters(graph, group)
    assert parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_subclasses_are_found():
    class Mine(diffusers.SD3Transformer2DModel):
        pass

    model = make_pipe().transformer
    assert find_family(Mine(**{k: v for k, v in model.config.items() if not k.startswith("_")})).denoiser == (
        "SD3Transformer2DModel"
    )
