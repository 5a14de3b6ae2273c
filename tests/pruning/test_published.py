"""Methods as published: what their rows fill in, and what is said where a calibration was another than they ask for."""

import json

import pytest
import torch

import obsdiff
from obsdiff.allocation.planning import packages_for
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.export.inspection import inspect_run
from obsdiff.obs.linalg import damped
from obsdiff.obs.pattern import Structured
from obsdiff.pruning.defaults import pattern_by
from obsdiff.pruning.manifest import read_manifest
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from obsdiff.pruning.statistics import save_statistics
from tests.conftest import make_pipe

LOG = "sparsegpt asks for uniform timestep weights; the statistics have log_decrease"
UNIFORM = "{} asks for log_decrease timestep weights; the statistics have uniform"
ONE = "obs-diff asks for 4 calibration passes; there was 1"


@pytest.fixture(scope="module")
def statistics():
    """Of the tiny pipeline, by weighting."""
    return {
        weighting: obsdiff.calibrate(make_pipe(), ["a seven", "a two"], weighting=weighting)
        for weighting in ("log_decrease", "uniform")
    }


@pytest.mark.parametrize(
    ("method", "weighting", "notes"),
    [
        ("sparsegpt", "log_decrease", [LOG]),
        ("sparsegpt", "uniform", []),
        ("obs", "log_decrease", []),
        ("obs", "uniform", [UNIFORM.format("obs")]),
        ("obs-diff", "log_decrease", [ONE]),
        ("obs-diff", "uniform", [UNIFORM.format("obs-diff"), ONE]),
        ("magnitude", "uniform", []),
    ],
)
def test_another_weighting_than_the_methods_is_said(pipe, statistics, tmp_path, method, weighting, notes):
    report = obsdiff.prune(pipe, "unstructured:0.5", method=method, statistics=statistics[weighting])
    assert report.notes == notes and report.fingerprint["weighting"] == weighting
    obsdiff.save_pipeline(pipe, tmp_path / "run", report)
    assert read_manifest(tmp_path / "run")["notes"] == notes
    assert all(f"note: {note}" in inspect_run(tmp_path / "run") for note in notes)


def test_a_manifest_without_notes_is_read(pipe, statistics, tmp_path):
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=statistics["uniform"])
    obsdiff.save_pipeline(pipe, tmp_path / "run", report)
    path = tmp_path / "run" / "pruning.json"
    manifest = json.loads(path.read_text())
    del manifest["notes"]
    path.write_text(json.dumps(manifest))
    assert "note:" not in inspect_run(tmp_path / "run")
    obsdiff.load_pipeline(tmp_path / "run")


def test_as_published_takes_four_passes_where_it_can_calibrate(pipe, prompts):
    asked = []

    def measure(sites):
        asked.append(sites)
        return obsdiff.calibrate(pipe, prompts[:2], steps=1, sites=sites)

    report = obsdiff.prune(pipe, "unstructured:0.5", method="obs-diff", statistics=measure)
    assert len(asked) == 4 and report.packages == 4 and report.notes == []
    assert {report.fingerprint["weighting"], str(report.refit)} == {"log_decrease", "False"}


def test_passes_of_a_run(tmp_path):
    published = PruningOptions(method="obs-diff")
    assert packages_for(published, None) == 4
    assert packages_for(published, tmp_path) == 1
    assert packages_for(PruningOptions(method="obs-diff", allocation="measured"), None) == 1
    assert packages_for(PruningOptions(method="obs-diff", calibration=CalibrationOptions(packages=2)), None) == 2
    assert packages_for(PruningOptions(), None) == 1


@pytest.mark.parametrize("through", ["prune", "prune_stage"])
def test_structured_as_published(pipe, statistics, tmp_path, through):
    """Only block 1 of three; heads and neurons rounded; what stays by least squares on raw H; biases untouched."""
    dense = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    if through == "prune":
        report = obsdiff.prune(pipe, "structured:0.3", method="obs-diff", statistics=statistics["log_decrease"])
    else:
        save_statistics(statistics["log_decrease"], tmp_path / "store")
        options = PruningOptions(pattern="structured:0.3", method="obs-diff")
        report = prune_stage(pipe, options, ["a seven", "a two"], Folders(statistics=tmp_path / "store"))
    assert report.pattern == Structured(0.3, 0.3, 1, 0.0) and report.notes == [ONE]
    assert set(report.plan.entries) == {f"transformer_blocks.1.{part}" for part in ("attn", "ff", "ff_context")}
    assert int(report.masks["transformer_blocks.1.attn"].sum()) == 3  # of 4
    kept = report.masks["transformer_blocks.1.ff"]
    assert int(kept.sum()) == 64 - round(0.3 * 64)
    layer = "transformer_blocks.1.ff.net.2"
    h = damped(statistics["log_decrease"].site(layer).hessian(), 0.01).double()
    wanted = torch.linalg.solve(h[kept][:, kept], h[kept] @ dense[f"{layer}.weight"].double().T).T
    now = pipe.transformer.state_dict()
    torch.testing.assert_close(now[f"{layer}.weight"].double(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(now[f"{layer}.bias"], dense[f"{layer}.bias"])


def test_a_width_that_is_asked_for_holds():
    assert pattern_by("obs-diff", Structured(0.3, 0.3, 8)) == Structured(0.3, 0.3, 8)
    assert pattern_by("obs", Structured(0.3, 0.3)) == Structured(0.3, 0.3)
