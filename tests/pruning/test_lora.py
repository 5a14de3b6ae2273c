"""A LoRA made for the dense model on what pruning left: the update of what stays, and nothing lost in silence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import obsdiff
from obsdiff.errors import UserError
from obsdiff.models.graph import COLUMNS, ROWS
from obsdiff.models.subject import subject_of
from obsdiff.pruning.lora import kept_entries
from tests.conftest import make_pipe
from tests.families.joint import flux

PROMPTS = ["the digit one", "the digit two", "the digit three"]
LAYERS = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")


def lora_of(pipe, rank=2, layers=LAYERS):
    """A LoRA on some layers of every block, and by layer its update of the dense weight."""
    torch.manual_seed(3)
    state, updates = {}, {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(layers) and name.startswith("transformer_blocks"):
            down, up = torch.randn(rank, module.weight.shape[1]), torch.randn(module.weight.shape[0], rank)
            state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            updates[name] = up @ down
    return state, updates


def call(pipe):
    """Arguments of one call of the denoiser."""
    torch.manual_seed(5)
    config = pipe.transformer.config
    return {
        "hidden_states": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": torch.randn(2, 6, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }


@torch.no_grad()
def answer(pipe):
    return pipe.transformer(**call(pipe))[0]


@torch.no_grad()
def spread_out(pruned, masks):
    """The dense model with a pruned one's weights: zeros where units are gone, products where ranks are reduced."""
    dense, graph = make_pipe(), subject_of(pruned).graph
    entries = kept_entries(graph, masks)
    for name, module in dense.transformer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        own = pruned.transformer.get_submodule(name)
        weight = own.weight @ own.projection[0].weight if hasattr(own, "projection") else own.weight
        rows = entries[name, ROWS].stays if (name, ROWS) in entries else torch.arange(len(module.weight))
        columns = entries[name, COLUMNS].stays if (name, COLUMNS) in entries else torch.arange(module.weight.shape[1])
        module.weight.zero_()[rows[:, None], columns] = weight
        module.bias.zero_()[rows] = own.bias
    return dense, entries


@torch.no_grad()
def add_where_kept(dense, updates, entries):
    for name, update in updates.items():
        weight = dense.transformer.get_submodule(name).weight
        rows = entries[name, ROWS].stays if (name, ROWS) in entries else torch.arange(len(weight))
        columns = entries[name, COLUMNS].stays if (name, COLUMNS) in entries else torch.arange(weight.shape[1])
        weight[rows[:, None], columns] += update[rows[:, None], columns]


@pytest.mark.parametrize("pattern", ["structured:0.5", "rank:3", "structured:0.25+rank:4", "lowrank:5"])
def test_the_update_is_that_of_the_dense_model_where_there_is_a_place(pattern):
    pipe = make_pipe()
    state, updates = lora_of(pipe)
    stats = obsdiff.calibrate(pipe, PROMPTS)
    report = obsdiff.prune(pipe, pattern, statistics=stats)
    before = answer(pipe)
    dense, entries = spread_out(pipe, report.masks)
    torch.testing.assert_close(answer(dense), before, atol=1e-4, rtol=1e-4)

    found = obsdiff.load_lora(pipe, state, masks=report.masks)
    after = answer(pipe)
    add_where_kept(dense, updates, entries)
    torch.testing.assert_close(answer(dense), after, atol=1e-3, rtol=1e-3)
    assert (after - before).abs().max() > 0.1

    norms = {name: float(update.square().sum()) for name, update in updates.items()}
    for name, update in updates.items():
        rows = entries[name, ROWS].stays if (name, ROWS) in entries else torch.arange(len(update))
        columns = entries[name, COLUMNS].stays if (name, COLUMNS) in entries else torch.arange(update.shape[1])
        here = float(update[rows][:, columns].square().sum())
        assert found.kept[name] == pytest.approx(here / norms[name], rel=1e-4)
    whole = sum(found.kept[name] * norms[name] for name in updates) / sum(norms.values())
    assert found.share == pytest.approx(whole, rel=1e-4) and (found.share == 1.0) is not pattern.startswith(
        "structured"
    )

    pipe.unload_lora_weights()
    assert torch.equal(answer(pipe), before)


def test_masked_layers_take_it_whole_and_keep_their_zeros():
    pipe = make_pipe()
    state, updates = lora_of(pipe)
    report = obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    dense = make_pipe()
    dense.transformer.load_state_dict(pipe.transformer.state_dict())
    add_where_kept(dense, updates, {})
    found = obsdiff.load_lora(pipe, state)
    assert found.share == 1.0
    torch.testing.assert_close(answer(pipe), answer(dense), atol=1e-4, rtol=1e-4)
    name = next(name for name in updates if name in report.masks)
    assert not pipe.transformer.get_submodule(name).base_layer.weight[~report.masks[name]].any()


def test_from_a_saved_run_and_back_into_plain_diffusers(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = make_pipe()
    state, _ = lora_of(pipe)
    save_file(state, tmp_path / "lora.safetensors")
    report = obsdiff.prune(pipe, "structured:0.5+rank:4", statistics=obsdiff.calibrate(pipe, PROMPTS))
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    rebased = tmp_path / "rebased.safetensors"
    found = obsdiff.load_lora(loaded, tmp_path / "lora.safetensors", rebased=rebased, adapter_name="mine")
    assert "% of the LoRA's squared norm" in str(found) and loaded.get_active_adapters() == ["mine"]
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    plain.load_lora_weights(str(rebased))
    torch.testing.assert_close(answer(plain), answer(loaded))
    with pytest.raises(UserError, match="exists"):
        obsdiff.load_lora(loaded, tmp_path / "lora.safetensors", rebased=rebased)


def test_scales_are_kept():
    pipe, other = make_pipe(), make_pipe()
    state, _ = lora_of(pipe, rank=4)
    scaled = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in state.items()}
    obsdiff.load_lora(pipe, scaled)
    kohya = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for name, t in scaled.items()}
    obsdiff.load_lora(other, kohya)
    torch.testing.assert_close(answer(pipe), answer(other))


CONFIGS = {
    "alpha": {},
    "of some": {"alpha_pattern": {"transformer_blocks.1.attn.to_q": 3, "ff.net.2": 5}},
    "stabilized": {"use_rslora": True, "alpha_pattern": {"attn.to_k": 3}},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_scales_of_a_file_are_those_of_diffusers(config, tmp_path):
    """What peft's configuration in the file says; the rebased file does without."""
    plain, pipe, again = make_pipe(), make_pipe(), make_pipe()
    dense = answer(plain)
    state, _ = lora_of(plain)
    told = {"r": 2, "lora_alpha": 8, "target_modules": list(LAYERS), **CONFIGS[config]}
    told = json.dumps({f"transformer.{key}": value for key, value in told.items()})
    save_file(state, tmp_path / "lora.safetensors", {"format": "pt", "lora_adapter_metadata": told})
    plain.load_lora_weights(str(tmp_path / "lora.safetensors"))
    obsdiff.load_lora(pipe, tmp_path / "lora.safetensors", rebased=tmp_path / "rebased.safetensors")
    again.load_lora_weights(str(tmp_path / "rebased.safetensors"))
    assert (answer(plain) - dense).abs().max() > 0.1
    torch.testing.assert_close(answer(pipe), answer(plain), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer(again), answer(pipe))


def effects(pipe):
    """By layer, what its LoRA adds to the weight."""
    found = {}
    for name, module in pipe.transformer.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            found[name] = module.get_delta_weight(adapter).detach()
    return found


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_alphas_in_the_file_of_a_flux_pipeline(form, tmp_path):
    torch.manual_seed(0)
    plain = flux(True)
    layer, other = "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"
    names = {layer: f"transformer.{layer}", other: f"transformer.{other}"}
    smaller, larger = ".lora_A.weight", ".lora_B.weight"
    if form == "kohya":
        names = {layer: "lora_unet_double_blocks_0_img_attn_proj", other: "lora_unet_single_blocks_0_linear2"}
        smaller, larger = ".lora_down.weight", ".lora_up.weight"
    state, updates = {}, {}
    for (name, called), alpha in zip(names.items(), (1.0, 6.0), strict=True):
        rows, columns = plain.transformer.get_submodule(name).weight.shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        state |= {called + smaller: down, called + larger: up, f"{called}.alpha": torch.tensor(alpha)}
        updates[name] = alpha / 2 * up @ down
    save_file(state, tmp_path / "lora.safetensors")
    pipe, again = flux(True), flux(True)
    obsdiff.load_lora(pipe, tmp_path / "lora.safetensors", rebased=tmp_path / "rebased.safetensors")
    again.load_lora_weights(str(tmp_path / "rebased.safetensors"))
    plain.load_lora_weights(str(tmp_path / "lora.safetensors"))
    for found in (effects(pipe), effects(again), effects(plain)):
        assert found.keys() == updates.keys()
        for name, update in updates.items():
            torch.testing.assert_close(found[name], update, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("told", [None, '{"transformer.lora_alpha": "much"}', "[", "[1]"])
def test_a_damaged_file_is_refused(told, tmp_path):
    pipe, file = make_pipe(), tmp_path / "lora.safetensors"
    save_file(lora_of(pipe)[0], file, None if told is None else {"lora_adapter_metadata": told})
    if told is None:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read a LoRA from .*lora\.safetensors: ") as error:
        obsdiff.load_lora(pipe, file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: {name.replace("attn.to_q", "attn.other"): t for name, t in state.items()}, "change nothing"),
        (lambda state: {name: t[:, :-1] if "lora_A" in name else t for name, t in state.items()}, "another model"),
        (lambda state: dict(list(state.items())[:1]), "one factor only"),
    ],
)  # fmt: skip
def test_a_lora_of_something_else_is_refused(change, told):
    pipe = make_pipe()
    state, _ = lora_of(pipe, layers=("attn.to_q",))
    with pytest.raises(UserError, match=told):
        obsdiff.load_lora(pipe, change(state))


def test_what_is_dropped_is_said():
    pipe = make_pipe()
    state, _ = lora_of(pipe, layers=("attn.to_q", "attn.to_k"))
    more = {
        name.replace("transformer_blocks.1.attn.to_k", "transformer_blocks.9.attn.to_k"): t for name, t in state.items()
    }
    found = obsdiff.load_lora(pipe, more)
    assert found.dropped == ["transformer_blocks.9.attn.to_k"] and 0.5 < found.share < 1
    assert "transformer_blocks.9.attn.to_k" in str(found)


def test_a_shrunk_pipeline_that_does_not_know_its_units_is_refused(tmp_path):
    pipe = make_pipe()
    state, _ = lora_of(pipe)
    obsdiff.prune(pipe, "structured:0.5", statistics=obsdiff.calibrate(pipe, PROMPTS))
    with pytest.raises(UserError, match=r"masks=report\.masks"):
        obsdiff.load_lora(pipe, state)
    with pytest.raises(UserError, match="not found"):
        obsdiff.load_lora(pipe, tmp_path / "nothing.safetensors")


def test_the_file_is_whole_and_loads(tmp_path):
    pipe = make_pipe()
    state, _ = lora_of(pipe)
    report = obsdiff.prune(pipe, "structured:0.5", statistics=obsdiff.calibrate(pipe, PROMPTS))
    obsdiff.load_lora(pipe, state, masks=report.masks, rebased=tmp_path / "new.safetensors")
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == state.keys() and any(written[name].shape != state[name].shape for name in state)
