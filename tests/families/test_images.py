"""Fine-tuning on images: what an autoencoder makes of them is what the pipeline decodes, and what is trained on."""

import inspect

import pytest
import torch

from obsdiff.errors import UserError
from obsdiff.models.calling import PromptEncoder
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.families import find_family
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info
from obsdiff.models.latents import encode_images, vae_factor
from obsdiff.models.subject import subject_of
from obsdiff.training.fits import check_data
from obsdiff.training.inputs import Inputs
from obsdiff.training.objectives import loss_terms
from tests.families.pipelines import PIPELINES, PROMPTS

ROWS = [name for name in PIPELINES if name not in ("wan21-i2v", "flux-schnell", "sana15", "cogvideox-5b")]
NOT_TRAINED = {"sana-sprint": "SCMScheduler"}  # its noise is trigonometric


@pytest.fixture(scope="module", params=ROWS)
def built(request):
    """Name and pipeline of one family."""
    row = PIPELINES[request.param]
    pipe = row.build()
    call = {key: value for key, value in row.call.items() if key in CALL_ARGUMENTS and value is not None}
    attach_info(pipe, PipelineInfo(request.param, call))
    return request.param, pipe


class Step(tuple):
    """What a scheduler gives, in both ways of asking."""

    prev_sample = property(lambda self: self[0])


def pictures(pipe, own, rows=2):
    """Coarse images in another size than the row's own, where the pipeline takes one."""
    side = (64 if own == 32 else 32) if "height" in accepted(pipe) else own_side(pipe)
    return torch.nn.functional.interpolate(torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0)), side)


def accepted(pipe):
    return inspect.signature(type(pipe).__call__).parameters


def own_side(pipe):
    return subject_of(pipe).denoiser.config.sample_size * vae_factor(pipe)


def prompts_of(row, rows=2):
    if row.text == "class_labels":
        return ["1", "5"][:rows]
    return list(PROMPTS[:rows]) if row.text else [""] * rows


def test_the_pipeline_decodes_what_was_encoded(built, monkeypatch):
    """Scale, shift, statistics, packing: by the pipeline's own way back, its scheduler made to give our latents."""
    name, pipe = built
    if getattr(pipe, "vae", None) is None or name in NOT_TRAINED:
        pytest.skip("no autoencoder, or latents that the scheduler scales")
    row, images = PIPELINES[name], 2 * pictures(pipe, PIPELINES[name].call.get("height")) - 1
    latents = encode_images(pipe, images, torch.Generator().manual_seed(1))
    video = find_family(*denoisers_of(pipe).values()).video
    encoded = pipe.vae.encode(images.unsqueeze(2) if video else images)
    with torch.no_grad():
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
            drawn = posterior.mean + posterior.std * noise
        else:
            drawn = encoded.latent
        wanted = (pipe.vae.decode(drawn, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    kept = latents.squeeze(2) if name == "z-image" else latents
    kept = torch.cat([kept] * 2) if name == "dit" else kept  # whose loop carries the guidance's rows
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **given: Step([kept]))
    size = {"height": images.shape[-2], "width": images.shape[-1], "num_frames": 1, "use_resolution_binning": False}
    given = {key: value for key, value in {**row.call, **size}.items() if key in accepted(pipe)}
    asked = encode_prompts(pipe, prompts_of(row), given).arguments("cpu")
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    (made, *_) = pipe(**{**given, **asked}, generator=seeds, output_type="pt", return_dict=False)
    made = torch.as_tensor(made) if torch.is_tensor(made) else torch.as_tensor(made).movedim(-1, -3)
    if made.dim() == 5:  # (n, frames, c, h, w)
        wanted = wanted.transpose(1, 2)
    elif wanted.dim() == 5:
        wanted = wanted[:, :, 0]
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)


def test_images_are_trained_on(built):
    """Told as the pipeline tells it at the images' size; the target has the answer's shape; gradients are finite."""
    name, pipe = built
    row, images = PIPELINES[name], 2 * pictures(pipe, PIPELINES[name].call.get("height")) - 1
    data = type("Data", (), {"image_shape": tuple(images.shape[1:]), "source": "it"})()
    if name in NOT_TRAINED:
        with pytest.raises(UserError, match=rf"{NOT_TRAINED[name]}.*distil on recorded trajectories instead"):
            check_data(subject_of(pipe), data)
        return
    check_data(subject_of(pipe), data)
    captions = prompts_of(row) if row.text else ["unheard"] * 2  # data sets have them whatever the pipeline takes
    batch = {"image": images, "prompt": captions}
    inputs = Inputs(subject_of(pipe), PromptEncoder(pipe), 0.0)
    told, target = inputs(batch, torch.Generator().manual_seed(2), torch.device("cpu"))
    for model in denoisers_of(pipe).values():
        model.requires_grad_(True)
    terms = loss_terms(subject_of(pipe).denoiser, None, {"denoise": 1.0}, told, target, torch.Generator())
    terms["denoise"].backward()
    assert 0 < float(terms["denoise"]) < 1e3 * float(target.square().mean())
    grads = [p.grad for p in subject_of(pipe).denoiser.parameters() if p.grad is not None]
    assert grads and all(bool(torch.isfinite(g).all()) for g in grads)
    subject_of(pipe).denoiser.zero_grad(set_to_none=True)
