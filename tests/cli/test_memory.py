"""``obsdiff prune`` told how much memory there is, or to plan alone."""

import shutil

import pytest
import torch

from obsdiff.cli.main import main


def said(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["prune", *args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def weightless(pipe_folder, tmp_path):
    """The tiny pipeline's folder without its weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(pipe_folder, folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("size", ["much", "24 bananas", "-1GB", "0", "1e3GB", "nan", ""])
@pytest.mark.parametrize("option", ["host_memory", "device_memory"])
def test_a_size_that_is_none_is_refused(capsys, tmp_path, option, size):
    error = said(capsys, "--pipeline", "digits-sd3", "--output", str(tmp_path / "o"), f"--{option}={size}")
    assert f"{option} is" in error and "give a size such as 24GB" in error


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path, weightless):
    output = tmp_path / "o"
    before = sorted(tmp_path.rglob("*"))
    main(["prune", "--pipeline", str(weightless), "--output", str(output), "--dry_run", "true"])
    printed = capsys.readouterr().out
    assert "planned without weights" in printed and "host memory:" in printed and "scanning" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_plans_for_a_device_that_is_elsewhere(capsys, tmp_path, weightless):
    args = ["--pipeline", str(weightless), "--output", str(tmp_path / "o"), "--dry_run", "true"]
    main(["prune", *args, "--device", "cuda", "--device_memory", "24 GiB", "--dtype", "bfloat16"])
    assert "device memory:" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a device that is not there")
def test_nothing_says_what_a_device_elsewhere_multiplies(capsys, tmp_path, weightless):
    args = ["--pipeline", str(weightless), "--output", str(tmp_path / "o"), "--dry_run", "true", "--device", "cuda"]
    main(["prune", *args, "--allocation", "uniform", "--calibration.precision", "tf32"])
    assert "device memory:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host_memory", "1MB"], "this prune takes at least"),
        (["--device", "cpu", "--device_memory", "24GB"], "--device_memory is that of a cuda device"),
        (["--allocation", "measured", "--calibration.packages", "3"], "--calibration.packages 1"),
        (["--pattern", "structured:0.3", "--method", "wanda"], "cannot prune heads and neurons"),
        (["--pattern", "3:4:5"], "pattern"),
        (["--include", "[nothing*]"], "matches none"),
        (["--device", "cpu", "--calibration.precision", "tf32"], "this CPU has no products in tf32; use precision"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_a_run_refuses(capsys, tmp_path, weightless, args, message):
    error = said(capsys, "--pipeline", str(weightless), "--output", str(tmp_path / "o"), "--dry_run", "true", *args)
    assert message in error


def test_a_run_says_what_it_takes_and_one_that_cannot_fit_never_begins(capsys, tmp_path, pipe_folder):
    args = ["--pipeline", str(pipe_folder), "--output", str(tmp_path / "o"), "--allocation", "uniform"]
    args += ["--calibration.num_prompts", "2", "--evaluation.num_images", "0"]
    error = said(capsys, *args, "--host_memory", "200MB")
    assert "What would fit" in error and not (tmp_path / "o").exists()
    main(["prune", *args, "--host_memory", "60GB"])
    told = capsys.readouterr().err
    assert "host memory: about" in told
    assert (tmp_path / "o" / "pruning.json").is_file()
