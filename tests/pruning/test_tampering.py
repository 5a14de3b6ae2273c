"""A run whose files do not agree does not load: masks, manifest and weights must describe one another."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import obsdiff
from obsdiff.pruning.masks import load_masks, save_masks
from tests.conftest import make_pipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A saved run of each kind, by pattern."""
    folder = tmp_path_factory.mktemp("runs")
    for pattern in ("unstructured:0.5", "2:4", "structured:0.5"):
        pipe = make_pipe()
        report = obsdiff.prune(pipe, pattern, method="magnitude")
        obsdiff.save_pipeline(pipe, folder / pattern.replace(":", "-"), report)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A function that copies a run and returns its folder."""
    import shutil

    return lambda pattern: shutil.copytree(runs / pattern.replace(":", "-"), tmp_path / "out")


def refused(folder):
    with pytest.raises(obsdiff.UserError) as caught:
        obsdiff.load_pipeline(folder)
    assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value)
    return str(caught.value)


def edit_manifest(folder, change):
    path = folder / "pruning.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first(mapping):
    return next(iter(mapping))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_an_untouched_copy_loads(run, pattern):
    obsdiff.load_pipeline(run(pattern))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
@pytest.mark.parametrize("change", ["empty", "ones", "one layer less", "one bit", "other shape", "another layer"])
def test_masks_that_do_not_fit(run, pattern, change):
    folder = run(pattern)
    masks = load_masks(folder / "masks.safetensors")
    name = first(masks)
    if change == "empty":
        masks = {}
    elif change == "ones":
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    elif change == "one layer less":
        del masks[name]
    elif change == "one bit":
        flat = masks[name].view(-1)
        flat[int(flat.logical_not().nonzero()[0])] = True
    elif change == "other shape":
        masks[name] = masks[name][None].expand(2, *masks[name].shape).contiguous()
    else:
        masks["transformer_blocks.9.nothing"] = masks.pop(name)
    save_masks(masks, folder / "masks.safetensors")
    assert "mask" in refused(folder)


@pytest.mark.parametrize(
    "damage", ["short", "dtype", "shapes", "negative", "huge", "no metadata", "empty file", "text"]
)
def test_damaged_mask_files(run, damage):
    folder = run("unstructured:0.5")
    path = folder / "masks.safetensors"
    tensors = load_file(path)
    shapes = {name: list(mask.shape) for name, mask in load_masks(path).items()}
    name = first(tensors)
    if damage == "short":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif damage == "shapes":
        shapes = [1, 2]
    elif damage == "negative":
        shapes[name] = [-1]
    elif damage == "huge":
        shapes[name] = [10**30]
    save_file(tensors, path, None if damage == "no metadata" else {"shapes": json.dumps(shapes)})
    if damage in ("empty file", "text"):
        path.write_bytes(b"" if damage == "empty file" else b"hello")
    assert "cannot read masks" in refused(folder)


def test_a_manifest_with_nothing_shrunk(run):
    folder = run("structured:0.5")
    edit_manifest(folder, lambda m: m.update(shrunk={"tensors": {}, "attributes": {}}))
    assert "does not describe the shrunk layer" in refused(folder)


def test_a_manifest_that_calls_a_shrunk_pipeline_masked(run):
    folder = run("structured:0.5")
    edit_manifest(folder, lambda m: m.update(shrunk=None))
    assert "describes no shrunk layers" in refused(folder)


def test_shapes_and_head_counts_that_differ(run):
    folder = run("structured:0.5")

    def narrower(manifest):
        manifest["shrunk"]["tensors"][first(manifest["shrunk"]["tensors"])][0] += 1

    edit_manifest(folder, narrower)
    assert "not shrunk as the manifest says" in refused(folder)


def drop(key):
    return lambda m: m.pop(key)


def put(key, value):
    return lambda m: m.update({key: value})


ODD = {
    "not a mapping": lambda m: None,
    **{f"no {key}": drop(key) for key in ("plan", "shrunk", "pattern", "sparsity_per_layer", "parameters", "dtype")},
    "plan as list": put("plan", []),
    "plan as null": put("plan", None),
    "empty plan": lambda m: m.update(plan={}, sparsity_per_layer={}),
    "plan of numbers": lambda m: m.update(plan=dict.fromkeys(m["plan"], 2)),
    "unknown pattern": put("pattern", "diagonal:1"),
    "unknown pattern in plan": lambda m: m["plan"].update({first(m["plan"]): "half"}),
    "mixed plan": lambda m: m["plan"].update({first(m["plan"]): "structured:0.5"}),
    "plan of other layers": lambda m: m["plan"].update(other="unstructured:0.5"),
    "share above one": lambda m: m["sparsity_per_layer"].update({first(m["plan"]): 1.5}),
    "another share": lambda m: m["sparsity_per_layer"].update({first(m["plan"]): 0.25}),
    "shrunk as list": put("shrunk", []),
    "shrunk without attributes": put("shrunk", {"tensors": {}}),
    "shrunk with text": put("shrunk", {"tensors": {"a": "b"}, "attributes": {}}),
    "parameters as number": put("parameters", 3),
    "dtype int8": put("dtype", "int8"),
    "format as text": put("format", "one"),
    "another format": put("format", 99),
    "component that is not there": put("component", "unet"),
    "component of another kind": put("component", ["transformer"]),
    "another hash": put("denoiser_sha256", "0" * 64),
    "statistics as text": put("statistics", "all"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_manifests(run, odd):
    folder = run("unstructured:0.5")
    edit_manifest(folder, ODD[odd])
    if odd == "not a mapping":
        (folder / "pruning.json").write_text("[1, 2]")
    refused(folder)


def test_what_was_achieved_is_measured_on_the_weights(pipe):
    """A kept weight that is zero all the same counts as zero, as a reader of the file would count it."""
    name = "transformer_blocks.1.ff.net.2"
    with torch.no_grad():
        pipe.transformer.get_submodule(name).weight[:4].zero_()
    weights = pipe.transformer.get_submodule(name).weight
    report = obsdiff.prune(pipe, "2:4", method="magnitude", include=[name], prune_again=True)
    wanted = int((pipe.transformer.get_submodule(name).weight == 0).sum()) / weights.numel()
    assert wanted > 0.6 and report.sparsity == pytest.approx(wanted, abs=1e-12)
    assert report.sparsity_per_layer[name] == pytest.approx(0.5)
