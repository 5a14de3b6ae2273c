import pytest
import torch

from obsdiff.diffusion.noising import DiffusionNoising, FlowNoising, noising_of


def alphas():
    return torch.linspace(0.999, 0.01, 50)


def test_a_perfect_answer_gives_the_clean_latents_back():
    """From x_t and each kind of target, x₀ follows by the scheduler's own algebra."""
    x0, noise = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    flow = FlowNoising(shift=3.0)
    times = flow.draw(8, generator)
    assert bool(((times > 0) & (times < 1000)).all())
    sigma = (times / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        flow.add_noise(x0, noise, times) - sigma * flow.target(x0, noise, times), x0, rtol=0, atol=1e-5
    )
    for prediction in ("epsilon", "v_prediction", "sample"):
        kind = DiffusionNoising(alphas(), prediction)
        times = kind.draw(8, generator)
        a = alphas()[times.long()].view(-1, 1, 1, 1)
        noisy, target = kind.add_noise(x0, noise, times), kind.target(x0, noise, times)
        clean = {
            "epsilon": (noisy - (1 - a).sqrt() * target) / a.sqrt(),
            "v_prediction": a.sqrt() * noisy - (1 - a).sqrt() * target,
            "sample": target,
        }[prediction]
        torch.testing.assert_close(clean, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind", [FlowNoising(3.0), *(DiffusionNoising(alphas(), name) for name in ("epsilon", "v_prediction", "sample"))]
)
def test_clean_undoes_add_noise_and_target(kind):
    x0, noise = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    times = kind.draw(8, torch.Generator().manual_seed(0))
    noisy, target = kind.add_noise(x0, noise, times), kind.target(x0, noise, times)
    torch.testing.assert_close(kind.clean(noisy, target, times), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [FlowNoising(), FlowNoising(3.0), DiffusionNoising(alphas())])
def test_times_are_spread_as_they_are_drawn(kind):
    """Each of five times is the middle of a fifth of the draws."""
    drawn, spread = kind.draw(20_000, torch.Generator().manual_seed(0)), kind.spread(5)
    assert spread.shape == (5,) and spread.dtype == torch.float32 and bool((spread.diff() > 0).all())
    below = [float((drawn < at).float().mean()) for at in spread]
    assert below == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.02)


def test_agrees_with_the_schedulers_of_diffusers():
    from diffusers import DDPMScheduler

    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
        ours = noising_of(scheduler.config, scheduler.alphas_cumprod)
        x0, noise, times = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.tensor([0.0, 5.0, 50.0, 99.0])
        torch.testing.assert_close(ours.add_noise(x0, noise, times), scheduler.add_noise(x0, noise, times.long()))
        wanted = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, times.long())
        torch.testing.assert_close(ours.target(x0, noise, times), wanted)


def test_shift_moves_times_towards_noise():
    plain, shifted = (FlowNoising(s).draw(1000, torch.Generator().manual_seed(1)) for s in (1.0, 3.0))
    assert bool((shifted > plain).all())


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="flow_prediction"):
        noising_of({"prediction_type": "flow_prediction"}, alphas())
