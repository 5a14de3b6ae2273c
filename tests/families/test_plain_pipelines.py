"""Image-to-image, inpainting, ControlNet and PAG pipelines say which pipeline of the same parts can be measured."""

import copy
import inspect
import re

import diffusers
import pytest
import torch

import obsdiff
from obsdiff.models.families import FAMILIES
from obsdiff.models.info import PipelineInfo, attach_info
from tests.families.pipelines import PIPELINES

PLAIN = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
KINDS = ("Img2Img", "Inpaint", "ControlNet", "PAG", "ControlNetImg2Img")
CASES = [(name, kind) for name in PLAIN for kind in KINDS if hasattr(diffusers, f"{PLAIN[name]}{kind}Pipeline")]


def controlnet(name, denoiser):
    if name in ("sd15", "sdxl"):
        return diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(8, 8))
    denoiser = copy.deepcopy(denoiser)  # diffusers writes into its config
    if name == "sd3":
        return diffusers.SD3ControlNetModel.from_transformer(denoiser, num_layers=1)
    sizes = {key: denoiser.config[key] for key in ("attention_head_dim", "num_attention_heads")}
    return diffusers.FluxControlNetModel.from_transformer(denoiser, num_layers=1, num_single_layers=1, **sizes)


def derived(name, kind):
    """The pipeline of that kind, of the parts of the tiny plain one."""
    base = PIPELINES[name].build()
    made = getattr(diffusers, f"{PLAIN[name]}{kind}Pipeline")
    taken = inspect.signature(made.__init__).parameters
    parts = {key: part for key, part in base.components.items() if key in taken}
    if "ControlNet" in kind:
        parts["controlnet"] = controlnet(name, parts.get("unet") or parts["transformer"])
    pipe = made(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def advised(pipe, prompts=("a yellow cat",)):
    """What the refusal says to use."""
    with pytest.raises(obsdiff.UserError, match="asks its denoiser about more than prompts") as caught:
        obsdiff.calibrate(pipe, list(prompts))
    assert "\n" not in str(caught.value)
    return re.search(r"(\w+)\.from_pipe\(pipe, dtype=pipe\.dtype\)", str(caught.value))[1]


@pytest.mark.parametrize(
    ("name", "kind"), [*CASES[::3], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1::3] + CASES[2::3])]
)
def test_the_pipeline_that_is_named_works(name, kind, tmp_path):
    """It is measured and pruned at the dtype as it is, and what was pruned can be saved as either."""
    pipe = derived(name, kind).to(torch.bfloat16)
    plain = getattr(diffusers, advised(pipe)).from_pipe(pipe, dtype=pipe.dtype)
    row = PIPELINES[name]
    assert type(plain).__name__ == row.pipeline and plain.dtype == torch.bfloat16
    plain.set_progress_bar_config(disable=True)
    attach_info(plain, PipelineInfo(row.pipeline, {k: v for k, v in row.call.items() if k != "output_type"}))
    report = obsdiff.prune(plain, "unstructured:0.5", statistics=obsdiff.calibrate(plain, ["a yellow cat"]))
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert type(obsdiff.load_pipeline(tmp_path / "out")) is type(pipe)


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "Inpaint"), ("sd15", "ControlNet"), ("flux", "Img2Img")])
def test_the_folder_that_is_named_works(name, kind, tmp_path):
    pipe = derived(name, kind)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(obsdiff.UserError, match=r"of a folder, \w+\.from_pretrained"):
        obsdiff.calibrate(obsdiff.load_pipeline(tmp_path), ["a yellow cat"])
    plain = getattr(diffusers, advised(pipe)).from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__name__ == PIPELINES[name].pipeline


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.denoiser)
def test_rows_name_the_pipelines_that_were_tried(family):
    tried = {row.pipeline for row in PIPELINES.values() if family.denoiser in row.denoisers.values()}
    assert set(family.pipelines) == tried
