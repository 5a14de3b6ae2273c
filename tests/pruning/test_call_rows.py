"""Which rows of a denoiser call belong to which prompt, and which of their tokens are padding."""

from dataclasses import replace

import pytest
import torch

import obsdiff
from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.restart import Restart
from obsdiff.models.conditioning import Conditioning, encode_prompts, token_mask
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.info import attach_info, call_arguments, info_of
from obsdiff.models.rows import CallRows, take_rows
from obsdiff.models.subject import subject_of
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.record import open_trajectories, record_trajectories

TEXT_SITE = "transformer_blocks.0.attn.add_q_proj"
IMAGE_SITE = "transformer_blocks.0.attn.to_q"


def perturbed(pipe, guidance_scale):
    from diffusers import StableDiffusion3PAGPipeline

    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    made = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    made.set_progress_bar_config(disable=True)
    call = {**info_of(pipe).call, "guidance_scale": guidance_scale}
    attach_info(made, replace(info_of(pipe), call=call))
    return made


def probe_of(pipe, prompts, triples=4):
    call = call_arguments(pipe)
    return record_probe(subject_of(pipe), encode_prompts(pipe, prompts, call), Settings(call), triples)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_perturbed_attention_guidance_is_refused(pipe, prompts, tmp_path, guidance_scale):
    """Three rows per prompt; and without classifier-free guidance two that are not negative and positive."""
    pipe = perturbed(pipe, guidance_scale)
    message = r"a StableDiffusion3PAGPipeline asks .* StableDiffusion3Pipeline\.from_pipe\(pipe, dtype=pipe\.dtype\)"
    with pytest.raises(obsdiff.UserError, match=message):
        obsdiff.calibrate(pipe, prompts[:2])
    with pytest.raises(obsdiff.UserError, match=message):
        record_trajectories(pipe, prompts[:2], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_plain_pipeline_of_the_same_parts_is_measured(pipe, prompts):
    from diffusers import AutoPipelineForText2Image

    plain = AutoPipelineForText2Image.from_pipe(perturbed(pipe, 2.0), enable_pag=False)
    plain.set_progress_bar_config(disable=True)
    attach_info(plain, info_of(pipe))
    assert plain.transformer is pipe.transformer
    assert obsdiff.calibrate(plain, prompts[:2]).sites[IMAGE_SITE].num_tokens == 2 * 2 * 3 * 16


@pytest.mark.parametrize("count", [6, 3])
def test_rows_that_are_not_prompts_are_refused(pipe, prompts, count):
    conditioning = encode_prompts(pipe, prompts[:2], info_of(pipe).call)
    rows = CallRows(pipe, SD3, conditioning)
    rows.begin(slice(0, 2))
    call = {"hidden_states": torch.zeros(count, 4, 8, 8), "timestep": torch.zeros(count)}
    with pytest.raises(obsdiff.UserError, match=f"calls its denoiser with {count} rows for 2 prompts"):
        rows.look(pipe.transformer, (), call)


def test_rows_in_another_order_are_refused(pipe, prompts):
    """As DiT has it: the prompts first."""
    forward = pipe.transformer.forward

    def swapped(module, args, kwargs):
        return args, {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    pipe.transformer.register_forward_pre_hook(swapped, with_kwargs=True, prepend=True)
    assert pipe.transformer.forward == forward
    with pytest.raises(obsdiff.UserError, match=r"then the prompts \(encoder_hidden_states is not made of"):
        obsdiff.calibrate(pipe, prompts[:2])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_with_and_without_guidance(pipe, prompts, guidance_scale):
    found = obsdiff.calibrate(pipe, prompts[:3], guidance_scale=guidance_scale, batch_size=2)
    rows = 2 if guidance_scale > 1 else 1
    assert found.sites[IMAGE_SITE].num_tokens == rows * 3 * 3 * 16


def skipping(pipe):
    call = {
        **info_of(pipe).call,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    attach_info(pipe, replace(info_of(pipe), call=call))
    return pipe


def test_skip_layer_guidance_works_everywhere(pipe, prompts, tmp_path):
    """Its extra calls of one row per prompt: measured, but no inputs of their own to a scan or a recording."""
    skipping(pipe)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = obsdiff.calibrate(pipe, prompts[:2])
    handle.remove()
    extra = len(calls) - 3 - 2  # one call is recorded, and one traced
    assert extra >= 1
    assert found.sites[IMAGE_SITE].num_tokens == 16 * 2 * (2 * 3 + extra)
    probe = probe_of(pipe, prompts[:2], 100)
    assert len(probe) == 2 * 3 and {len(call.arguments["hidden_states"]) for call in probe.calls} == {2}
    restart = Restart(subject_of(pipe).graph, probe)
    restart.advance(2)
    assert restart.error() == pytest.approx(0.0, abs=1e-12)
    record_trajectories(pipe, prompts[:2], tmp_path / "kept")
    assert open_trajectories(tmp_path / "kept").latents.shape[:2] == (2, 3)


def test_second_order_samplers_record_every_call(pipe, prompts, tmp_path):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    record_trajectories(pipe, prompts[:2], tmp_path / "kept")
    assert open_trajectories(tmp_path / "kept").latents.shape[:2] == (2, 5)
    assert len(probe_of(pipe, prompts[:2], 100)) == 2 * 5


def test_calls_of_different_kinds_are_not_joined(pipe, prompts):
    """Guidance switched off for some steps: such triples have one row, and their output is the prompt's."""
    both = probe_of(pipe, prompts[:2], 6)
    halved = [call if i % 2 else replace(call, rows=1, arguments=take_rows(call.arguments, both.paths, [1]))
              for i, call in enumerate(both.calls)]  # fmt: skip
    mixed = replace(both, calls=halved)
    batches = list(mixed.batches())
    assert sorted(len(arguments["hidden_states"]) for _, arguments, _ in batches) == [3, 6]
    assert all(len(weights) == 3 for _, _, weights in batches)
    single, double = Restart(subject_of(pipe).graph, mixed).dense
    first, second = (call.arguments for call in halved[:2])
    with torch.no_grad():
        torch.testing.assert_close(single[0], pipe.transformer(**first)[0][0].double(), rtol=1e-5, atol=1e-6)
        negative, positive = pipe.transformer(**second)[0].double()
    torch.testing.assert_close(double[0], negative + 2 * (positive - negative), rtol=1e-5, atol=1e-6)


def test_an_absent_encoder_pads_its_own_segment_only(pipe, prompts):
    """Without T5 its tokens are zeros: none counts, and the others are masked as before."""
    call = info_of(pipe).call
    whole = token_mask(pipe, SD3, prompts, call)
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    found = encode_prompts(pipe, prompts, call)
    assert torch.equal(found.text_mask[:, :10], whole[:, :10])
    assert not found.text_mask[:, 10:].any() and int(found.negative_text_mask.sum()) == 2
    assert not found.embeds["prompt_embeds"][:, 10:].any()
    site = obsdiff.calibrate(pipe, prompts).sites[TEXT_SITE]
    assert site.num_tokens == 3 * (int(whole[:, :10].sum()) + 2 * len(prompts))


def test_an_absent_tokenizer_alone_leaves_the_others_masked(pipe, prompts):
    """The encoder is there, so nothing is known of padding in its segment: all of it counts."""
    call = info_of(pipe).call
    whole = token_mask(pipe, SD3, prompts, call)
    pipe.tokenizer_3 = None
    found = token_mask(pipe, SD3, prompts, call)
    assert torch.equal(found[:, :10], whole[:, :10]) and bool(found[:, 10:].all())


def test_a_tokenizer_without_its_encoder_counts_nothing(pipe, prompts):
    pipe.text_encoder_3 = None
    found = token_mask(pipe, SD3, prompts, info_of(pipe).call)
    assert not found[:, 10:].any() and found[:, :10].any()


def test_masks_must_fit_the_embeds(pipe, prompts):
    encoded = encode_prompts(pipe, prompts[:2], info_of(pipe).call)
    with pytest.raises(obsdiff.UserError, match=r"2 prompts of 20 tokens, the mask of padding is for 2 x 19"):
        replace(encoded, text_mask=encoded.text_mask[:, :19])
    with pytest.raises(obsdiff.UserError, match="give both masks or none"):
        replace(encoded, negative_text_mask=None)


def test_a_mask_that_does_not_fit_what_the_denoiser_gets_is_refused(pipe, prompts):
    """Its text layers get more tokens than the prompts have: two learned ones in front, say."""
    embedder = pipe.transformer.context_embedder
    embedder.register_forward_hook(lambda _, args, out: torch.cat([out[:, :2], out], dim=1))
    with pytest.raises(obsdiff.UserError, match=r"text layers get 4 sequences of 22 tokens.* for 4 of 20"):
        obsdiff.calibrate(pipe, prompts[:2])
    unmasked = Conditioning(encode_prompts(pipe, prompts[:2], info_of(pipe).call).embeds)
    assert obsdiff.calibrate(pipe, unmasked).sites[TEXT_SITE].num_tokens == 2 * 2 * 3 * 22
