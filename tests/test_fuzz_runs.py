"""Manifests and masks that were changed: a run loads and is inspected, or one line says what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import obsdiff
from obsdiff.export.inspection import inspect_run
from obsdiff.pruning.masks import load_masks
from tests.fuzzing import copied, damaged, files, fuzzed, works_or_is_refused


@pytest.mark.parametrize("name", ["run", "shrunk"])
@fuzzed(120)
@given(data=st.data())
def test_inspecting_odd_manifests(whole_run, tmp_path, name, data):
    folder, path = copied(whole_run, tmp_path, name, "pruning.json")
    original = json.loads((whole_run / name / "pruning.json").read_text())
    path.write_bytes(data.draw(files(original)))
    works_or_is_refused(inspect_run, folder)


@pytest.mark.parametrize("name", ["run", "shrunk"])
@fuzzed(20)
@given(data=st.data())
def test_loading_with_odd_manifests(whole_run, tmp_path, name, data):
    folder, path = copied(whole_run, tmp_path, name, "pruning.json")
    path.write_bytes(data.draw(files(json.loads((whole_run / name / "pruning.json").read_text()))))
    works_or_is_refused(obsdiff.load_pipeline, folder)


VARIANTS: list = [
    [],
    None,
    7,
    "text",
    {},
    {"plan": []},
    {"plan": None},
    {"plan": {"x": 5}},
    {"shrunk": []},
    {"shrunk": {}},
    {"shrunk": {"layers": 3, "attributes": {}}},
    {"shrunk": {"layers": {"x": "y"}, "attributes": {}}},
    {"parameters": None},
    {"parameters": {"dense": "x", "pruned": 1, "nonzero": 1}},
    {"sparsity": "x"},
    {"sparsity_per_layer": []},
    {"layer_error": None},
    {"statistics": 5},
    {"dtype": "int4"},
    {"dtype": None},
    {"format": "1"},
    {"denoiser": None},
    {"denoiser_sha256": 5},
    {"component": "nothing"},
    {"component": None},
    {"seed": {}},
    {"rule": 5},
    {"budget": []},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_odd_manifests(whole_run, tmp_path, change):
    folder, path = copied(whole_run, tmp_path, "run", "pruning.json")
    original = json.loads((whole_run / "run" / "pruning.json").read_text())
    path.write_text(json.dumps({**original, **change} if isinstance(change, dict) and change else change))
    works_or_is_refused(inspect_run, folder)
    works_or_is_refused(obsdiff.load_pipeline, folder)


@fuzzed(120)
@given(data=st.data())
def test_masks(whole_run, tmp_path, data):
    path = tmp_path / "masks.safetensors"
    original = (whole_run / "run" / "masks.safetensors").read_bytes()
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
