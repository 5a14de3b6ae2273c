"""The same masks on a GPU as on the CPU."""

import pytest
import torch

import obsdiff
from tests.conftest import make_pipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_masks_agree_with_the_cpu(prompts, pattern):
    masks = []
    for device in ("cpu", "cuda"):
        pipe = make_pipe().to(device)
        report = obsdiff.prune(pipe, pattern, statistics=obsdiff.calibrate(pipe, prompts))
        masks.append(report.masks)
    agree = [float((masks[0][name] == masks[1][name]).float().mean()) for name in masks[0]]
    assert min(agree) > 0.98  # rounding may swap near ties


def test_half_precision_calibrates(prompts):
    pipe = make_pipe().to("cuda", torch.float16)
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=obsdiff.calibrate(pipe, prompts))
    assert report.mean_layer_error < 0.5
