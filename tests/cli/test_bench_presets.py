"""Presets in small shapes: each pipeline runs on what it is told, whole and shortened, and is pruned stage by stage."""

import json
from dataclasses import replace

import pytest

from obsdiff.bench import presets
from obsdiff.cli.main import main

UNET = {
    "block_out_channels": (32, 32, 64),
    "attention_head_dim": (2, 2, 4),
    "transformer_layers_per_block": (1, 1, 1),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "text_dim": 32, "freq_dim": 16}
SMALL = {  # changes of the config, and of what is told
    "sdxl": (UNET, {"prompt_embeds": (5, 32), "pooled_prompt_embeds": (16,)}),
    "flux": ({**HEADS, "pooled_projection_dim": 16}, {"prompt_embeds": (5, 32), "pooled_prompt_embeds": (16,)}),
    "qwen-image": (HEADS, {"prompt_embeds": (5, 32), "prompt_embeds_mask": (5,)}),
    "wan-14b": (WAN, {"prompt_embeds": (5, 32)}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sdxl" else n for n in SMALL])
def test_a_preset_runs(name, monkeypatch, capsys):
    preset, (config, told) = presets.PRESETS[name], SMALL[name]
    embeds = {key: told[key.removeprefix("negative_")] for key in preset.embeds}
    work = replace(preset.work, num_prompts=2, steps=2, device="cpu", dtype="float32")
    call = {**preset.call, **({"num_frames": 5} if "num_frames" in preset.call else {})}
    small = replace(preset, config={**preset.config, **config}, embeds=embeds, work=work, call=call)
    monkeypatch.setitem(presets.PRESETS, name, small)
    arguments = ["bench", "prune", "--preset", name, "--streamed", "true", "--side", "64"]
    if preset.blocks:
        arguments += ["--stages", "2"]
    else:
        with pytest.raises(SystemExit):
            main([*arguments, "--stages", "2"])
        assert "--stages cannot shorten it" in capsys.readouterr().err
    main(arguments)
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (
        found["preset"] == name
        and found["streamed"]
        and not found["calls_on_disk"]
        and abs(found["sparsity"] - 0.5) < 0.01
    )
    assert 0 < found["mean_layer_error"] < 1 and 0 < found["weights_bytes"] < 64e6


def test_blocks_are_counted_in_every_preset_but_the_unet():
    for name, preset in presets.PRESETS.items():
        assert bool(preset.blocks) is (name != "sdxl")
        assert all(preset.config[block] > 2 for block in preset.blocks)
        if preset.blocks:
            assert {presets.shortened(preset, 2)[block] for block in preset.blocks} == {2}
