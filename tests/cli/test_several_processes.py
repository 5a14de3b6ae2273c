"""``obsdiff prune`` under torchrun: several processes share the work, one writes, the result is the same as of one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from obsdiff.cli.main import main
from obsdiff.pruning import apply
from tests.cli.test_commands import ARTIFACTS, QUICK, ROOT
from tests.training.test_several_processes import run_on, run_two


@pytest.mark.slow
def test_two_processes_write_one_result(pipe_folder, tmp_path):
    options = ["--pipeline", str(pipe_folder), *QUICK, "--allocation=null", "--pattern", "unstructured:0.6"]
    options += ["--calibration.batch_size", "2"]
    scan = ["--scan.levels", "[0.5,0.9]", "--scan.triples", "4", "--sensitivity"]
    run_two(ROOT / "prune.py", *options, *scan, tmp_path / "scan2", "--output", tmp_path / "two")
    main(["prune", *options, *scan, str(tmp_path / "scan1"), "--output", str(tmp_path / "one")])
    assert {path.name for path in (tmp_path / "two").iterdir()} == ARTIFACTS | {"ratios.png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "scan1", "scan2", "two"]
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["rule"] == "measured" and two["sparsity"]["achieved"] == one["sparsity"]["achieved"]
    assert two["sparsity"]["per_layer"] == one["sparsity"]["per_layer"]
    assert two["allocation"]["scan"]["passes"] >= one["allocation"]["scan"]["passes"]
    masks = [load_file(tmp_path / name / "masks.safetensors") for name in ("one", "two")]
    assert masks[0].keys() == masks[1].keys()
    assert all(bool((masks[0][name] == masks[1][name]).all()) for name in masks[0])
    before, after = (found["evaluation"]["pruned"]["mse"] for found in (one, two))
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--pattern", "unstructured:0.6"],
        ["--pattern", "structured:0.5"],
        ["--pattern", "2:4", "--calibration.streamed", "true"],
    ],
    ids=["single", "units", "streamed"],
)
def test_one_two_and_four_processes_take_the_same(pipe_folder, tmp_path, more):
    options = [
        "--pipeline",
        pipe_folder,
        *QUICK,
        "--calibration.batch_size",
        "1",
        "--evaluation.num_images",
        "0",
        *more,
    ]
    for count in (2, 4):
        run_on(count, ROOT / "prune.py", *options, "--output", tmp_path / str(count))
    main(["prune", *map(str, options), "--output", str(tmp_path / "1")])
    one, two, four = (load_file(tmp_path / name / "masks.safetensors") for name in "124")
    assert one and one.keys() == two.keys() == four.keys()
    for name, mask in one.items():
        assert torch.equal(mask, two[name]) and torch.equal(mask, four[name]), name
    told = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in "124"]
    for key in ("sparsity_per_layer", "layer_error", "refit_steps"):  # in the order of the model, whoever was first
        assert list(told[0][key]) == list(told[1][key]) == list(told[2][key])


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_has_solved(pipe_folder, tmp_path, monkeypatch):
    options = ["--pipeline", str(pipe_folder), *QUICK, "--pattern", "unstructured:0.6"]
    options += ["--calibration.streamed", "true", "--evaluation.num_images", "0"]
    main(["prune", *options, "--output", str(tmp_path / "one")])
    real, solved = apply.solve_site, []

    def dies(*args):
        if len(solved) == 5:
            raise ZeroDivisionError
        solved.append(args)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(apply, "solve_site", dies)
        main(["prune", *options, "--output", str(tmp_path / "two")])
    assert len(list((tmp_path / ".two.solved").glob("*.safetensors"))) == 5
    run_two(ROOT / "prune.py", *options, "--output", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "masks.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(mask, two[name]) for name, mask in one.items())
    notes = json.loads((tmp_path / "two" / "report.json").read_text())["notes"]
    assert [note for note in notes if note.startswith("5 of its solves were taken over")]
    assert not (tmp_path / ".two.solved").exists()
