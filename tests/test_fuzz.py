"""Files that were changed by accident or by malice: each reader works, or says in one line what is wrong."""

import copy
import json
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import obsdiff
from obsdiff.allocation import scan as scanning
from obsdiff.allocation import times
from obsdiff.cli.parse import parse_options
from obsdiff.errors import UserError
from obsdiff.export.inspection import inspect_run
from obsdiff.models.loading import _read_info
from obsdiff.pruning.masks import load_masks
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.planfile import parse_plan
from obsdiff.pruning.record import open_trajectories, record_trajectories
from obsdiff.pruning.statistics import open_statistics, save_statistics
from tests.conftest import make_pipe

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=5), st.just("x" * 5000),
    st.just("../../etc/passwd"), st.just("\ud800"), st.just([]), st.just({}), st.just([[[[0]]]]), st.just({"a": {"b": [None]}}),
    st.sampled_from(["2:4", "unstructured:0.5", "dense", "nan", "1e999", "structured:0.5", "-1", "\0"]),
)  # fmt: skip


def fuzzed(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(draw, value):
    """``value`` with one to three places dropped, replaced, renamed, nested or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        all_places = [place for place in places(value) if place]
        if not all_places:
            return value
        short = [place for place in all_places if len(place) < 3]
        place = draw(st.sampled_from(short if short and draw(st.booleans()) else all_places))
        at = value
        for key in place[:-1]:
            at = at[key]
        how = draw(st.sampled_from(["drop", "odd", "odd", "rename", "nest", "double"]))
        if how == "drop":
            del at[place[-1]]
        elif how == "odd":
            at[place[-1]] = draw(ODD)
        elif how == "rename" and isinstance(at, dict):
            at[draw(st.text(max_size=4))] = at.pop(place[-1])
        elif how == "nest":
            at[place[-1]] = [at[place[-1]]]
        elif how == "double" and isinstance(at, list):
            at.append(at[place[-1]])
    return value


@st.composite
def files(draw, value, dump=json.dumps):
    """The bytes of a file that holds something like ``value``."""
    how = draw(st.sampled_from(["value"] * 8 + ["bytes", "whole", "deep"]))
    if how == "whole":
        content = draw(ODD)
    elif how == "deep":
        return b"[" * draw(st.sampled_from([10, 1_000, 100_000]))
    else:
        content = changed(draw, value)
    data = dump(content).encode("utf-8", "surrogatepass")
    if how == "bytes":
        return damaged(draw, data)
    return data


def damaged(draw, data):
    """Bytes cut off, replaced or added."""
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "random"]))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :] if data else b""
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    return draw(st.binary(max_size=200))


def works_or_is_refused(read, *args):
    """No other exception than a :class:`UserError` of one line that is not too long."""
    try:
        read(*args)
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 2000, error
        return False
    return True


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole prune run, its statistics, and a structured one."""
    folder = tmp_path_factory.mktemp("fuzz")
    prompts = ["a seven", "a two"]
    for name, pattern in (("run", "unstructured:0.5"), ("shrunk", "structured:0.5")):
        pipe = make_pipe()
        statistics = obsdiff.calibrate(pipe, prompts)
        report = obsdiff.prune(pipe, pattern, statistics=statistics, spare_blocks=[])
        obsdiff.save_pipeline(pipe, folder / name, report)
    save_statistics(obsdiff.calibrate(make_pipe(), prompts), folder / "statistics")
    record_trajectories(make_pipe(), prompts, folder / "trajectories")
    return folder


def copied(run, tmp_path, name, file):
    """A folder with the same files, and the path of the one that is going to change."""
    target = tmp_path / name
    if not target.exists():
        shutil.copytree(run / name, target)
    return target, target / file


@pytest.mark.parametrize("name", ["run", "shrunk"])
@fuzzed(120)
@given(data=st.data())
def test_inspecting_odd_manifests(run, tmp_path, name, data):
    folder, path = copied(run, tmp_path, name, "pruning.json")
    original = json.loads((run / name / "pruning.json").read_text())
    path.write_bytes(data.draw(files(original)))
    works_or_is_refused(inspect_run, folder)


@pytest.mark.parametrize("name", ["run", "shrunk"])
@fuzzed(20)
@given(data=st.data())
def test_loading_with_odd_manifests(run, tmp_path, name, data):
    folder, path = copied(run, tmp_path, name, "pruning.json")
    path.write_bytes(data.draw(files(json.loads((run / name / "pruning.json").read_text()))))
    works_or_is_refused(obsdiff.load_pipeline, folder)


VARIANTS = [
    [], None, 7, "text", {}, {"plan": []}, {"plan": None}, {"plan": {"x": 5}}, {"shrunk": []}, {"shrunk": {}},
    {"shrunk": {"layers": 3, "attributes": {}}}, {"shrunk": {"layers": {"x": "y"}, "attributes": {}}}, {"parameters": None},
    {"parameters": {"dense": "x", "pruned": 1, "nonzero": 1}}, {"sparsity": "x"}, {"sparsity_per_layer": []},
    {"layer_error": None}, {"statistics": 5}, {"dtype": "int4"}, {"dtype": None}, {"format": "1"}, {"denoiser": None},
    {"denoiser_sha256": 5}, {"component": "nothing"}, {"component": None}, {"seed": {}}, {"rule": 5}, {"budget": []},
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_odd_manifests(run, tmp_path, change):
    folder, path = copied(run, tmp_path, "run", "pruning.json")
    original = json.loads((run / "run" / "pruning.json").read_text())
    path.write_text(json.dumps({**original, **change} if isinstance(change, dict) and change else change))
    works_or_is_refused(inspect_run, folder)
    works_or_is_refused(obsdiff.load_pipeline, folder)


@fuzzed(200)
@given(data=st.data())
def test_plans(run, tmp_path, data):
    path = tmp_path / "plan.yaml"
    original = yaml.safe_load((run / "run" / "plan.yaml").read_text())
    path.write_bytes(data.draw(files(original, yaml.safe_dump)))
    works_or_is_refused(parse_plan, path)
    works_or_is_refused(inspect_run, path)


@fuzzed(120)
@given(data=st.data())
def test_masks(run, tmp_path, data):
    path = tmp_path / "masks.safetensors"
    original = (run / "run" / "masks.safetensors").read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    if data.draw(st.booleans()):
        shapes = json.loads(header["__metadata__"]["shapes"])
        header["__metadata__"]["shapes"] = data.draw(files(shapes)).decode("utf-8", "replace")
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + original[8 + length :])
    else:
        path.write_bytes(damaged(data.draw, original))
    works_or_is_refused(load_masks, path)


@fuzzed(120)
@given(data=st.data())
def test_statistics(run, tmp_path, data):
    folder, path = copied(run, tmp_path, "statistics", "statistics.json")
    path.write_bytes(data.draw(files(json.loads((run / "statistics" / "statistics.json").read_text()))))

    def read():
        found = open_statistics(folder)
        for name in found:
            found.site(name)

    works_or_is_refused(read)


@fuzzed(60)
@given(data=st.data())
def test_trajectories(run, tmp_path, data):
    folder, path = copied(run, tmp_path, "trajectories", "trajectories.json")
    path.write_bytes(data.draw(files(json.loads((run / "trajectories" / "trajectories.json").read_text()))))
    works_or_is_refused(open_trajectories, folder)


SCAN = {"format": scanning.FORMAT, "fingerprint": {"a": 1}, "triples": 4, "cost": {"scan_s": 1.0, "solve_s": 1.0, "passes": 2.0},
        "units": {"x": {"solved": [[0.5, 0.1], [0.9, 0.2]], "measured": [[0.5, 0.1]]}}}  # fmt: skip
TIMES = {"format": times.FORMAT, "fingerprint": {"a": 1}, "found": {"x": [[[0.5, 0.1], 3.0], [[0.5], 1.0]]}}


@fuzzed(100)
@given(data=st.data())
def test_scans_and_times(tmp_path, data):
    (tmp_path / scanning.FILE).write_bytes(data.draw(files(SCAN)))
    works_or_is_refused(scanning._open, tmp_path, {"a": 1})
    (tmp_path / times.FILE).write_bytes(data.draw(files(TIMES)))
    works_or_is_refused(times._read, tmp_path, {"a": 1})


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
    works_or_is_refused(_read_info, path)


CONFIG = {"pipeline": "p", "output": "o", "pattern": "2:4", "seed": 1, "include": ["a"], "spare_blocks": [0], "refit": True,
          "calibration": {"steps": 3, "damping": 0.1}, "limits": {"floors": {"a": 0.5}, "choices": ["2:4"]}}  # fmt: skip


@fuzzed(200)
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
