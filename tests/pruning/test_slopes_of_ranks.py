"""Gradients of layers that are cut and projected at once (time embeddings of ResNet blocks)."""

import pytest
import torch

import obsdiff
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import subject_of


def made():
    torch.manual_seed(0)
    pipe = build_tiny_ddpm(TinyDDPM(channels=(16, 32), groups=8, head_dim=8))
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo("tiny", {"num_inference_steps": 2}, None))
    return pipe


def test_the_gradient_by_what_reads_a_projected_input():
    """Autograd through y = W' (E x) gives (dL/dW) E^T, for any loss of y."""
    generator = torch.Generator().manual_seed(0)
    basis, wanted = torch.randn(3, 7, generator=generator), torch.randn(20, 5, generator=generator)
    x = torch.randn(20, 3, generator=generator) @ torch.linalg.pinv(basis).T  # D E x = x
    weight = torch.randn(5, 7, generator=generator).requires_grad_()
    reduced = (weight.detach() @ torch.linalg.pinv(basis)).requires_grad_()
    [whole] = torch.autograd.grad(((x @ weight.T) - wanted).pow(4).mean(), weight)
    [own] = torch.autograd.grad(((x @ basis.T @ reduced.T) - wanted).pow(4).mean(), reduced)
    torch.testing.assert_close(own, whole @ basis.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_channels_and_ranks_at_once(method):
    """Units are scored by whole weights and their gradients, as where nothing is projected: directions go after."""
    need = {"taylor": "loss_gradient", "diff-pruning": "large_loss_gradient"}[method]
    pipe = made()
    statistics = obsdiff.calibrate(pipe, [""] * 2, needs={"gram", need})
    slopes = {name: value.clone() for name, value in statistics.gradients.by_layer.items()}
    dense = made()
    report = obsdiff.prune(pipe, "structured:channels=0.5+rank:4", method=method, statistics=statistics)
    graph = subject_of(dense).graph
    groups = [group for group in graph.groups if group.kind == "channels"]
    assert {group.name for group in groups} <= report.masks.keys()
    for group in groups:
        scores = torch.zeros(group.count)
        for s, axis in [*((s, 1) for s in group.consumers), *((s, 0) for s in group.producers)]:
            layer = dense.unet.get_submodule(s.layer)
            products = (layer.weight.detach() * slopes[s.layer]).transpose(0, axis).flatten(1)
            products = (products if method == "taylor" else products.abs()).sum(1)
            for start in s.starts:
                scores += products[start : start + group.count * s.size].view(group.count, -1).sum(1)
        order = scores.abs().argsort()
        assert set((~report.masks[group.name]).nonzero().flatten().tolist()) == set(order[: group.count // 2].tolist())
    assert all(torch.equal(statistics.gradients.by_layer[name], value) for name, value in slopes.items())
