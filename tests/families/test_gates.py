"""Learned gates, for every family: on its own calls, a gate at zero being the removal of its unit."""

import pytest
import torch

import obsdiff
from obsdiff.models.subject import subject_of
from obsdiff.pruning import gates
from obsdiff.pruning.fingerprint import Settings
from tests.families.pipelines import PIPELINES, each
from tests.families.test_gradients import Measured
from tests.families.test_walk import close, masked_like


@pytest.mark.parametrize("name", each(PIPELINES))
def test_every_family(name, monkeypatch):
    monkeypatch.setattr(gates, "STEPS", 1)
    case = Measured(name)
    pipe = case.traced()
    statistics = obsdiff.calibrate(pipe, case.conditioning, needs={"gates"})
    found = statistics.gates
    assert found.by_group.keys() == case.units() and found.rows > 0
    assert all(bool(torch.isfinite(value).all()) and value.max() < 3.2 for value in found.by_group.values())
    report = obsdiff.prune(pipe, case.structured, method="ecodiff", statistics=statistics, spare_blocks=())
    assert report.masks.keys() == case.units() and report.parameters["pruned"] < report.parameters["dense"]
    for group, mask in report.masks.items():
        value = found.by_group[group]
        assert bool((value[~mask].max() <= value[mask].min()) if not mask.all() else True)

    dense, masked = subject_of(case.traced(), case.conditioning), subject_of(masked_like(case, pipe, report))
    recorded, _ = gates._recorded(dense, case.conditioning, Settings({**case.row.call}, 0, "uniform", None, 2), True)
    at = torch.arange(min(4, len(recorded)))
    opened = {group: mask.float() for group, mask in report.masks.items()}
    groups = [dense.graph.group_of[group] for group in opened]
    with torch.no_grad():
        with gates.gates_on(dense.graph, groups, opened):
            gated = recorded._guided(at)
        other = gates._Calls(**{**vars(recorded), "subject": masked})
        close(gated, other._guided(at))
