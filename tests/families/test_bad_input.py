"""What cannot be pruned truly is refused in one line, whatever the family, and says what to do instead."""

import json
import shutil

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import subject_of
from obsdiff.pruning.planfile import read_plan
from tests.families.pipelines import PIPELINES

TRIED = ("sd15", "ddpm", "flux", "flux2", "qwen-image", "sana", "lumina2", "wan21")


def make(name):
    """A pipeline that knows its call (what it is told is given once, so that it needs no text encoders)."""
    row = PIPELINES[name]
    pipe = row.build(encoders=False)
    call = {key: value for key, value in row.call.items() if key != "output_type"}
    attach_info(pipe, PipelineInfo(row.pipeline, call))
    return pipe


def told(name):
    given = PIPELINES[name].conditioning(1)
    return Conditioning({}, count=1) if set(given) <= {"batch_size"} else Conditioning(given)


def values(denoiser):
    """The layer of values of the second attention: (name of the attention, layer)."""
    found = [name for name, _ in denoiser.named_modules() if name.endswith((".to_v", ".to_qkv_mlp_proj"))]
    return found[1].rpartition(".")[0], denoiser.get_submodule(found[1])


class Fancy(nn.Linear):
    """A subclass with another forward, as quantisers have it."""

    def forward(self, x):
        return super().forward(x) * 2


def lora(denoiser):
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=2, target_modules=r".*\.(to_v|proj_out)"))


def subclass(denoiser):
    values(denoiser)[1].__class__ = Fancy


def quantiser(denoiser):
    values(denoiser)[1].__class__ = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})


def narrow(denoiser):
    layer = values(denoiser)[1]
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def meta(denoiser):
    values(denoiser)[1].to("meta")


def weight_norm(denoiser):
    nn.utils.parametrizations.weight_norm(values(denoiser)[1])


def fused(denoiser):
    denoiser.fuse_qkv_projections()


def compiled(denoiser):
    denoiser.get_submodule(values(denoiser)[0]).compile(backend="eager")


def first_block_cache(denoiser):
    from diffusers import FirstBlockCacheConfig

    denoiser.enable_cache(FirstBlockCacheConfig(0.1))


def pyramid_cache(denoiser):
    from diffusers import PyramidAttentionBroadcastConfig

    denoiser.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: 500,
        )
    )


def offloaded(denoiser):
    cpu = torch.device("cpu")
    denoiser.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def casting(denoiser):
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def no_heads(denoiser):
    denoiser.get_submodule(values(denoiser)[0]).heads = 0


def odd_heads(denoiser):
    denoiser.get_submodule(values(denoiser)[0]).heads = 7


def nan(denoiser):
    values(denoiser)[1].weight.data[0, 0] = float("nan")


EVERY = set(TRIED)
TRANSFORMERS = EVERY - {"sd15", "ddpm"}
WRONG = [
    (lora, "carries a LoRA adapter; call pipe", EVERY - {"ddpm"}),
    (subclass, "is a Fancy, not a plain Linear", EVERY),
    (quantiser, "Linear8bitLt of bitsandbytes: quantised", EVERY),
    (narrow, "held as torch.float8_e4m3fn: it is quantised", EVERY),
    (meta, "is not in memory", EVERY),
    (weight_norm, "is a ParametrizedLinear, not a plain", EVERY),
    (fused, "has fused projections", {"sd15", "flux", "flux2", "wan21"}),  # Qwen's and Sana's fuse nothing
    (compiled, "is compiled, which hides its layers", EVERY),
    (first_block_cache, "has hooks of diffusers", {"flux", "flux2", "qwen-image", "wan21"}),
    (pyramid_cache, "has hooks of diffusers", {"flux", "flux2", "qwen-image", "wan21"}),
    (offloaded, "has hooks of diffusers", EVERY),
    (casting, "has hooks of diffusers", EVERY),
    (no_heads, "a call of this .* fails|heads of .* are uneven", EVERY),
    (odd_heads, "a call of this .* fails|heads of .* are uneven", EVERY),
    (nan, "non-finite weight", EVERY),
]
CASES = [
    pytest.param(change, message, name, id=f"{change.__name__}-{name}")
    for change, message, names in WRONG
    for name in TRIED
    if name in names
]


@pytest.mark.parametrize(("change", "message", "name"), CASES)
def test_odd_denoisers_of_every_family_are_refused(change, message, name):
    pipe = make(name)
    denoiser = subject_of(pipe).denoiser
    change(denoiser)
    before = {key: value.clone() for key, value in denoiser.state_dict().items() if not value.is_meta}
    for pattern in ("unstructured:0.5", "structured:0.5"):
        with pytest.raises(obsdiff.UserError, match=message) as caught:
            _ = subject_of(pipe, told(name)).call  # remembered
            obsdiff.prune(pipe, pattern, method="magnitude", spare_blocks=[])
        assert "\n" not in str(caught.value)
    assert all(
        torch.equal(tensor, denoiser.state_dict()[key]) or tensor.isnan().any() for key, tensor in before.items()
    )


def test_grouped_queries_that_break_their_groups_are_refused():
    """Seven query heads on four of keys and values."""
    pipe = make("lumina2")
    _ = subject_of(pipe, told("lumina2")).call
    attention = pipe.transformer.layers[0].attn
    attention.to_q, attention.heads = nn.Linear(64, 56, bias=False), 7
    attention.to_out[0] = nn.Linear(56, 64, bias=False)
    with pytest.raises(obsdiff.UserError, match=r"heads of layers\.0\.attn .*uneven: 7 query heads|a call .* fails"):
        obsdiff.prune(pipe, "structured:0.5", method="magnitude", spare_blocks=[])


def prune(name, pattern, **options):
    pipe = make(name)
    _ = subject_of(pipe, told(name)).call  # remembered
    return obsdiff.prune(pipe, pattern, method="magnitude", **options)


@pytest.mark.parametrize(
    ("name", "pattern", "options", "message"),
    [
        ("sd35", "structured:channels=0.3", {}, r"names channels, .* none that can be cut \(it has heads and ffn\)"),
        ("flux", "structured:heads=0.3,channels=0.3", {}, "names channels, and a Flux"),
        ("ddpm", "structured:ffn=0.5", {}, r"names ffn, .* \(it has channels and heads\)"),
        ("sd15", "structured:channels=0.5", {"include": ["*.attn1"]}, "names channels, of which include"),
        ("ltx", "structured:0.5", {"include": ["*.attn1"]}, r"cannot be cut, such as \S+attn1: its rotary .* N:M\)"),
        ("wan21", "unstructured:0.5", {"include": ["*.attention.*"]}, r"'\*\.attention\.\*' matches none of 30 names"),
        ("wan21", "structured:0.5", {"exclude": ["blocks.1.attn3"]}, r"such as blocks\.1\.attn"),
        ("sana", "structured:0.5", {"spare_blocks": [3]}, "the denoiser has blocks 0 to 2"),
        ("lumina2", "2:5", {}, "inputs are not a multiple of 5"),
        ("sd15", "structured:heads=1.0", {}, "at least 0 and below 1"),
    ],
)
def test_requests_that_cannot_be_met_say_what_can(name, pattern, options, message):
    with pytest.raises(obsdiff.UserError, match=message) as caught:
        prune(name, pattern, **options)
    assert "\n" not in str(caught.value)


def test_units_of_resnets_are_whole_groups_of_channels():
    """No share leaves a GroupNorm's group in halves: counts are rounded to whole groups, one at least stays."""
    pipe = make("sd15")
    _ = subject_of(pipe, told("sd15")).call
    report = obsdiff.prune(pipe, "structured:channels=0.9", method="magnitude")
    for name, kept in report.masks.items():
        norm = pipe.unet.get_submodule(name + ".norm2") if hasattr(pipe.unet.get_submodule(name), "norm2") else None
        if norm is not None:
            assert norm.num_groups == int(kept.sum()) >= 1 and norm.num_channels % norm.num_groups == 0


def test_a_plan_that_names_what_cannot_be_cut_is_refused(tmp_path):
    graph = subject_of(make("ltx"), told("ltx")).graph
    path = tmp_path / "plan.yaml"
    for name, message in (
        ("transformer_blocks.0.attn1", "cannot be cut: its rotary tables"),
        ("transformer_blocks.0.attn4", r"such as transformer_blocks\.0\.attn4; .* transformer_blocks\.0\.attn2"),
    ):
        path.write_text(f"pattern: structured:0.5\nlayers:\n  {name}: structured:0.5\n")
        with pytest.raises(obsdiff.UserError, match=message):
            read_plan(path, graph)
    path.write_text("denoiser: WanTransformer3DModel\npattern: 2:4\nlayers:\n  a: 2:4\n")
    with pytest.raises(obsdiff.UserError, match="was made for a WanTransformer3DModel; this pipeline has a LTX"):
        read_plan(path, graph)


def test_what_stays_whole_is_said():
    report = prune("ltx", "structured:0.5", spare_blocks=[])
    assert [note for note in report.notes if "left whole" in note and "rotary tables" in note]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a structured prune of a UNet."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pipe = make("sd15")
    _ = subject_of(pipe, told("sd15")).call
    report = obsdiff.prune(pipe, "structured:0.5", method="magnitude")
    obsdiff.save_pipeline(pipe, folder, report)
    return folder


def changed(run, folder, file, change):
    """A copy of a run in which one JSON file says something else."""
    shutil.copytree(run, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_a_manifest_of_another_class_is_refused(run, tmp_path):
    folder = changed(run, tmp_path / "run", "pruning.json", lambda manifest: manifest.update(denoiser="SD3"))
    with pytest.raises(obsdiff.UserError, match="the manifest is of a SD3, and pipeline/ holds a UNet2DConditionModel"):
        obsdiff.load_pipeline(folder)


@pytest.mark.parametrize("number", [0, 3])
def test_a_group_norm_left_in_halves_is_refused(run, tmp_path, number):
    def change(config):
        for name, attributes in config["shrunk"]["attributes"].items():
            if name.endswith("norm2"):
                attributes["num_groups"] = number
                return

    folder = changed(run, tmp_path / "run", "pipeline/unet/config.json", change)
    with pytest.raises(obsdiff.UserError, match="norm2"):
        obsdiff.load_pipeline(folder)
