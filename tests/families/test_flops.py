"""FLOPs of every family: counted without weights, as many as the real call does, and fewer of a smaller one."""

from functools import partial

import pytest

import obsdiff
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import counted_in_full, denoiser_flops, shrunk_flops
from obsdiff.models.calling import one_image
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info, call_arguments
from obsdiff.models.subject import subject_of
from tests.families.pipelines import PIPELINES, USUAL, each

# what its denoiser does depends on the values of a mask, so it does not run without weights
WITH_VALUES = "lumina2"


@pytest.mark.parametrize("name", each(PIPELINES, {*USUAL, WITH_VALUES}))
def test_flops(name, monkeypatch):
    row = PIPELINES[name]
    pipe, given = row.build(encoders=False), row.conditioning(1)
    attach_info(pipe, PipelineInfo(name, {k: v for k, v in row.call.items() if k in CALL_ARGUMENTS and v is not None}))
    conditioning = Conditioning({}, count=1) if set(given) <= {"batch_size"} else Conditioning(given)
    _ = subject_of(pipe, conditioning).call  # remembered with the pipeline
    call = call_arguments(pipe)
    calls = one_image(pipe, call)
    real = [counted_in_full(partial(denoisers_of(pipe)[part], **told)) for part, told in calls.items()]
    dense = denoiser_flops(subject_of(pipe), call)
    assert dense == round(sum(real) / len(real)) > 0
    report = obsdiff.prune(pipe, "structured:0.5", method="magnitude", spare_blocks=())
    fresh = row.build(encoders=False)
    attach_info(fresh, obsdiff.models.info.info_of(pipe))
    _ = subject_of(fresh, conditioning).call
    if name == WITH_VALUES:
        with pytest.raises(UserError, match="give a budget in parameters"):
            shrunk_flops(subject_of(fresh), call, report.shrunk)
        assert denoiser_flops(subject_of(pipe), call) < dense
        return
    assert shrunk_flops(subject_of(fresh), call, report.shrunk) == denoiser_flops(subject_of(pipe), call) < dense
