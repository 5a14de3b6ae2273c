"""Zeros that no mask of the run covers stay zero as well: pruned elsewhere, or before this run."""

import shutil

import pytest
import torch

import obsdiff
from obsdiff.models.subject import subject_of
from obsdiff.training.stage import start_from
from tests.conftest import make_pipe


def zeros(pipe):
    return {
        name
        for name, p in subject_of(pipe).denoiser.named_parameters()
        if p.dim() == 2 and float((p == 0).float().mean()) > 0.3
    }


def test_a_pruned_pipeline_without_its_manifest(tmp_path):
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "2:4", method="magnitude")
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    shutil.copytree(tmp_path / "out" / "pipeline", tmp_path / "copied")
    with pytest.warns(UserWarning, match="hold zeros that no mask of this run covers"):
        start = start_from(str(tmp_path / "copied"), None, tmp_path / "run", "cpu", False, None)
    assert start.folder is None and start.masks.keys() == report.masks.keys()
    assert all(torch.equal(start.masks[name], mask) for name, mask in report.masks.items())


def test_a_pipeline_pruned_twice(tmp_path):
    """Heads and neurons cut out of a pipeline with zeros: what was zero before is held although the run cut shapes."""
    pipe = make_pipe()
    obsdiff.prune(pipe, "2:4", method="magnitude")
    report = obsdiff.prune(pipe, "structured:0.5", method="magnitude", prune_again=True)
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    with pytest.warns(UserWarning, match="they stay zero in training"):
        start = start_from(str(tmp_path / "out"), None, tmp_path / "run", "cpu", False, None)
    assert {f"{name}.weight" for name in start.masks} == zeros(start.pipe) and len(start.masks) > 20
    for name, mask in start.masks.items():
        assert torch.equal(mask, subject_of(start.pipe).denoiser.get_submodule(name).weight.ne(0))


def test_a_run_whose_masks_cover_all_zeros_says_nothing(tmp_path, recwarn):
    pipe = make_pipe()
    obsdiff.save_pipeline(pipe, tmp_path / "out", obsdiff.prune(pipe, "2:4", method="magnitude"))
    start = start_from(str(tmp_path / "out"), None, tmp_path / "run", "cpu", False, None)
    assert len(start.masks) == 33 and not [w for w in recwarn if "zeros" in str(w.message)]
