"""Attentions of one head have none to spare: budgets of every kind leave them whole and are met by the rest."""

import pytest
import torch

from obsdiff.allocation.stage import prune_stage
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.models.info import PipelineInfo, attach_info, call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning.options import PruningOptions


@pytest.mark.parametrize("kind", ["flops", "parameters"])
def test_a_budget_is_met_by_the_channels(kind):
    torch.manual_seed(0)
    pipe = build_tiny_ddpm(TinyDDPM(channels=(16, 32), groups=8, head_dim=32))
    attach_info(pipe, PipelineInfo("tiny", {"num_inference_steps": 2}, None))
    pipe.set_progress_bar_config(disable=True)
    dense = denoiser_flops(subject_of(pipe), call_arguments(pipe))
    options = PruningOptions(pattern="structured", budget=f"{kind}:0.7", method="magnitude", allocation="uniform")
    report = prune_stage(pipe, options, [""])
    left = {
        "flops": denoiser_flops(subject_of(pipe), call_arguments(pipe)) / dense,
        "parameters": report.parameters["pruned"] / report.parameters["dense"],
    }
    assert 0.6 < left[kind] <= 0.7
    heads = {name for name in report.masks if name.endswith(tuple(f"attentions.{i}" for i in range(3)))}
    assert heads and all(bool(report.masks[name].all()) for name in heads)
