"""Padded tokens stay out of the statistics, at their true place in every layer's sequence."""

import pytest
import torch

import obsdiff
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info
from obsdiff.models.subject import subject_of
from tests.families.making import TEXT_LENGTH
from tests.families.pipelines import PIPELINES, PROMPTS

ROWS = 2
MASKED = ["qwen-image", "hunyuan-video", "chroma", "pixart-sigma", "sana", "ltx"]


def statistics(name, spoilt):
    """Of every site, with the padded tokens' embeddings as they are or replaced."""
    row = PIPELINES[name]
    pipe, given = row.build(encoders=False), row.conditioning(ROWS)
    call = {key: value for key, value in row.call.items() if key in CALL_ARGUMENTS and value is not None}
    attach_info(pipe, PipelineInfo(name, call))
    masks = {key: value for key, value in given.items() if "mask" in key}
    assert masks and any(not mask.bool().all() for mask in masks.values())
    for key, mask in masks.items():
        embeds = given[key.replace("_attention_mask", "_embeds").replace("_embeds_mask", "_embeds")]
        embeds[~mask.bool()] = 3.0 if spoilt else 0.0
    conditioning = Conditioning(given)
    graph = subject_of(pipe, conditioning).graph
    return graph, obsdiff.calibrate(pipe, conditioning, batch_size=ROWS), masks


@pytest.mark.parametrize("name", MASKED)
def test_what_is_padded_does_not_count(name):
    """Whatever stands in the padded places, all layers' statistics are the same; text layers count real tokens."""
    graph, found, masks = statistics(name, spoilt=False)
    _, other, _ = statistics(name, spoilt=True)
    real = sum(int(mask.sum()) for mask in masks.values())
    texts = [site for site in graph.sites if site.tokens == ("text",)]
    assert texts
    for site in texts:
        calls = found.site(site.name).num_tokens / real
        assert calls in (1, 2)  # of two steps; a refiner and cross-attention in each
    for site in graph.sites:
        a, b = found.site(site.name), other.site(site.name)
        assert a.num_tokens == b.num_tokens
        scale = float(a.variances().max())
        for strip, other_strip in zip(a.comoment, b.comoment, strict=True):
            torch.testing.assert_close(strip, other_strip, rtol=0, atol=1e-4 * scale)


def test_padding_that_is_attended_is_left_out_by_the_tokenizer():
    """Flux reads [text, image] in its single blocks: of the text, what T5's tokenizer calls real."""
    row = PIPELINES["flux"]
    pipe, prompts = row.build(), list(PROMPTS[:ROWS])
    attach_info(pipe, PipelineInfo("flux", {k: v for k, v in row.call.items() if k in CALL_ARGUMENTS}))
    graph = subject_of(pipe).graph
    found = obsdiff.calibrate(pipe, prompts, batch_size=ROWS)
    tokens = pipe.tokenizer_2(prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    real, image = sum(map(sum, tokens["attention_mask"])), 16 * ROWS
    assert real < ROWS * TEXT_LENGTH
    wanted = {("text",): 2 * real, ("text", "image"): 2 * (real + image), ("image",): 2 * image}
    for site in graph.sites:
        if site.tokens in wanted:
            assert found.site(site.name).num_tokens == wanted[site.tokens]
    assert {site.tokens for site in graph.sites} >= {("text",), ("text", "image")}
