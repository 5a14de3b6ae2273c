"""A LoRA of the whole model on one whose stages went: it finds its blocks, or is refused."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

import obsdiff
from obsdiff.models.calls import remembered_call
from tests.conftest import make_pipe
from tests.pruning.test_depth import removing, skipping


def lora_of(pipe):
    """On two layers of every block."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i in range(len(pipe.transformer.transformer_blocks)):
        for name in ("attn.to_q", "ff.net.2"):
            rows, columns = pipe.transformer.get_submodule(f"transformer_blocks.{i}.{name}").weight.shape
            key = f"transformer.transformer_blocks.{i}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            state[f"{key}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return state


@pytest.mark.parametrize("loaded", [False, True])
def test_a_lora_of_the_whole_model_finds_its_blocks(loaded, tmp_path, images):
    """Blocks that moved up take what was trained on them, and what was of those that went is told of."""
    whole, pipe = make_pipe(blocks=4), make_pipe(blocks=4)
    state = lora_of(whole)
    report = obsdiff.prune(pipe, removing("transformer_blocks.1"))
    depth = report.depth
    if loaded:
        obsdiff.save_pipeline(pipe, tmp_path / "out", report)
        pipe, depth = obsdiff.load_pipeline(tmp_path / "out"), None
    found = obsdiff.load_lora(pipe, state, depth=depth)
    assert found.dropped == ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.ff.net.2"] and found.share < 1
    whole.load_lora_weights(dict(state))
    torch.testing.assert_close(images(pipe), images(skipping(whole, ["transformer_blocks.1"])))


@pytest.mark.parametrize("way", ["in process", "by folders", "plainly", "as before"])
def test_a_lora_finds_its_blocks_after_several_prunes(way, tmp_path, images):
    """The numbers of the first model are carried along, whoever loads what was saved."""
    whole, pipe = make_pipe(blocks=5), make_pipe(blocks=5)
    state = lora_of(whole)
    for step, given in enumerate(
        [removing("transformer_blocks.1"), removing("transformer_blocks.2"), "unstructured:0"]
    ):
        report = obsdiff.prune(pipe, given, method="magnitude", prune_again=True)
        if way != "in process":
            folder = tmp_path / str(step)
            obsdiff.save_pipeline(pipe, folder, report)
            if way == "as before" and step == 0:  # when obsdiff.json did not say it
                file = folder / "pipeline" / "obsdiff.json"
                file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "blocks"}))
            pipe = (
                obsdiff.load_pipeline(folder)
                if way != "plainly"
                else DiffusionPipeline.from_pretrained(folder / "pipeline")
            )
    found = obsdiff.load_lora(pipe, state)
    assert {name.split(".")[1] for name in found.dropped} == {"1", "3"}
    whole.load_lora_weights(dict(state))
    skipping(whole, ["transformer_blocks.1", "transformer_blocks.3"])
    called = remembered_call(make_pipe(blocks=5))["transformer"]
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(**called)[0], whole.transformer(**called)[0])


def test_a_lora_is_refused_where_blocks_may_have_moved(tmp_path):
    pipe = make_pipe(blocks=4)
    state = lora_of(pipe)
    report = obsdiff.prune(pipe, removing("transformer_blocks.1"))
    pipe.transformer.save_pretrained(tmp_path / "alone")
    other = make_pipe(blocks=4)
    other.transformer = type(pipe.transformer).from_pretrained(tmp_path / "alone")
    with pytest.raises(obsdiff.UserError, match=r"changes transformer_blocks\.3, and this pipeline has 3") as error:
        obsdiff.load_lora(other, state)
    assert "\n" not in str(error.value)
    assert len(obsdiff.load_lora(other, state, depth=report.depth).dropped) == 2
    pipe.transformer = make_pipe(blocks=4).transformer
    with pytest.raises(obsdiff.UserError, match="keep 3 blocks of transformer_blocks, and it has 4"):
        obsdiff.load_lora(pipe, state)
