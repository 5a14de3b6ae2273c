"""Timestep weights measured on the model: where they are known by paper and pencil, and what goes by them."""

import json

import pytest
import torch

import obsdiff
from obsdiff.cli.main import main
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.obs.timesteps import timestep_weights
from obsdiff.pruning.alphas import calls_for, measured_alphas, named_weighting
from obsdiff.pruning.stream import stream
from tests.families.pipelines import PIPELINES
from tests.pruning.test_stream import of_family


def test_an_answer_that_nothing_depends_on_moves_the_image_by_its_step(pipe, prompts, monkeypatch):
    """Euler steps ``x += (σ_next − σ) v``: with a constant v an error stays what its step made of it, (σ_next − σ)²."""
    call = call_arguments(pipe, num_inference_steps=5)
    subject = subject_of(pipe)
    constant = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda hidden_states, **_: (constant.repeat(len(hidden_states), 1, 1, 1),)
    )
    told = encode_prompts(pipe, prompts[:2], call)
    found = measured_alphas(subject, told, call, 0)
    sigmas = pipe.scheduler.sigmas.double()
    wanted = (sigmas[1:] - sigmas[:-1]).square()
    assert len(found) == 5
    torch.testing.assert_close(torch.tensor(found).double() / sum(found), wanted / wanted.sum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["sd35", "ddpm", "dit", "z-image", "wan22"])
def test_every_way_of_answering(name):
    """Two rows in either order, lists, outputs with a name, calls of their own: the model is as before."""
    pipe, told, _ = of_family(name)
    subject = subject_of(pipe, told)
    before = PIPELINES[name].sample_rows(pipe, PIPELINES[name].conditioning(1), [0])
    call = call_arguments(pipe)
    found = measured_alphas(subject, told, call, 0)
    assert len(found) == len(pipe.scheduler.timesteps) and found == measured_alphas(subject, told, call, 0)
    assert torch.equal(PIPELINES[name].sample_rows(pipe, PIPELINES[name].conditioning(1), [0]), before)


def test_what_is_calibrated_goes_by_them(pipe, prompts, tmp_path):
    call = call_arguments(pipe)
    weighting = named_weighting(subject_of(pipe), prompts, "measured", call, 0)
    alphas = timestep_weights(weighting, 3)
    assert sum(alphas) == pytest.approx(3, rel=1e-2) and alphas[2] < alphas[0] / 10  # the last step is a small one
    measured = obsdiff.calibrate(pipe, prompts, weighting="measured", store=tmp_path / "store")
    named = obsdiff.calibrate(pipe, prompts, weighting=weighting)
    assert measured.fingerprint == named.fingerprint and named.fingerprint["weighting"] == weighting
    site = "transformer_blocks.0.attn.to_q"
    assert torch.equal(measured.site(site).hessian(), named.site(site).hessian())
    again = obsdiff.calibrate(pipe, prompts, weighting="measured", store=tmp_path / "store")
    assert again.fingerprint == named.fingerprint
    assert stream(pipe, prompts, weighting="measured").fingerprint == named.fingerprint


def test_the_whole_way(pipe_folder, tmp_path, capsys):
    arguments = ["prune", "--pipeline", str(pipe_folder), "--pattern", "unstructured:0.5", "--calibration.num_prompts"]
    arguments += ["4", "--evaluation.num_images", "0", "--calibration.weighting", "measured"]
    main([*arguments, "--allocation", "uniform", "--output", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert manifest["weighing_calls"] == calls_for(3) == 24
    assert len(manifest["statistics"]["weighting"].split(",")) == 3
    assert any(note.startswith("timestep weights were measured: ") for note in manifest["notes"])
    main([*arguments, "--method", "magnitude", "--output", str(tmp_path / "none")])
    assert json.loads((tmp_path / "none" / "pruning.json").read_text())["weighing_calls"] == 0
    with pytest.raises(SystemExit):
        main([*arguments[:-1], "log_decrease:2-1", "--output", str(tmp_path / "no")])
    assert "from low to high" in capsys.readouterr().err
