"""Each family's row against the model class it describes."""

import inspect

import diffusers
import pytest
import torch

from obsdiff.bench.workloads import PRESETS
from obsdiff.evaluation.flops import example_inputs
from obsdiff.models.families import FAMILIES, find_family
from obsdiff.models.wiring import wire
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.plan import kept_groups, make_plan
from tests.conftest import make_pipe


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.denoiser)
def test_row_names_what_diffusers_has(family):
    kind = getattr(diffusers, family.denoiser)
    accepted = inspect.signature(kind.forward).parameters
    assert {name for name, _ in family.inputs} <= accepted.keys()
    named = {layer for site in family.sites for layer in site.layers}
    for heads in family.heads:
        assert set(heads.producers) | set(heads.consumers) <= named
    for neurons in family.neurons:
        assert {neurons.producer, neurons.consumer} <= named


def test_sites_really_share_their_input():
    """Every layer of a site is called with the very tensor that its first layer reads."""
    pipe = make_pipe(dual_attention_layers=(0, 1))
    wiring = wire(pipe.transformer)
    seen = {}
    for layer in wiring.site_of:
        wiring.layer(layer).register_forward_pre_hook(lambda _, inputs, layer=layer: seen.__setitem__(layer, inputs[0]))
    with torch.no_grad():
        pipe.transformer(**example_inputs(pipe.transformer, 20, device="cpu"))
    assert seen.keys() == wiring.site_of.keys()
    for site in wiring.sites:
        assert all(seen[layer] is seen[site.name] for layer in site.layers)
        assert seen[site.name].shape[1] == (20 if site.text else 16)


def test_every_linear_layer_of_attention_and_ffn_is_covered():
    wiring = wire(make_pipe(dual_attention_layers=(0, 1)).transformer)
    found = {
        name
        for name, module in wiring.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(part in name for part in (".attn.", ".attn2.", ".ff.", ".ff_context."))
    }
    assert found == set(wiring.site_of)


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
        model = diffusers.SD3Transformer2DModel(**{**PRESETS[preset].transformer, "sample_size": 128})
    wiring = wire(model)
    pattern = Structured(ratio, ratio, multiple_of=1)
    plan = make_plan(wiring, pattern)
    parameters = sum(p.numel() for p in model.parameters())
    for groups in wiring.groups:
        if groups.name in plan.entries:
            channels = (groups.count - kept_groups(groups, pattern)) * groups.size
            for name in groups.producers:
                layer = wiring.layer(name)
                parameters -= channels * (layer.in_features + 1)
            parameters -= sum(channels * wiring.layer(name).out_features for name in groups.consumers)
    assert parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_subclasses_are_found():
    class Mine(diffusers.SD3Transformer2DModel):
        pass

    model = make_pipe().transformer
    assert find_family(Mine(**{k: v for k, v in model.config.items() if not k.startswith("_")})).denoiser == (
        "SD3Transformer2DModel"
    )
