"""Any method's choice with the weights that stay by least squares, heads and ResNet channels alike: against the inputs
that the layers really saw, all at once."""

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import subject_of
from obsdiff.obs.hessian import weight_matrices
from obsdiff.pruning import gates

NEEDS = {"diff-pruning": {"large_loss_gradient"}, "ecodiff": {"gates"}, "magnitude": set(), "random": set()}
PROMPTS = ["", ""]
DAMPING = 0.01


def made():
    torch.manual_seed(0)
    pipe = build_tiny_ddpm(TinyDDPM(channels=(8, 16), groups=4, head_dim=4))
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo("tiny", {"num_inference_steps": 2}, None))
    return pipe


def inputs_of(layers):
    """What each layer reads over the calibration's trajectories, (rows, columns) float64."""
    pipe, seen = made(), {name: [] for name in layers}
    pipe.unet.eval()

    def look(layer, given, name):
        if isinstance(layer, nn.Conv2d):
            patches = nn.functional.unfold(given[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)
            seen[name].append(patches.transpose(1, 2).flatten(0, 1))
        else:
            seen[name].append(given[0].flatten(0, -2))

    for name in layers:
        layer = pipe.unet.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, given, name=name: look(layer, given, name))
    for seed in range(len(PROMPTS)):
        pipe(generator=torch.Generator().manual_seed(seed), num_inference_steps=2, output_type="np")
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@pytest.mark.parametrize("method", NEEDS)
def test_a_choice_is_compensated_exactly(method, monkeypatch):
    monkeypatch.setattr(gates, "STEPS", 4)
    pattern = "structured:heads=0.5,channels=0.5"
    measured = obsdiff.calibrate(made(), PROMPTS, weighting="uniform", needs={"gram", *NEEDS[method]})
    plain, refitted = made(), made()
    reports = [
        obsdiff.prune(pipe, pattern, method=method, statistics=measured, refit=refit, spare_blocks=[])
        for pipe, refit in ((plain, False), (refitted, True))
    ]
    assert reports[0].masks.keys() == reports[1].masks.keys()
    assert all(torch.equal(reports[0].masks[name], mask) for name, mask in reports[1].masks.items())
    dense, graph = made(), subject_of(made()).graph
    groups = [graph.group_of[name] for name in reports[1].masks]
    assert {group.kind for group in groups} == {"heads", "channels"}
    seen = inputs_of([s.layer for group in groups for s in group.consumers])
    for group in groups:
        [s] = group.consumers
        layer = dense.unet.get_submodule(s.layer)
        places = seen[s.layer].shape[1] // layer.weight.shape[1]
        kept = torch.ones(layer.weight.shape[1], dtype=torch.bool)
        kept[s.entries(~reports[1].masks[group.name])] = False
        columns = kept.repeat_interleave(places)
        x, weight = seen[s.layer], weight_matrices(layer)[0].detach().double()
        mean = x.mean(0)
        moments = (x - mean).T @ (x - mean) / len(x)
        moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        least = torch.linalg.solve(moments[columns][:, columns], (weight @ moments)[:, columns].T).T
        new = refitted.unet.get_submodule(s.layer)
        found = weight_matrices(new)[0].detach().double()
        torch.testing.assert_close(found, least, rtol=1e-3, atol=1e-4)
        shift = weight @ mean - found @ mean[columns]
        torch.testing.assert_close(
            new.bias.detach().double(), layer.bias.detach().double() + shift, rtol=1e-3, atol=1e-4
        )
        assert torch.equal(weight_matrices(plain.unet.get_submodule(s.layer))[0], weight.float()[:, columns])
