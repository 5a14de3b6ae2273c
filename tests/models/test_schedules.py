"""Training noise is what the sampler denoises: the same times at the same positions."""

import inspect

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as sd3

from obsdiff.diffusion import flow
from obsdiff.diffusion.noising import FlowNoising
from obsdiff.errors import UserError
from obsdiff.models.schedules import noising_of_pipeline

STEPS = 10
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "max_shift": 1.8}
OPTIONS = {
    "static 1": {"shift": 1.0},
    "static 3": {"shift": 3.0},
    "dynamic": DYNAMIC,
    "dynamic, linear": {**DYNAMIC, "time_shift_type": "linear"},
    "dynamic to a terminal": {**DYNAMIC, "shift_terminal": 0.1},
    "static to a terminal": {"shift": 2.0, "shift_terminal": 0.2},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "dynamic karras": {**DYNAMIC, "use_karras_sigmas": True},
}


def sampled_times(pipe):
    """The times at which the pipeline itself runs its denoiser, and the noise level before any shift at each."""
    times = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: times.append(float(given["timestep"][0])), with_kwargs=True
    )
    pipe("a seven", num_inference_steps=STEPS, height=16, width=16, max_sequence_length=10, output_type="latent")
    hook.remove()
    levels = torch.linspace(float(pipe.scheduler.sigma_max), float(pipe.scheduler.sigma_min), STEPS)
    return torch.tensor(times), levels


@pytest.mark.parametrize("name", OPTIONS)
def test_the_quantiles_of_training_are_the_samplers_times(pipe, name):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**OPTIONS[name])
    wanted, levels = sampled_times(pipe)
    noising = noising_of_pipeline(pipe, (8, 8))
    torch.testing.assert_close(noising.shifted(levels), wanted, rtol=0, atol=0.5)
    # what is drawn: logit-normal levels (SD3 eq. 19), so the share of draws below the sampler's time at level s is
    # the share of a standard normal below logit s
    drawn = noising.draw(200_000, torch.Generator().manual_seed(0)).sort().values
    inner = slice(2, -2)  # hardly anything is drawn at the ends
    shares = torch.special.ndtr(torch.logit(levels[inner].double()))
    torch.testing.assert_close(torch.quantile(drawn.double(), shares).float(), wanted[inner], rtol=0, atol=4.0)


def test_a_dynamic_shift_is_not_the_static_one(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    wanted, levels = sampled_times(pipe)
    assert float((FlowNoising(1.0).shifted(levels) - wanted).abs().max()) > 50
    small, large = (noising_of_pipeline(pipe, size).shifted(levels) for size in ((4, 4), (16, 16)))
    assert bool((large[1:-1] > small[1:-1]).all())  # larger images are drawn at more noise


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_plain_shift_is_what_it_was_to_the_bit(pipe, shift):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = flow.sample_sigmas(100, torch.Generator().manual_seed(3))
    wanted = 1000 * shift * sigmas / (1 + (shift - 1) * sigmas)
    assert torch.equal(noising_of_pipeline(pipe, (8, 8)).draw(100, torch.Generator().manual_seed(3)), wanted)


def test_defaults_of_the_shift_are_the_pipelines():
    source = inspect.getsource(sd3.StableDiffusion3Pipeline.__call__)
    for name, default in (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("max_shift", 1.16)):
        assert f'"{name}", {default})' in source


@pytest.mark.parametrize("kind", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
def test_multistep_samplers_of_flows(pipe, kind):
    pipe.scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    noising = noising_of_pipeline(pipe, (8, 8))
    pipe.scheduler.set_timesteps(STEPS)
    plain = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    plain.set_timesteps(STEPS)
    shifted = noising.shifted(plain.sigmas[:STEPS])
    torch.testing.assert_close(shifted, 1000 * pipe.scheduler.sigmas[:STEPS], rtol=1e-4, atol=0.1)
    assert float((shifted - pipe.scheduler.timesteps).abs().max()) <= 1  # whole times


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_discrete_diffusion_trains_at_every_time_that_a_spacing_can_ask_for(pipe, spacing, prediction):
    pipe.scheduler = diffusers.DDIMScheduler(100, timestep_spacing=spacing, prediction_type=prediction)
    pipe.scheduler.set_timesteps(STEPS)
    noising = noising_of_pipeline(pipe, (8, 8))
    drawn = set(noising.draw(5000, torch.Generator().manual_seed(0)).tolist())
    assert drawn == set(map(float, range(100))) and set(pipe.scheduler.timesteps.tolist()) <= drawn
    x0, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    times = torch.tensor([5.0, 50.0])
    velocity = pipe.scheduler.get_velocity(x0, noise, times.long())
    wanted = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[prediction]
    torch.testing.assert_close(noising.target(x0, noise, times), wanted)


@pytest.mark.parametrize(
    "scheduler, word",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "counts time to 500"),
        (diffusers.EDMEulerScheduler(), "neither"),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "flow_predict",
        ),
    ],
)
def test_schedulers_that_training_cannot_follow_are_refused(pipe, scheduler, word):
    pipe.scheduler = scheduler
    with pytest.raises(UserError, match=word):
        noising_of_pipeline(pipe, (8, 8))
