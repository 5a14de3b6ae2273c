"""What is saved comes back: by obsdiff, by diffusers with obsdiff imported, and by diffusers alone."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

import obsdiff
from obsdiff.export.inspection import inspect_run


def prune_and_save(pipe, prompts, pattern, folder, method="obs"):
    report = obsdiff.prune(pipe, pattern, method=method, statistics=obsdiff.calibrate(pipe, prompts))
    obsdiff.save_pipeline(pipe, folder, report)
    return report


def same_weights(a, b):
    left, right = a.transformer.state_dict(), b.transformer.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
@pytest.mark.parametrize("where", ["out", "out/pipeline"])
def test_round_trip_is_exact(dual_pipe, prompts, images, tmp_path, pattern, where):
    prune_and_save(dual_pipe, prompts, pattern, tmp_path / "out")
    loaded = obsdiff.load_pipeline(tmp_path / where)
    assert same_weights(loaded, dual_pipe)
    assert torch.equal(images(loaded), images(dual_pipe))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "pipeline",
        "pruning.json",
        "plan.yaml",
        "masks.safetensors",
    }
    assert not list((tmp_path / "out").rglob("*.bin")) + list((tmp_path / "out").rglob("*.p*kl"))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_diffusers_loads_it_with_obsdiff_imported(pipe, prompts, images, tmp_path, pattern):
    from diffusers import DiffusionPipeline

    prune_and_save(pipe, prompts, pattern, tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert same_weights(loaded, pipe)


WITHOUT_OBSDIFF = """
    import sys
    sys.modules["obsdiff"] = None  # as if it were not installed
    import torch, diffusers
    from safetensors.torch import load_file
    folder = sys.argv[1]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=sys.argv[2] == "trust")
    stored = load_file(folder + "/transformer/diffusion_pytorch_model.safetensors")
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    generator = torch.Generator().manual_seed(5)
    image = pipe("a seven", num_inference_steps=2, height=16, width=16, max_sequence_length=10, output_type="pt",
                 generator=generator).images
    assert image.isfinite().all()
    print(type(pipe.transformer).__name__, "obsdiff" in str(sys.modules.get("obsdiff")))
"""


def run_without_obsdiff(folder, trust, tmp_path):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_OBSDIFF), str(folder), trust],
        capture_output=True,
        text=True,
        env={
            **__import__("os").environ,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
        },
    )


@pytest.mark.parametrize(
    ("pattern", "trust", "expected"),
    [
        pytest.param("unstructured:0.5", "plain", "SD3Transformer2DModel False", marks=pytest.mark.slow),
        ("structured:0.5", "trust", "ShrunkSD3Transformer2DModel False"),
    ],
)
def test_diffusers_loads_it_without_obsdiff(pipe, prompts, tmp_path, pattern, trust, expected):
    prune_and_save(pipe, prompts, pattern, tmp_path / "out")
    done = run_without_obsdiff(tmp_path / "out" / "pipeline", trust, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(expected)


@pytest.mark.slow
def test_diffusers_without_obsdiff_and_without_trust_refuses(pipe, prompts, tmp_path):
    prune_and_save(pipe, prompts, "structured:0.5", tmp_path / "out")
    done = run_without_obsdiff(tmp_path / "out" / "pipeline", "plain", tmp_path)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_a_pipeline_saved_by_its_user_loads_again(pipe, prompts, images, tmp_path, pattern):
    """``pipe.save_pretrained`` of a loaded pruned pipeline, without obsdiff's own saving."""
    from diffusers import DiffusionPipeline

    prune_and_save(pipe, prompts, pattern, tmp_path / "out")
    obsdiff.load_pipeline(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert same_weights(DiffusionPipeline.from_pretrained(tmp_path / "again"), pipe)


def test_shrunk_weights_never_load_into_a_wrong_shape(pipe, prompts, tmp_path):
    from diffusers import SD3Transformer2DModel

    prune_and_save(pipe, prompts, "structured:0.5", tmp_path / "out")
    folder = tmp_path / "out" / "pipeline" / "transformer"
    with pytest.raises((ValueError, RuntimeError)):
        SD3Transformer2DModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        type(pipe.transformer).from_pretrained(folder, ignore_mismatched_sizes=True)
    config = json.loads((folder / "config.json").read_text())
    config["shrunk"]["tensors"]["transformer_blocks.1.ff.net.2.weight"] = [16, 40]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(obsdiff.UserError, match="cannot load"):
        obsdiff.load_pipeline(tmp_path / "out")


def test_bfloat16_round_trip(pipe, prompts, tmp_path):
    pipe.to(torch.bfloat16)
    prune_and_save(pipe, prompts, "unstructured:0.5", tmp_path / "out")
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    assert loaded.transformer.dtype == torch.bfloat16 and same_weights(loaded, pipe)
    assert obsdiff.load_pipeline(tmp_path / "out", dtype="float32").transformer.dtype == torch.float32


def test_changed_weights_are_noticed(pipe, prompts, tmp_path):
    report = prune_and_save(pipe, prompts, "unstructured:0.5", tmp_path / "out")
    name, mask = next(iter(report.masks.items()))
    with torch.no_grad():
        pipe.transformer.get_submodule(name).weight[~mask] = 1e-3
    pipe.transformer.save_pretrained(tmp_path / "out" / "pipeline" / "transformer")
    with pytest.raises(obsdiff.UserError, match="not zero where their masks say so"):
        obsdiff.load_pipeline(tmp_path / "out")
    with torch.no_grad():
        pipe.transformer.get_submodule(name).weight[~mask] = 0
        pipe.transformer.get_submodule(name).weight[mask] *= 2
    pipe.transformer.save_pretrained(tmp_path / "out" / "pipeline" / "transformer")
    with pytest.raises(obsdiff.UserError, match="changed after pruning"):
        obsdiff.load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("damage", ["manifest", "masks", "weights", "no-manifest-keys"])
def test_damaged_runs_are_refused(pipe, prompts, tmp_path, damage):
    prune_and_save(pipe, prompts, "unstructured:0.5", tmp_path / "out")
    victim = {
        "manifest": tmp_path / "out" / "pruning.json",
        "masks": tmp_path / "out" / "masks.safetensors",
        "weights": tmp_path / "out" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors",
        "no-manifest-keys": tmp_path / "out" / "pruning.json",
    }[damage]
    victim.write_bytes(b"{}" if damage == "no-manifest-keys" else victim.read_bytes()[:-50])
    with pytest.raises(obsdiff.UserError, match="out"):
        obsdiff.load_pipeline(tmp_path / "out")


def test_unknown_pipelines(tmp_path):
    for source, word in (
        ("no-such-thing", "embedded name"),
        (tmp_path, "model_index"),
        (tmp_path / "missing", "unknown pipeline"),
        ("owner/name", "cannot load"),
    ):
        with pytest.raises(obsdiff.UserError, match=word):
            obsdiff.load_pipeline(source)


def test_unknown_dtype_and_device(pipe_folder):
    with pytest.raises(obsdiff.UserError, match="int8"):
        obsdiff.load_pipeline(pipe_folder, dtype="int8")
    with pytest.raises(obsdiff.UserError, match="device"):
        obsdiff.load_pipeline(pipe_folder, device="nonsense")


def test_output_that_holds_something_else_is_left_alone(pipe, prompts, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    report = obsdiff.prune(pipe, "2:4", method="magnitude")
    for overwrite in (False, True):
        with pytest.raises(obsdiff.UserError, match="holds something else"):
            obsdiff.save_pipeline(pipe, folder, report, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "precious" and len(list(folder.iterdir())) == 1


def test_overwrite_replaces_an_earlier_run_only_when_asked(pipe, tmp_path):
    report = obsdiff.prune(pipe, "2:4", method="magnitude")
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    with pytest.raises(obsdiff.UserError, match="--overwrite"):
        obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    obsdiff.save_pipeline(pipe, tmp_path / "out", report, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_behind(pipe, tmp_path, monkeypatch):
    report = obsdiff.prune(pipe, "2:4", method="magnitude")
    obsdiff.save_pipeline(pipe, tmp_path / "old", report)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("obsdiff.pruning.folder.save_masks", full)
    with pytest.raises(obsdiff.UserError, match="No space left"):
        obsdiff.save_pipeline(pipe, tmp_path / "new", report)
    with pytest.raises(obsdiff.UserError, match="No space left"):
        obsdiff.save_pipeline(pipe, tmp_path / "old", report, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    assert same_weights(obsdiff.load_pipeline(tmp_path / "old"), pipe)


def test_unwritable_place(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    report = obsdiff.prune(pipe, "2:4", method="magnitude")
    with pytest.raises(obsdiff.UserError, match="cannot write"):
        obsdiff.save_pipeline(pipe, tmp_path / "file" / "out", report)


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "structured:0.5"])
def test_inspect_tells_every_layer(pipe, prompts, tmp_path, pattern):
    report = prune_and_save(pipe, prompts, pattern, tmp_path / "out")
    text = inspect_run(tmp_path / "out")
    assert all(name in text for name in report.plan.entries) and pattern in text
    assert all(f"{error:.5f}" in text for error in report.layer_error.values())
    with pytest.raises(obsdiff.UserError, match="not the folder of a prune run"):
        inspect_run(tmp_path)


def test_folders_written_before_shapes_were_by_tensor(pipe, prompts, tmp_path, images):
    """Until November 2026 a shrunk model listed its linear layers, [outputs, inputs] each."""
    prune_and_save(pipe, prompts, "structured:0.5", tmp_path / "out")
    for path, at in (("pruning.json", ("shrunk",)), ("pipeline/transformer/config.json", ("shrunk",))):
        content = json.loads((tmp_path / "out" / path).read_text())
        tensors = content[at[0]].pop("tensors")
        content[at[0]]["layers"] = {
            name.removesuffix(".weight"): shape for name, shape in tensors.items() if name.endswith(".weight")
        }
        (tmp_path / "out" / path).write_text(json.dumps(content))
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    assert same_weights(loaded, pipe) and torch.equal(images(loaded), images(pipe))
    again = obsdiff.prune(loaded, "structured:0.5", method="magnitude", prune_again=True)
    obsdiff.save_pipeline(loaded, tmp_path / "again", again)
    assert same_weights(obsdiff.load_pipeline(tmp_path / "again"), loaded)
