"""Refit steps that were taken are on record, by layer and in brief."""

import json

import pytest

import obsdiff
from obsdiff.export.report import steps_taken
from obsdiff.pruning.manifest import read_manifest


@pytest.fixture
def statistics(pipe):
    return obsdiff.calibrate(pipe, ["a seven", "a two"])


def test_steps_are_recorded_by_layer_and_kept_in_the_manifest(pipe, statistics, tmp_path):
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics)
    assert set(report.refit_steps) == set(report.masks)
    assert set(report.refit_steps.values()) <= set(range(1, 9)) and max(report.refit_steps.values()) >= 2
    obsdiff.save_pipeline(pipe, tmp_path / "run", report)
    assert read_manifest(tmp_path / "run")["refit_steps"] == report.refit_steps
    path = tmp_path / "run" / "pruning.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "refit_steps"}
    path.write_text(json.dumps(older))
    obsdiff.load_pipeline(tmp_path / "run")


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("unstructured:0.5", {"refit": False}), ("structured:0.5", {}), ("2:4", {"method": "wanda"})],
)
def test_no_conjugate_gradients_no_steps(pipe, statistics, pattern, options):
    assert obsdiff.prune(pipe, pattern, statistics=statistics, **options).refit_steps == {}


def test_a_dense_layer_settles_at_once(pipe, statistics):
    report = obsdiff.prune(pipe, "unstructured:0", method="admm", statistics=statistics)
    assert set(report.refit_steps.values()) == {1}  # the first step finds nothing to do


def test_steps_in_brief():
    assert steps_taken({"a": 2, "b": 8, "c": 5}) == {
        "min": 2,
        "median": 5,
        "max": 8,
        "per_layer": {"a": 2, "b": 8, "c": 5},
    }
    assert steps_taken({}) is None
