"""Stages solved again in closed form, for every family: after heads, neurons and channels went, by its own calls."""

import copy

import pytest
import torch

import obsdiff
from obsdiff.allocation.probe import record_probe
from obsdiff.allocation.reconstruction import Whole, own_sites, reconstruct_stages
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.options import PruningOptions, ReconstructionOptions
from obsdiff.pruning.reconstruct import Call
from tests.families.pipelines import PIPELINES, each
from tests.families.test_gradients import Measured

OPTIONS = PruningOptions(reconstruction=ReconstructionOptions(closed_form=True))


@pytest.mark.parametrize("name", each(PIPELINES))
def test_every_family(name):
    case = Measured(name)
    pipe = case.traced()
    subject = subject_of(pipe, case.conditioning)
    settings = Settings(call_arguments(subject.pipe), 0, "uniform", batch_size=2)
    probe = record_probe(subject, case.conditioning, settings, 4)
    calls = [Call(of, given, len(weights)) for of, given, weights in probe.batches(probe.calls[0].rows)]
    whole = Whole(copy.deepcopy(subject.denoiser), subject.graph, own_sites(subject), calls, 0, 1, 0.0, None)
    report = obsdiff.prune(pipe, case.structured, method="magnitude", spare_blocks=())
    before = {layer: parameter.clone() for layer, parameter in subject.denoiser.named_parameters()}
    reconstruct_stages(pipe, report, OPTIONS, whole, quiet=True)
    found = report.reconstruction["stages"]
    assert list(found) == list(case.graph.stages) and all(after <= error for error, after in found.values())
    assert any(after < error for error, after in found.values())
    for layer, parameter in subject.denoiser.named_parameters():
        inside = any(layer.startswith(f"{stage}.") for stage in case.graph.stages)
        assert parameter.shape == before[layer].shape and (inside or torch.equal(parameter, before[layer])), layer
    assert torch.isfinite(case.sample(pipe)).all()
