"""Every tiny pipeline: built from a seed, run, saved and loaded, and what its row says of its calls."""

import functools
import inspect
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.families.pipelines import PIPELINES, PROMPTS, each

SEEDS = [3, 4, 5]
TIMES = {
    "t": lambda t: t,
    "t/1000": lambda t: t / 1000,
    "1 - t/1000": lambda t: 1 - t / 1000,
    "sin t / (sin t + cos t)": lambda t: t.sin() / (t.sin() + t.cos()),
}


@dataclass
class Recorded:
    """Denoiser calls of one run: (component, bound arguments, output), and outputs given to the scheduler."""

    calls: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list)
    stepped: list[Any] = field(default_factory=list)


@pytest.fixture(scope="module", params=each(PIPELINES))
def family(request):
    """(row, pipeline built once)."""
    row = PIPELINES[request.param]
    return row, row.build()


def record(row, pipe, monkeypatch, **changes):
    """Run the pipeline on two rows and note what reaches the denoiser and the scheduler."""
    recorded = Recorded()
    hooks = []
    for name in row.denoisers:

        def note(module, args, kwargs, output, name=name):
            arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            recorded.calls.append((name, dict(arguments), output[0]))

        hooks.append(getattr(pipe, name).register_forward_hook(note, with_kwargs=True))
    step = pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at its signature, to know whether it takes generators
    def noted(model_output, *args, **kwargs):
        recorded.stepped.append(model_output)
        return step(model_output, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", noted)
    row.sample_rows(pipe, row.conditioning(2), SEEDS[:2], **changes)
    for hook in hooks:
        hook.remove()
    return recorded


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def assert_same(one, other):
    """Equal values, in tensors or in lists of tensors."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=0, check_dtype=False)


def test_is_of_the_true_classes_and_small(family):
    row, pipe = family
    assert type(pipe).__name__ == row.pipeline
    for name, kind in row.denoisers.items():
        denoiser = getattr(pipe, name)
        assert type(denoiser).__name__ == kind and not denoiser.training
        assert sum(parameter.numel() for parameter in denoiser.parameters()) < 1_000_000
        assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
        assert all(layer.in_features % 4 == 0 for layer in linears(denoiser))
        assert all(module.heads >= 4 for module in denoiser.modules() if hasattr(module, "heads"))
        for norm in denoiser.modules():
            if isinstance(norm, nn.GroupNorm):
                assert norm.num_groups >= 4 and norm.num_channels >= 2 * norm.num_groups


def test_weights_come_from_the_seed(family):
    row, pipe = family
    state = torch.get_rng_state()
    again, other = row.build(), row.build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            weights = component.state_dict()
            assert all(torch.equal(weights[key], value) for key, value in getattr(again, name).state_dict().items())
            assert all(parameter.count_nonzero() > 0 for parameter in component.parameters())
            assert not all(torch.equal(weights[key], value) for key, value in getattr(other, name).state_dict().items())


def test_runs_twice_with_equal_results_that_hang_on_the_conditioning(family):
    row, pipe = family
    made = row.sample_rows(pipe, row.conditioning(3), SEEDS)
    assert made.dim() == len(row.result_form or row.sample_form)
    assert made.shape[0] == 3 and bool(made.isfinite().all()) and made.std() > 0
    assert torch.equal(row.sample_rows(pipe, row.conditioning(3), SEEDS), made)
    if row.text:
        swapped = row.sample_rows(pipe, row.take(row.conditioning(3), [1, 0, 2]), SEEDS)
        same = [torch.equal(one, other) for one, other in zip(made, swapped, strict=True)]
        assert same == [False, False, True]


def test_rows_do_not_hang_on_their_batch(family):
    row, pipe = family
    conditioning = row.conditioning(3)
    made = row.sample_rows(pipe, conditioning, SEEDS)
    alone = [row.sample_rows(pipe, row.take(conditioning, [i]), [seed]) for i, seed in enumerate(SEEDS)]
    assert (torch.cat(alone) - made).abs().max() <= row.row_error * made.abs().max()


def test_rows_of_conditioning_hang_on_their_number_alone(family):
    row, _ = family
    few, many = row.conditioning(2), row.take(row.conditioning(3), [0, 1])
    assert few.keys() == many.keys()
    for name, value in few.items():
        if isinstance(value, torch.Tensor | list):
            assert_same(value, many[name])


@pytest.mark.parametrize("encoders", [True, False])
def test_saves_and_loads_with_plain_diffusers(family, encoders, tmp_path):
    row, pipe = family
    if not encoders:
        made = row.sample_rows(pipe, row.conditioning(2), SEEDS[:2])
        pipe = row.build(encoders=False)
        assert torch.equal(row.sample_rows(pipe, row.conditioning(2), SEEDS[:2]), made)
    absent = {name for name, part in pipe.components.items() if part is None}
    pipe.save_pretrained(tmp_path)
    # diffusers asks for a part by name that was None when the pipeline was saved, unless the class calls it optional
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent - set(pipe._optional_components)))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert {name for name, part in loaded.components.items() if part is None} == absent
    for given in [row.conditioning, row.prompting] if encoders and row.prompts else [row.conditioning]:
        assert torch.equal(row.sample_rows(loaded, given(2), SEEDS[:2]), row.sample_rows(pipe, given(2), SEEDS[:2]))


def test_prompts_decide_what_is_made(family):
    row, pipe = family
    if not row.prompts:
        assert not hasattr(pipe, "encode_prompt") or (row is PIPELINES["wan21-i2v"] and not find_spec("ftfy"))
        return
    given, swapped = row.prompting(3), row.take(row.prompting(3), [1, 0, 2])
    made, other = row.sample_rows(pipe, given, SEEDS), row.sample_rows(pipe, swapped, SEEDS)
    assert bool(made.isfinite().all())
    assert [torch.equal(*pair) for pair in zip(made, other, strict=True)] == [False, False, True]
    if row.negatives:
        without = row.sample_rows(pipe, {**row.prompting(3), "negative_prompt": ["birds"] * 3}, SEEDS)
        assert not torch.equal(without, made)


@pytest.mark.parametrize(
    ("name", "template", "arguments"), [("qwen-image", 5, {}), ("hunyuan-video", 1, {"max_sequence_length": 12})]
)
def test_templates_have_as_many_tokens_as_the_pipeline_crops(name, template, arguments):
    """What is left is the prompt, word by word, and what stands after it."""
    pipe = PIPELINES[name].build()
    *_, mask = pipe.encode_prompt(list(PROMPTS[1:3]), **arguments)
    assert mask.sum(dim=1).tolist() == [len(prompt.split()) + template for prompt in PROMPTS[1:3]]


def test_row_says_which_mask_keeps_padding_out(family, monkeypatch):
    row, pipe = family
    _, arguments, _ = record(row, pipe, monkeypatch).calls[0]
    named = [name for name, value in arguments.items() if "mask" in name and value is not None]
    assert named == ([row.mask] if row.mask else [])
    if row.mask:
        conditioning = row.conditioning(3)
        (given,) = [name for name in conditioning if "mask" in name and "negative" not in name]
        padding = conditioning[given] == 0
        made = row.sample_rows(pipe, conditioning, SEEDS)
        conditioning["prompt_embeds"][padding] += 3
        moved = (row.sample_rows(pipe, conditioning, SEEDS) - made).abs().max()
        assert padding.any() and moved <= row.row_error * made.abs().max()


def test_every_output_type_is_taken(family):
    row, pipe = family
    for output_type in row.output_types:
        assert row.sample_rows(pipe, row.conditioning(1), SEEDS[:1], output_type=output_type).shape[0] == 1


def test_row_says_how_the_denoiser_is_called(family, monkeypatch):
    row, pipe = family
    recorded = record(row, pipe, monkeypatch)
    assert list(dict.fromkeys(name for name, _, _ in recorded.calls)) == list(row.denoisers)
    _, arguments, _ = recorded.calls[0]
    sample, time = arguments[row.sample], arguments[row.time]
    rows = 2 if row.guidance in ("none", "embedded", "two calls") else 4
    assert len(sample) == rows
    if row.sample_form != "list of C1HW":
        assert sample.dim() == len(row.sample_form)
    form, shape = row.time_form.rsplit(" (", 1)
    assert shape == {0: ")", 1: "B,)", 2: "B, T)"}[time.dim()]
    assert time.dim() == 0 or len(time) == rows
    expected = TIMES[form](pipe.scheduler.timesteps[0].float())
    torch.testing.assert_close(time.float(), expected.expand(time.shape))
    if row.guidance == "embedded":
        assert arguments["guidance"].shape == (2,)
    else:
        assert arguments.get("guidance") is None


def test_row_says_where_the_negatives_are(family, monkeypatch):
    row, pipe = family
    if not row.text:
        return
    given = row.conditioning(2)
    positive = given.get("prompt_embeds", given.get("class_labels"))
    negative = given.get("negative_prompt_embeds", [1000, 1000])
    texts = [arguments[row.text] for _, arguments, _ in record(row, pipe, monkeypatch).calls]
    if row.guidance == "negative first":
        assert_same(texts[0], [*negative, *positive])
    elif row.guidance == "positive first":
        assert_same(texts[0], [*positive, *negative])
    else:
        assert_same(texts[0], positive)
        assert_same(texts[1], negative if row.guidance == "two calls" else positive)


def test_row_says_which_layers_are_dead(family, monkeypatch):
    """All others change the prediction: no row hides a layer's errors behind a zero."""
    row, pipe = family
    for name, arguments, _ in record(row, pipe, monkeypatch).calls:
        denoiser = getattr(pipe, name)
        denoiser.zero_grad()
        output = denoiser(**{key: value for key, value in arguments.items() if key != "self"})[0]
        output = torch.stack(output) if isinstance(output, list) else output
        output.square().sum().backward()
        silent = {
            parameter.rpartition(".")[0]
            for parameter, weights in denoiser.named_parameters()
            if weights.grad is None or not weights.grad.any()
        }
        assert silent == set(row.dead)


def test_row_says_what_the_scheduler_is_given(family, monkeypatch):
    row, pipe = family
    recorded = record(row, pipe, monkeypatch, **row.unguided)
    assert len(recorded.calls) == len(recorded.stepped)
    (_, _, output), stepped = recorded.calls[0], recorded.stepped[0]
    output = torch.stack(output) if isinstance(output, list) else output
    if row.output == "negated":
        output = -output
    elif row.output == "first half of the channels":
        output = output.chunk(2, dim=1)[0]
    equal = torch.equal(output.reshape(stepped.shape), stepped)
    assert equal is (row.output != "trigonometric")
