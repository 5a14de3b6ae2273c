"""Allocation and plans through the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from obsdiff.allocation import latency
from obsdiff.allocation.planning import rule_of
from obsdiff.cli.main import main
from obsdiff.pruning.options import CalibrationOptions, PruningOptions
from tests.allocation.test_latency import Clocks
from tests.cli.test_commands import ARTIFACTS, prune, refused

SCAN = ["--allocation", "measured", "--scan.triples", "4", "--scan.levels", "[0.5,0.9]"]


@pytest.fixture(scope="module")
def measured(pipe_folder, tmp_path_factory):
    """A run with a measured allocation, its scan and statistics kept."""
    folder = tmp_path_factory.mktemp("measured")
    stores = ["--statistics", str(folder / "statistics"), "--sensitivity", str(folder / "scan")]
    report = prune(pipe_folder, folder / "out", *SCAN, *stores, "--pattern", "unstructured:0.6")
    return folder, stores, report


def test_a_measured_run_leaves_its_plan_and_picture(measured, capsys):
    folder, _, report = measured
    assert {path.name for path in (folder / "out").iterdir()} == ARTIFACTS | {"ratios.png"}
    assert report["rule"] == "measured" and report["budget"] == "sparsity:0.6"
    assert abs(report["sparsity"]["achieved"] - 0.6) < 1e-4 and report["sparsity"]["requested"] == 0.6
    assert {"predicted_error", "joint_error", "uniform_joint_error", "achieved", "scan"} <= report["allocation"].keys()
    assert len({round(share, 2) for share in report["sparsity"]["per_layer"].values()}) > 3
    plan = yaml.safe_load((folder / "out" / "plan.yaml").read_text())
    manifest = json.loads((folder / "out" / "pruning.json").read_text())
    assert manifest["plan"] == plan["layers"] and manifest["rule"] == "measured"
    page = (folder / "out" / "report.md").read_text()
    assert "sensitivity scan" in page and "ratios.png" in page
    for source in (folder / "out", folder / "out" / "plan.yaml"):
        capsys.readouterr()
        main(["inspect", str(source)])
        shown = capsys.readouterr().out
        assert "allocation measured, budget sparsity:0.6" in shown
        assert plan["layers"]["transformer_blocks.1.attn.to_k"] in shown


@pytest.mark.slow
def test_its_plan_serves_other_methods_and_its_scan_other_budgets(pipe_folder, measured, tmp_path):
    folder, stores, report = measured
    plan = folder / "out" / "plan.yaml"
    other = prune(pipe_folder, tmp_path / "w", "--method", "wanda", "--allocation", "null", "--plan", str(plan))
    assert other["sparsity"]["per_layer"] == pytest.approx(report["sparsity"]["per_layer"], abs=2e-3)
    assert (other["rule"], other["method"], other["allocation"]) == ("measured", "wanda", None)
    again = prune(pipe_folder, tmp_path / "b", *SCAN, *stores, "--budget", "parameters:0.8")
    assert again["allocation"]["scan"] == {**report["allocation"]["scan"]}
    assert again["parameters"]["nonzero"] <= 0.8 * again["parameters"]["dense"]


@pytest.mark.slow
def test_rules_budgets_and_limits_have_effects(pipe_folder, measured, tmp_path):
    stores = measured[1]
    owl = prune(pipe_folder, tmp_path / "owl", "--allocation", "owl", *stores[:2])
    assert owl["rule"] == "owl" and len(set(owl["sparsity"]["per_layer"].values())) > 1
    even = prune(pipe_folder, tmp_path / "even", "--allocation", "uniform", "--budget", "sparsity:0.55", *stores[:2])
    assert max(even["sparsity"]["per_layer"].values()) == pytest.approx(0.55, abs=0.01)
    limited = prune(pipe_folder, tmp_path / "limited", *SCAN, *stores,
                    "--limits.floors", "{'*.to_q': 0.55}", "--limits.ceilings", "{'*': 0.7}")  # fmt: skip
    shares = limited["sparsity"]["per_layer"]
    assert max(shares.values()) <= 0.705 and all(s > 0.54 for name, s in shares.items() if name.endswith("to_q"))
    structured = prune(pipe_folder, tmp_path / "st", *SCAN, "--pattern", "structured:heads=0.3,ffn=0.3,multiple_of=1",
                       "--budget", "flops:0.8")  # fmt: skip
    assert 0.79 * structured["flops"]["dense"] < structured["flops"]["pruned"] <= 0.8 * structured["flops"]["dense"]
    shared = prune(pipe_folder, tmp_path / "shared", *SCAN, "--limits.share", "['*.to_q', '*.to_k']")
    assert len({s for name, s in shared["sparsity"]["per_layer"].items() if name.endswith("to_q")}) == 1


@pytest.mark.slow
def test_a_latency_budget_says_how_it_was_measured(pipe_folder, tmp_path, monkeypatch, capsys):
    """On clocks that take a microsecond per parameter."""
    used = Clocks()
    monkeypatch.setattr(latency, "time_calls", used.time_calls)
    monkeypatch.setattr(latency, "time_in_new_process", used.time_in_new_process)
    report = prune(pipe_folder, tmp_path / "out", *SCAN, "--budget", "latency:0.8",
                   "--pattern", "structured:heads=0.3,ffn=0.3,multiple_of=1")  # fmt: skip
    record, parameters = report["allocation"], report["parameters"]
    assert record["achieved"] == pytest.approx(parameters["pruned"] / parameters["dense"]) and record["achieved"] <= 0.8
    said = capsys.readouterr().err
    assert "latency: a new process times" in said and f"latency:0.8: {record['achieved']:.4f} (" in said
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"{record['achieved']:.4%} ({record['achieved']:.2%} to {record['achieved']:.2%} in a new process)" in page


def test_the_default_allocation_is_the_methods_own():
    """Measured for those whom it was shown to pay; uniform for N:M kernels, packages and published baselines."""
    rules: dict[str, list[dict[str, Any]]] = {
        "measured": [{}, {"pattern": "structured:0.5"}, {"method": "admm"}, {"pattern": "unstructured:0.99"}],
        "uniform": [{"pattern": "2:4"}, {"method": "wanda"}, {"calibration": CalibrationOptions(packages=2)},
                    {"method": "magnitude", "pattern": "structured:0.5"}],
    }  # fmt: skip
    for rule, requests in rules.items():
        for asked in requests:
            assert rule_of(PruningOptions(**asked)) == rule, asked


def test_mistakes(pipe_folder, measured, tmp_path, capsys):
    folder, stores, _ = measured
    plan = folder / "out" / "plan.yaml"
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text(plan.read_text().replace("blocks.2", "blocks.7"))
    mine = tmp_path / "mine.yaml"
    mine.write_text("pattern: unstructured:0.5\nlayers: {transformer_blocks.0.attn.to_q: unstructured:1.5}\n")
    out = tmp_path / "out"
    base = ["prune", "--pipeline", pipe_folder, "--output", out, "--calibration.num_prompts", "4",
            "--evaluation.num_images", "0"]  # fmt: skip
    for more, word in [
        (["--allocation", "best"], "unknown allocation"),
        (["--budget", "size:0.5"], "unknown budget"),
        (["--budget", "sparsity:1.5"], "out of range"),
        (["--budget", "flops:0.5"], "structured pattern"),
        (["--plan", tmp_path / "none.yaml"], "cannot read plan"),
        (["--plan", foreign], "transformer_blocks.7"),
        (["--plan", mine], "below 1"),
        (["--plan", plan, "--allocation", "measured"], "leave out allocation"),
        (["--plan", plan, "--exclude", "['*.to_q']"], "leave out"),
        (["--sensitivity", tmp_path / "s", "--pattern", "2:4"], "--allocation measured"),
        (["--method", "admm", "--pattern", "structured:0.3"], "cannot prune heads"),
        (["--scan.triples", "8", "--allocation", "owl"], "--allocation measured"),
        (["--limits.floors", "{'*': 0.1}", "--allocation", "uniform"], "--budget"),
        (["--limits.floors", "{'*': 0.1}", "--method", "wanda"], "--budget"),
        ([*SCAN, "--calibration.packages", "2"], "packages"),
        ([*SCAN, "--budget", "sparsity:0.9", "--limits.ceilings", "{'*': 0.5}"], "cannot be met"),
        ([*SCAN, *stores, "--method", "wanda"], "the sensitivity scan in"),
        (["--allocation", "measured", "--scan.triples", "0"], "triples"),
    ]:
        assert word in refused(capsys, *base, *more), more
        assert not out.exists(), more
    assert "is not a plan" in refused(capsys, "inspect", Path(__file__).parents[2] / "configs/prune/digits.yaml")
