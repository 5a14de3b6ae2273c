"""True configurations on the meta device: dense totals to the parameter, and the published structured tables."""

import diffusers
import pytest
import torch

from obsdiff.bench.presets import PRESETS
from obsdiff.models.families import find_family
from obsdiff.models.graph import shapes_with
from obsdiff.models.subject import graph_of
from obsdiff.models.tracing import trace
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning.defaults import pattern_by
from obsdiff.pruning.plan import kept_units, make_plan

SDXL = PRESETS["sdxl"].config
DDPM = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_MEDIUM = {**SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
SANA_06B = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
TI2V = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

# class, public configuration, parameters (without buffers), and how many modules hold heads, neurons and channels
MODELS = {
    "ddpm-cifar10": ("UNet2DModel", DDPM, 35_746_307, (6, 0, 22)),
    "sd1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}, 859_520_964, (32, 16, 22)),
    "sd2.1": ("UNet2DConditionModel", SD21, 865_910_724, (32, 16, 22)),
    "sdxl": ("UNet2DConditionModel", SDXL, 2_567_463_684, (140, 70, 17)),
    "sd3-medium": ("SD3Transformer2DModel", {**SD3, "pos_embed_max_size": 192}, 2_028_328_000, (24, 47, 0)),
    "sd3.5-medium": ("SD3Transformer2DModel", SD35_MEDIUM, 2_243_171_520, (37, 47, 0)),
    "sd3.5-large": ("SD3Transformer2DModel", SD35_LARGE, 8_056_627_520, (38, 75, 0)),
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 11_901_408_320, (57, 76, 0)),
    "flux-schnell": ("FluxTransformer2DModel", {}, 11_891_178_560, (57, 76, 0)),
    "chroma": ("ChromaTransformer2DModel", {}, 8_899_983_424, (57, 76, 0)),
    "flux2-dev": ("Flux2Transformer2DModel", {}, 32_223_281_152, (56, 64, 0)),
    "flux2-klein-4b": ("Flux2Transformer2DModel", {**KLEIN, "guidance_embeds": False}, 3_875_544_576, (25, 30, 0)),
    "flux2-klein-9b": ("Flux2Transformer2DModel", {**KLEIN_9B, "guidance_embeds": False}, 9_078_581_248, (32, 40, 0)),
    "qwen-image": ("QwenImageTransformer2DModel", {}, 20_430_401_088, (60, 120, 0)),
    "dit-xl-2": ("DiTTransformer2DModel", {"out_channels": 8}, 749_826_464, (28, 28, 0)),
    "pixart-sigma": ("PixArtTransformer2DModel", {"caption_channels": 4096}, 611_349_152, (56, 28, 0)),
    "sana-1.6b": ("SanaTransformer2DModel", {}, 1_604_462_752, (40, 20, 0)),
    "sana-0.6b": ("SanaTransformer2DModel", SANA_06B, 591_747_872, (56, 28, 0)),
    "sana1.5-4.8b": (
        "SanaTransformer2DModel",
        {"num_layers": 60, "qk_norm": "rms_norm_across_heads"},
        4_721_825_952,
        (120, 60, 0),
    ),
    "wan2.1-1.3b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        1_418_996_800,
        (60, 30, 0),
    ),
    "wan2.1-14b": ("WanTransformer3DModel", {}, 14_288_491_584, (80, 40, 0)),
    "wan2.2-ti2v-5b": ("WanTransformer3DModel", TI2V, 4_999_787_712, (60, 30, 0)),
    "ltx-0.9": ("LTXVideoTransformer3DModel", {}, 1_923_385_472, (28, 28, 0)),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}, 1_693_783_872, (30, 30, 0)),
    "cogvideox-5b": ("CogVideoXTransformer3DModel", COGVIDEOX_5B, 5_570_283_072, (42, 42, 0)),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}, 12_821_012_544, (62, 82, 0)),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 2_609_769_152, (30, 30, 0)),
    "z-image": ("ZImageTransformer2DModel", {}, 6_154_908_736, (34, 34, 0)),
    "aura-flow": ("AuraFlowTransformer2DModel", {}, 6_833_439_744, (36, 40, 0)),
}
# parameters with so many directions of what the modulations read (docs/results.md)
RANKED = {
    "sd3.5-large": {64: 5_442_363_712, 128: 5_513_339_200, 256: 5_655_290_176},
    "flux-dev": {64: 8_723_043_392, 128: 8_791_069_760, 256: 8_927_122_496},
    "qwen-image": {64: 13_759_098_432, 128: 13_901_442_624, 256: 14_186_131_008},
    "wan2.1-14b": {64: 14_133_498_944, 128: 14_135_792_704, 256: 14_140_380_224},
    "flux2-dev": {64: 31_589_023_744, 128: 31_596_494_848, 256: 31_611_437_056},
}


def model_of(name):
    kind, config, *_ = MODELS[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


def parameters_after(name, pattern, method):
    """Of the whole denoiser, by the plan that ``method`` makes and the shapes that its slices leave."""
    model = model_of(name)
    graph, pattern = graph_of(model), pattern_by(method, parse_pattern(pattern))
    plan = make_plan(graph, pattern)
    kept = {group.name: kept_units(group, plan.entries[group.name]) for group in plan.groups(graph)}
    shapes = shapes_with(graph, kept)["tensors"]
    return sum(torch.Size(shapes.get(name, parameter.shape)).numel() for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_dense_totals_and_what_can_be_cut(name):
    model = model_of(name)
    *_, total, kinds = MODELS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    found = [group.kind for group in graph_of(model).groups]
    assert tuple(found.count(kind) for kind in ("heads", "ffn", "channels")) == kinds


@pytest.mark.parametrize(
    ("name", "published", "digits"),
    [
        ("sd3-medium", {0.10: 1.911, 0.15: 1.834, 0.20: 1.776, 0.25: 1.717}, 3),
        ("sd3.5-large", {0.15: 7.277, 0.20: 7.016, 0.25: 6.756, 0.30: 6.541}, 3),
        ("sdxl", {0.10: 2.35, 0.15: 2.24, 0.20: 2.13, 0.25: 2.02, 0.30: 1.91}, 2),
    ],
)
def test_obs_diff_leaves_the_parameters_that_were_published(name, published, digits):
    """Tables of OBS-Diff, billions of parameters, to the last digit that is printed there."""
    found = {share: parameters_after(name, f"structured:{share}", "obs-diff") / 1e9 for share in published}
    assert {share: round(billions, digits) for share, billions in found.items()} == published


def test_other_methods_keep_their_own_rules():
    """Ours cuts ResNet channels too and keeps widths that are fast; so it leaves other numbers."""
    assert parameters_after("sdxl", "structured:0.1", "obs") < parameters_after("sdxl", "structured:0.1", "obs-diff")


def zeros(*shape):
    return torch.zeros(shape, device="meta")


TOLD = {"encoder_hidden_states": zeros(1, 4, 4096), "timestep": zeros(1)}
QWEN = {"encoder_hidden_states": zeros(1, 4, 3584), "encoder_hidden_states_mask": None, "img_shapes": [[(1, 2, 2)]]}
FLUX = {"pooled_projections": zeros(1, 768), "guidance": zeros(1), "img_ids": zeros(4, 3), "txt_ids": zeros(4, 3)}
CALLS = {
    "sd3.5-large": {**TOLD, "hidden_states": zeros(1, 16, 8, 8), "pooled_projections": zeros(1, 2048)},
    "flux-dev": {**TOLD, **FLUX, "hidden_states": zeros(1, 4, 64)},
    "qwen-image": {**TOLD, **QWEN, "hidden_states": zeros(1, 4, 64)},
    "wan2.1-14b": {**TOLD, "hidden_states": zeros(1, 16, 1, 8, 8)},
    "flux2-dev": {
        "encoder_hidden_states": zeros(1, 4, 15360),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "img_ids": zeros(4, 4),
        "txt_ids": zeros(4, 4),
        "hidden_states": zeros(1, 4, 128),
    },
}


@pytest.mark.parametrize(
    ("name", "width", "modulations"),
    [  # layers, and their outputs in multiples of the width
        ("sd3.5-large", 2432, (38 + 38 + 1, 38 * 6 + 37 * 6 + 2 + 2)),  # the last block has a shorter one of the text
        ("flux-dev", 3072, (19 * 2 + 38 + 1, 19 * 2 * 6 + 38 * 3 + 2)),
        ("qwen-image", 3072, (60 * 2 + 1, 60 * 2 * 6 + 2)),
        ("wan2.1-14b", 5120, (1, 6)),  # in front of the blocks, for all of them
        ("flux2-dev", 6144, (3 + 1, 2 * 6 + 3 + 2)),
    ],
)
def test_ranks_of_modulations(name, width, modulations):
    """One vector is read by all modulations, and what a rank of it leaves is the sum that paper and pencil give: two
    bases, one for those of the text."""
    model = model_of(name)
    graph = graph_of(model, traced=trace(model, {"": CALLS[name]}, find_family(model).in_front))
    groups = [group for group in graph.groups if group.kind == "rank"]
    layers, multiples = modulations
    assert (sum(len(group.layers) for group in groups), {group.count for group in groups}) == (layers, {width})
    text = {layer for layer in groups[0].layers if "context" in layer or "txt" in layer}
    assert len(groups) == (1 if name.startswith("wan") else 2) and text == set(groups[0].layers if groups[1:] else ())
    total, rows = MODELS[name][2], multiples * width
    for rank in (64, 128, 256):
        shapes = {parameter: list(value.shape) for parameter, value in model.named_parameters()}
        shapes |= shapes_with(graph, {group.name: rank for group in groups})["tensors"]
        expected = total - rows * width + rows * rank + len(groups) * rank * width
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == expected == RANKED[name][rank]
