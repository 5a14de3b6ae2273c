"""Plans, statistics, scans, recordings and configs that were changed: each reader works, or says in one line what is
wrong."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.allocation import scan as scanning
from obsdiff.allocation.latency import Timing
from obsdiff.cli.parse import parse_options
from obsdiff.export.inspection import inspect_run
from obsdiff.models.info import read_info
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.planfile import parse_plan
from obsdiff.pruning.record import open_trajectories
from obsdiff.pruning.statistics import open_statistics
from tests.fuzzing import copied, files, fuzzed, works_or_is_refused


@pytest.mark.slow
@fuzzed(100)
@given(data=st.data())
def test_plans(whole_run, tmp_path, data):
    path = tmp_path / "plan.yaml"
    original = yaml.safe_load((whole_run / "run" / "plan.yaml").read_text())
    path.write_bytes(data.draw(files(original, yaml.safe_dump)))
    works_or_is_refused(parse_plan, path)
    works_or_is_refused(inspect_run, path)


@fuzzed(120)
@given(data=st.data())
def test_statistics(whole_run, tmp_path, data):
    folder, path = copied(whole_run, tmp_path, "statistics", "statistics.json")
    path.write_bytes(data.draw(files(json.loads((whole_run / "statistics" / "statistics.json").read_text()))))

    def read():
        found = open_statistics(folder)
        for name in found:
            found.site(name)

    works_or_is_refused(read)


@fuzzed(60)
@given(data=st.data())
def test_trajectories(whole_run, tmp_path, data):
    folder, path = copied(whole_run, tmp_path, "trajectories", "trajectories.json")
    path.write_bytes(data.draw(files(json.loads((whole_run / "trajectories" / "trajectories.json").read_text()))))
    works_or_is_refused(open_trajectories, folder)


SCAN = {
    "format": scanning.FORMAT,
    "fingerprint": {"a": 1},
    "triples": 4,
    "cost": {"scan_s": 1.0, "solve_s": 1.0, "passes": 2.0},
    "note": "",
    "units": {"x": {"solved": [[0.5, 0.1], [0.9, 0.2]], "measured": [[0.9, 0.1]], "predicted": [[0.5, 0.1]]}},
}
TIMES = {"times": {"x": [0.5, 0.1], "y": [[0.5, 0.4], [1.0, 0.8]]}}


@fuzzed(100)
@given(data=st.data())
def test_scans_and_times(tmp_path, data):
    (tmp_path / scanning.FILE).write_bytes(data.draw(files(SCAN)))
    works_or_is_refused(scanning._open, tmp_path, {"a": 1})
    (tmp_path / "latency.json").write_bytes(data.draw(files(TIMES)))
    works_or_is_refused(Timing({}, [], tmp_path / "latency.json").times, "x", lambda: [1.0])


@fuzzed(60)
@given(data=st.data())
def test_pipeline_information(tmp_path, data):
    path = tmp_path / "obsdiff.json"
    value = {
        "call": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "alignment": "digits",
        "prompts": {"evaluation": "x"},
    }
    path.write_bytes(data.draw(files(value)))
    works_or_is_refused(read_info, path.parent)


CONFIG = {
    "pipeline": "p",
    "output": "o",
    "pattern": "2:4",
    "seed": 1,
    "include": ["a"],
    "spare_blocks": [0],
    "refit": True,
    "calibration": {"steps": 3, "damping": 0.1},
    "limits": {"floors": {"a": 0.5}, "choices": ["2:4"]},
}


@pytest.mark.slow
@fuzzed(100)
@given(data=st.data())
def test_configs(tmp_path, capsys, data):
    path = tmp_path / "c.yaml"
    path.write_bytes(data.draw(files(CONFIG, yaml.safe_dump)))
    capsys.readouterr()
    try:
        parse_options(PruneOptions, "obsdiff prune", ["--config", str(path)])
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and said.count("\n") == 1 and len(said) < 1000, said
