"""Guided distillation: both rows of each sample, against calls made one at a time; and pipelines without guidance."""

import json

import pytest
import torch

from obsdiff.diffusion.distill import guided_loss, output_loss
from obsdiff.errors import UserError
from obsdiff.models.calling import PromptEncoder, both_prompts, call_denoiser
from obsdiff.models.info import attach_info, info_of
from obsdiff.models.rows import NEGATIVE
from obsdiff.models.subject import subject_of
from obsdiff.training.fits import check_guided, guidance_of
from obsdiff.training.inputs import Inputs
from obsdiff.training.objectives import loss_terms
from tests.conftest import make_pipe
from tests.training.common import assert_zero, fit

PROMPTS = ["the digit one", "the digit two", "the digit three"]


def batch_of(pipe):
    embeds = PromptEncoder(pipe)(PROMPTS)
    config = pipe.transformer.config
    latents = torch.randn(3, config.in_channels, config.sample_size, config.sample_size)
    return {"latents": latents, "time": torch.tensor([900.0, 500.0, 100.0]), "embeds": embeds}


def test_the_loss_is_that_of_the_guided_outputs():
    torch.manual_seed(0)
    pipe, other = make_pipe(), make_pipe()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch, generator = batch_of(pipe), torch.Generator().manual_seed(0)
    inputs = Inputs(subject_of(pipe), PromptEncoder(pipe), 0.5, guided=True)
    told, target = inputs(batch, generator, torch.device("cpu"))
    assert target is None and len(told.latents) == 6 and told.guidance == 2.0
    weights = {"distill_guided": 1.0, "distill_output": 1.0}
    with torch.no_grad():
        terms = loss_terms(other.transformer, pipe.transformer, weights, told, None, generator)

        def guided(model):
            found = []
            for i in range(3):  # one sample at a time, each prompt in a call of its own
                answers = []
                for prefix in (NEGATIVE, ""):
                    own = {
                        name: batch["embeds"].get(prefix + name, tensor)[i : i + 1]
                        for name, tensor in batch["embeds"].items()
                        if not name.startswith(NEGATIVE)
                    }
                    answers.append(call_denoiser(model, batch["latents"][i : i + 1], batch["time"][i : i + 1], own))
                found.append(answers[0] + 2.0 * (answers[1] - answers[0]))
            return torch.cat(found)

        wanted = (guided(other.transformer) - guided(pipe.transformer)).square().mean() / (2.0**2 + 1.0**2)
    torch.testing.assert_close(terms["distill_guided"], wanted, rtol=1e-4, atol=1e-7)
    assert terms["distill_output"] > 0


def test_errors_that_are_independent_in_the_rows_weigh_as_in_the_plain_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 200_000), torch.zeros(2, 200_000)
    for scale in (1.5, 2.0, 7.0):
        plain = float(output_loss(student, teacher))
        assert float(guided_loss(student, teacher, scale)) == pytest.approx(plain, rel=0.02)
    same = torch.ones(2, 8)
    assert float(guided_loss(same, 0 * same, 3.0)) == pytest.approx(1 / 13)
    opposite = torch.stack([torch.ones(8), -torch.ones(8)])
    assert float(guided_loss(opposite, 0 * opposite, 3.0)) == pytest.approx(25 / 13)


def test_what_the_negative_prompt_does_not_change_is_the_same_in_both():
    embeds = {"a": torch.ones(2, 3), NEGATIVE + "a": torch.zeros(2, 3), "b": torch.full((2, 1), 7.0)}
    found = both_prompts(embeds)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], torch.cat([torch.zeros(2, 3), torch.ones(2, 3)]))
    assert torch.equal(found["b"], torch.full((4, 1), 7.0))


def test_a_pipeline_without_guidance_is_refused():
    pipe = make_pipe()
    check_guided(subject_of(pipe), None)
    own = info_of(pipe)
    attach_info(pipe, type(own)(own.source, {**own.call, "guidance_scale": 1.0}, own.alignment, own.prompts))
    assert guidance_of(subject_of(pipe)) == 1.0
    with pytest.raises(UserError, match="guided by a negative prompt"):
        check_guided(subject_of(pipe), None)


@pytest.mark.slow
@pytest.mark.parametrize("images", [False, True])
def test_a_recovery_trains_on_it(pipe_folder, tmp_path, images):
    objective = "--model.objective={distill_guided: 1.0, distill_output: 0.0}"
    fit(pipe_folder, tmp_path / "out", objective, images=images, folder=tmp_path / "recorded", steps=2)
    report = json.loads((tmp_path / "out" / "recovered" / "report.json").read_text())
    assert report["objective"] == {"distill_guided": 1.0} and report["recovery"]["steps"] == 2
    assert report["recovery"]["loss"] > 0 and report["budget"]["used"]["recovery"]["images"] == 8
    assert_zero(tmp_path / "out")
