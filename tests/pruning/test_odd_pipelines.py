"""Things that are no pipeline, or one that cannot run, are named in one line."""

import pytest
import torch

import obsdiff


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_pipeline(thing):
    with pytest.raises(obsdiff.UserError, match="is no pipeline; give a name"):
        obsdiff.load_pipeline(thing)


def test_a_pipeline_without_its_scheduler(pipe):
    pipe.scheduler = None
    with pytest.raises(obsdiff.UserError, match="has no scheduler"):
        obsdiff.calibrate(pipe, ["a two"])


def test_parts_in_different_dtypes(pipe):
    pipe.transformer.half()
    with pytest.raises(obsdiff.UserError, match=r"denoiser is torch\.float16, but .* are torch\.float32"):
        obsdiff.calibrate(pipe, ["a two"])


def test_a_list_is_no_prompt_set():
    with pytest.raises(obsdiff.UserError, match="named by a text, not by a list"):
        obsdiff.load_prompts(["a two"])


def test_a_pipeline_without_its_tokenizers(pipe):
    pipe.tokenizer = pipe.tokenizer_2 = pipe.tokenizer_3 = None
    with pytest.raises(obsdiff.UserError, match=r"has none of its tokenizers .* give the embeds as a Conditioning"):
        obsdiff.calibrate(pipe, ["a two"])


def test_sites_in_any_collection_but_a_text(pipe):
    name = "transformer_blocks.0.attn.to_q"
    assert list(obsdiff.calibrate(pipe, ["a two"], sites=[name])) == [name]
    with pytest.raises(obsdiff.UserError, match="sites is one text"):
        obsdiff.calibrate(pipe, ["a two"], sites=name)


def test_a_call_argument_that_the_pipeline_does_not_take(pipe):
    with pytest.raises(obsdiff.UserError, match="takes no strength"):
        obsdiff.sample(pipe, ["a two"], [0], call={"strength": 0.5})
