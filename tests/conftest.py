"""A genuine SD3 pipeline of about 25 thousand parameters, with random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs no network

import pytest
import torch

from obsdiff.embedded.digits import digit_prompts
from obsdiff.embedded.tiny_sd3 import TinySD3, build_tiny_sd3
from obsdiff.models.info import PipelineInfo, attach_info

SIZES = TinySD3(blocks=3, heads=4, head_dim=4, vae_channels=(8, 8), clip_width=8, t5_width=16, text_length=10)
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16, "max_sequence_length": 10}


def make_pipe(**changes):
    """A fresh tiny pipeline, always with the same weights (all non-zero, unlike diffusers' own initialisation)."""
    from dataclasses import replace

    torch.manual_seed(0)
    pipe = build_tiny_sd3(replace(SIZES, **changes), digit_prompts())
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipe.set_progress_bar_config(disable=True)
    attach_info(
        pipe,
        PipelineInfo("tiny", CALL, "digits", prompts={"calibration": "digits-train", "evaluation": "digits-heldout"}),
    )
    return pipe


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture
def dual_pipe():
    """With a second attention in blocks 0 and 1, as SD3.5-medium."""
    return make_pipe(dual_attention_layers=(0, 1))


@pytest.fixture(scope="session")
def pipe_folder(tmp_path_factory):
    """The tiny pipeline saved as a diffusers folder with obsdiff's information."""
    from obsdiff.files import write_json
    from obsdiff.models.info import INFO_FILE, info_of

    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    made = make_pipe()
    made.save_pretrained(folder)
    write_json(folder / INFO_FILE, info_of(made).to_json())
    return folder


@pytest.fixture(scope="session")
def prompts():
    return digit_prompts()[:6]


@pytest.fixture
def images():
    """A function that draws two images with fixed seeds."""
    import obsdiff

    def draw(pipe):
        return obsdiff.sample(pipe, ["the digit two", "a seven"], [5, 6])

    return draw


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Folders of a prune run ("run"), a structured one ("shrunk"), "statistics" and "trajectories"."""
    import obsdiff
    from obsdiff.pruning.record import record_trajectories
    from obsdiff.pruning.statistics import save_statistics

    folder = tmp_path_factory.mktemp("whole")
    prompts = ["a seven", "a two"]
    for name, pattern in (("run", "unstructured:0.5"), ("shrunk", "structured:0.5")):
        made = make_pipe()
        report = obsdiff.prune(made, pattern, statistics=obsdiff.calibrate(made, prompts), spare_blocks=[])
        obsdiff.save_pipeline(made, folder / name, report)
    save_statistics(obsdiff.calibrate(make_pipe(), prompts), folder / "statistics")
    record_trajectories(make_pipe(), prompts, folder / "trajectories")
    return folder
