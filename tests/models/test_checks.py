"""Denoisers whose layers look right but would be pruned without effect or wrongly are refused first."""

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.allocation.stage import prepare
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import PruneOptions, PruningOptions

LAYER = "transformer_blocks.1.attn.to_q"


class Fancy(nn.Linear):
    """A subclass with another forward, as quantisers have it."""

    def forward(self, x):
        return super().forward(x) * 2


def lora(denoiser):
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))


def elsewhere(denoiser):
    """The adapter is on a layer that nobody prunes."""
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=2, target_modules=["context_embedder"]))


def subclass(denoiser):
    denoiser.transformer_blocks[1].attn.to_q.__class__ = Fancy


def quantiser(denoiser):
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    denoiser.transformer_blocks[1].attn.to_q.__class__ = kind


def narrow(denoiser):
    layer = denoiser.transformer_blocks[1].attn.to_q
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def meta(denoiser):
    denoiser.transformer_blocks[1].attn.to_q.to("meta")


def weight_norm(denoiser):
    nn.utils.parametrizations.weight_norm(denoiser.transformer_blocks[1].attn.to_q)


def half_pruned(denoiser):
    from torch.nn.utils import prune

    prune.l1_unstructured(denoiser.transformer_blocks[1].attn.to_q, "weight", 0.5)


def own_forward(denoiser):
    layer = denoiser.transformer_blocks[1].attn.to_q
    layer.forward = lambda x: nn.Linear.forward(layer, x)


def tied(denoiser):
    denoiser.transformer_blocks[2].attn.to_q.weight = denoiser.transformer_blocks[1].attn.to_q.weight


def one_buffer(denoiser):
    """Two weights that overlap in one tensor."""
    both = torch.randn(24, 16)
    denoiser.transformer_blocks[1].attn.to_q.weight = nn.Parameter(both[:16])
    denoiser.transformer_blocks[2].attn.to_k.weight = nn.Parameter(both[8:])


def shared_block(denoiser):
    denoiser.transformer_blocks[1] = denoiser.transformer_blocks[0]


def twice(denoiser):
    attention = denoiser.transformer_blocks[1].attn
    plain = attention.forward
    attention.forward = lambda **given: (plain(**given), plain(**given))[1]


def unused(denoiser):
    denoiser.transformer_blocks[1].ff.forward = lambda x: x


def fused(denoiser):
    denoiser.fuse_qkv_projections()


def compiled(denoiser):
    denoiser.transformer_blocks[1].compile(backend="eager")


def caching(denoiser):
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    apply_first_block_cache(denoiser, FirstBlockCacheConfig(0.1))


def other_input(denoiser):
    layer = denoiser.transformer_blocks[1].attn.to_v
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1,), prepend=True)


def nan(denoiser):
    denoiser.transformer_blocks[1].attn.to_q.weight.data[3, 4] = float("nan")


def infinite(denoiser):
    denoiser.transformer_blocks[1].attn.to_q.bias.data[0] = float("inf")


def broken(denoiser):
    denoiser.transformer_blocks[1].attn.heads = 3


WRONG = [
    (lora, r"attn\.to_k carries a LoRA adapter; call pipe\.fuse_lora\(\)"),
    (elsewhere, "context_embedder carries a LoRA adapter"),
    (subclass, r"to_q is a Fancy, not a plain Linear"),
    (quantiser, r"to_q is a Linear8bitLt of bitsandbytes: quantised"),
    (narrow, "to_q is held as torch.float8_e4m3fn: it is quantised"),
    (meta, r"to_q\.weight is not in memory .* pipe\.remove_all_hooks"),
    (weight_norm, "to_q is a ParametrizedLinear"),
    (half_pruned, "the weight of layer .*to_q is made anew"),
    (own_forward, "to_q has a forward of its own"),
    (tied, r"blocks\.1\.attn\.to_q\.weight and .*blocks\.2\.attn\.to_q\.weight are tied"),
    (one_buffer, r"blocks\.1\.attn\.to_q\.weight and .*blocks\.2\.attn\.to_k\.weight are tied"),
    (shared_block, "are tied"),
    (twice, r"blocks\.1\.attn\.\S+ is read 2 times"),
    (unused, r"blocks\.1\.ff\.net\.0\.proj saw no input"),
    (fused, "fused projections"),
    (compiled, r"transformer_blocks\.1 is compiled"),
    (caching, "hooks of diffusers"),
    (nan, r"layer transformer_blocks\.1\.attn\.to_q has a non-finite weight"),
    (infinite, r"layer transformer_blocks\.1\.attn\.to_q has a non-finite bias"),
    (broken, "a call of this SD3Transformer2DModel fails"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_odd_denoisers_are_refused(pipe, prompts, change, message):
    statistics = obsdiff.calibrate(pipe, prompts[:1], steps=1)
    change(pipe.transformer)
    options = PruneOptions(pipeline="", output="")
    for attempt in (
        lambda: obsdiff.prune(pipe, "unstructured:0.5", method="magnitude"),
        lambda: obsdiff.prune(pipe, "2:4", method="wanda", statistics=statistics),
        lambda: obsdiff.prune(pipe, "structured:0.5", method="magnitude", spare_blocks=[]),
        lambda: obsdiff.calibrate(pipe, prompts[:1], steps=1),
        lambda: obsdiff.allocate(pipe, PruningOptions(allocation="owl"), statistics, prompts[:1]),
        lambda: prepare(pipe, options),
    ):
        with pytest.raises(obsdiff.UserError, match=message):
            attempt()


def test_a_layer_with_another_input_gets_a_site_of_its_own(pipe):
    other_input(pipe.transformer)
    sites = subject_of(pipe).graph.site_of
    assert sites["transformer_blocks.1.attn.to_v"].layers == ("transformer_blocks.1.attn.to_v",)
    assert sites["transformer_blocks.1.attn.to_k"] is sites[LAYER]


def test_a_compiled_denoiser_is_refused(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(obsdiff.UserError, match=r"the transformer is compiled.*_orig_mod"):
        obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")


def test_an_offloaded_pipeline_is_refused_until_its_hooks_are_gone(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(obsdiff.UserError, match=r"offloaded by accelerate; call pipe\.remove_all_hooks"):
        obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    pipe.remove_all_hooks()
    obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")


def test_a_merged_adapter_is_pruned_with_its_effect(pipe):
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    dense = pipe.transformer.transformer_blocks[1].attn.to_q.base_layer.weight.detach().clone()
    pipe.fuse_lora()
    with pytest.raises(obsdiff.UserError, match="LoRA"):
        obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    pipe.unload_lora_weights()
    obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    pruned = pipe.transformer.get_submodule(LAYER).weight
    assert float((pruned == 0).double().mean()) == 0.5
    assert bool((pruned[pruned != 0] != dense[pruned != 0]).all())


def test_excluded_layers_may_be_odd(pipe):
    subclass(pipe.transformer)
    obsdiff.prune(pipe, "unstructured:0.5", method="magnitude", exclude=["*1.attn.to_q"])


@pytest.mark.parametrize("make", ["pipe", "dual_pipe"])
def test_plain_denoisers_pass_untouched(request, make):
    """Dual attention, a last block without text outputs (whose text queries run all the same), half precision."""
    pipe = request.getfixturevalue(make)
    for dtype in (torch.float32, torch.bfloat16):
        subject = subject_of(pipe.to(dtype))
        before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
        subject.check(list(subject.graph.site_of))
        assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())
        assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
