"""The real script on a tiny pipeline: rows, report, what is kept, what fails, and what a killed run leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from obsdiff.cli.main import main
from obsdiff.compare import run as running
from obsdiff.errors import UserError
from obsdiff.evaluation.evaluate import result_of
from tests.rules.test_architecture import ROOT

METHODS = ["obs", "obs-diff", "magnitude", "random+scratch"]
RECIPE = {
    "trainer": {"accelerator": "cpu", "max_epochs": -1},
    "budget": {"steps": 2},
    "model": {
        "class_path": "obsdiff.training.recovery.Recovery",
        "init_args": {"pipeline": "unused", "output": "unused", "objective": {"distill_output": 1.0}},
    },
    "data": {
        "class_path": "obsdiff.data.trajectories.TrajectoryDataModule",
        "init_args": {
            "pipeline": "unused", "folder": "unused", "prompts": "digits-train", "num_prompts": 4, "batch_size": 4,
        },
    },
}  # fmt: skip


@pytest.fixture
def config(pipe_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    settings = {
        "pipeline": str(pipe_folder),
        "output": str(tmp_path / "out"),
        "methods": METHODS,
        "patterns": ["structured:0.5"],
        "recipes": {"distilled": str(tmp_path / "recipe.yaml")},
        "calibration": {"num_prompts": 4},
        "evaluation": {"num_images": 4},
        "shown": 2,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(config, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "obsdiff.cli.compare", "--config", str(config), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ,
    )  # fmt: skip


@pytest.fixture
def run(config, capfd):
    """The command, which works in processes of its own: exit code and what was said."""

    def run(*more):
        with pytest.raises(SystemExit) as ended:
            main(["compare", "--config", str(config), *more])
        return ended.value.code, *capfd.readouterr()

    return run


def rows(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_row_for_each_cell_and_a_report_of_them(run, tmp_path):
    output = tmp_path / "out"
    code, out, err = run("--methods", "[obs, magnitude]", "--recipes", "{}")
    assert code == 0 and "2 of 2" in out, err
    found = {row["method"]: row for row in rows(output)}
    assert found.keys() == {"obs", "magnitude"} and not [row["error"] for row in found.values() if row["error"]]
    assert 0 < found["obs"]["layer_error"] < found["magnitude"]["layer_error"]
    assert result_of(found["obs"]["evaluation"])["mse"] > 0
    assert (output / "report.html").read_text().count("data:image/png;base64,") == 2 + 2 * (1 + 2)
    assert "| obs | uniform |" in (output / "report.md").read_text()


@pytest.mark.slow
def test_a_comparison_from_one_config(run, tmp_path):
    output = tmp_path / "out"
    code, out, err = run("--jobs", "2")
    assert code == 0, err
    assert "8 of 8" in out and str(output / "report.html") in out
    found = rows(output)
    assert [row["error"] for row in found] == [None] * 8
    recipes = ("one shot", "distilled")
    assert {(row["method"], row["recipe"]) for row in found} == {(m, recipe) for m in METHODS for recipe in recipes}
    for row in found:
        assert len(row["per_image"]["mse"]) == 4 and result_of(row["evaluation"])["mse"] > 0
        assert row["nonzero"] < row["parameters"]["dense"]
        assert (row["evaluation"]["n"], row["evaluation"]["first_seed"]) == (4, 1000)
        trained = row["recipe"] == "distilled"
        assert ("recovery" in row) is trained and ("recording" in row["costs"]) is trained
        if trained:
            assert row["recovery"]["steps"] == 2 and row["costs"]["recovery"]["steps"] == 2
    calibrated = {row["method"]: row["costs"]["calibration"]["denoiser_flops"] for row in found}
    assert calibrated["magnitude"] == 0 and calibrated["obs-diff"] == 4 * calibrated["obs"] > 0
    told = {row["method"]: row["layer_error"] for row in found}  # by the calibration of obs, which it does not pay for
    assert 0 < told["obs"] < told["magnitude"] and told["random+scratch"] is None
    untrained = {row["recipe"]: result_of(row["evaluation"])["mse"] for row in found if row["method"] == METHODS[-1]}
    assert untrained["one shot"] != untrained["distilled"]
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert page.count("data:image/png;base64,") == 2 + 2 * (1 + 8) and "http" not in page.replace("xmlns", "")
    header, rule, first = text[text.index("| method |") :].splitlines()[:3]
    assert header.count("|") == rule.count("|") == first.count("|") and first.startswith("| dense | | | 0 |")
    assert text.count("| obs-diff | uniform |") == 2 and "methods:\n- obs\n" in text
    assert not [path for path in (output / "cells").iterdir() if path.name.startswith(".")]

    before = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*.json")}
    code, out, err = run("--patterns", "['structured:0.5', '2:4']", "--methods", "[obs]", "--recipes", "{}")
    assert code == 0, err
    after = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*.json")}
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 1
    assert [row["pattern"] for row in rows(output)] == ["structured:0.5", "2:4"]


@pytest.mark.slow
def test_a_killed_comparison_loses_no_finished_cell(config, run, tmp_path):
    cells = tmp_path / "out" / "cells"
    more = ["--patterns", "['structured:0.5', '2:4']", "--recipes", "{}"]
    process = start(config, "--part", "0/1", *more)
    while process.poll() is None and len(list(cells.glob("*.json"))) < 2:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.read_bytes() for path in cells.glob("*.json")}
    assert 2 <= len(kept) < 2 * len(METHODS)
    code, out, err = run(*more)
    assert code == 0 and f"{2 * len(METHODS)} of {2 * len(METHODS)}" in out, err
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not [path for path in cells.iterdir() if path.name.startswith(".")]


def children_of(parent):
    """Processes that it started, by /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if status.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(status.parent)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_no_part_outlives_a_killed_comparison(config, tmp_path):
    """Two commands would otherwise work on the same cells."""
    process = start(config, "--jobs", "2")
    while process.poll() is None and not (tmp_path / "out" / "cells").exists():
        time.sleep(0.05)
    parts = children_of(process.pid)
    assert len(parts) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + 60
    while any(part.exists() for part in parts) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not any(part.exists() for part in parts)


@pytest.mark.slow
def test_a_cell_that_fails_is_a_row_and_the_others_go_on(config, run, tmp_path):
    changed = yaml.safe_load(config.read_text())
    broken = json.loads(json.dumps(RECIPE))
    broken["data"]["init_args"]["batch_size"] = 10**6  # more than the recording has
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    changed |= {
        "methods": ["magnitude"], "reference": "magnitude", "patterns": ["2:4"],
        "recipes": {"broken": str(tmp_path / "broken.yaml"), "distilled": str(tmp_path / "recipe.yaml")},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(changed))
    code, out, err = run()
    assert code == 1 and "3 of 3" not in out and "1 failed" in out
    errors = {row["recipe"]: row["error"] for row in rows(tmp_path / "out")}
    assert errors["one shot"] is None and errors["distilled"] is None
    assert "fewer than one batch of 1000000" in errors["broken"]
    assert "## Failed" in (tmp_path / "out" / "report.md").read_text()
    assert "failed: " in err and "Traceback" not in err


def test_a_recovery_that_is_interrupted_is_no_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "fit_arguments", lambda *_: [])
    options = SimpleNamespace(recipes={"distilled": "recipe.yaml"})

    def recovered(code):
        def fit(_):
            raise SystemExit(code)

        (tmp_path / str(code)).mkdir()
        running._recovered(options, None, None, tmp_path / str(code), "distilled", fit)

    with pytest.raises(UserError, match=r"recipe recipe\.yaml was refused"):
        recovered(2)
    with pytest.raises(SystemExit):
        recovered(1)


def test_mistakes_are_one_line(config, tmp_path, capsys):
    for more, told in (
        (["--methods", "[obs, magic]"], "unknown method 'magic'"),
        (["--pipeline", "nowhere"], "nowhere"),
        (["--part", "2/2"], "part is '2/2'"),
        (["--calibration.prompts", "nowhere.txt"], "nowhere.txt"),
        (["--evaluation.prompts", "nowhere.txt"], "nowhere.txt"),
        (["--devices", "[cuda:7]", "--part", "0/1"], "cuda"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", "--config", str(config), *more])
        [line] = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("obsdiff compare: ") and told in line
    assert not (tmp_path / "out" / "report.md").exists()
