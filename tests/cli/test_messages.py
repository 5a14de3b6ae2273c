"""What a user did wrong, in one line of plain words."""

import pytest

from obsdiff.cli.explain import explain, nearest
from obsdiff.cli.options import BenchOptions, SampleOptions
from obsdiff.cli.parse import parse_options
from obsdiff.pruning.options import PruneOptions
from tests.cli.test_commands import refused

BASE = ["--pipeline", "p", "--output", "o"]


def said(capsys, *args, kind=PruneOptions):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        parse_options(kind, "obsdiff prune", [str(arg) for arg in args])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "class '" not in line and "Union" not in line and "Subtypes" not in line
    return line.removeprefix("obsdiff prune: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "x"], "--seed is 'x'; give a whole number"),
        (["--seed", "1.5"], "--seed is '1.5'; give a whole number"),
        (["--calibration.steps", "abc"], "--calibration.steps is 'abc'; give a whole number"),
        (["--calibration.damping", "much"], "--calibration.damping is 'much'; give a number"),
        (["--refit", "maybe"], "--refit is 'maybe'; give true or false"),
        (["--overwrite", "maybe"], "--overwrite is 'maybe'; give true or false"),
        (["--include", "x"], "--include holds 'x'; give a list, such as [a, b]"),
        (["--include", "[1]"], "--include holds '1'; give text (a number or true as text needs quotes)"),
        (["--spare_blocks", "x"], "--spare_blocks holds 'x'; give a list of whole numbers, such as [0, -1]"),
        (["--scan.levels", "0.5"], "--scan.levels holds '0.5'; give a list of numbers, such as [0.5, 0.8]"),
        (["--scan.levels", "[x]"], "--scan.levels holds ['x']; give a list of numbers, such as [0.5, 0.8]"),
        (["--limits.floors", "[1]"], "--limits.floors holds [1]; give keys with values, such as {name: 0.5}"),
        (["--limits.floors", "{a: x}"], "--limits.floors holds 'x'; give a number"),
        (
            ["--calibration", "5"],
            "--calibration is '5'; give keys with values, such as {a: 1}, or --calibration.KEY VALUE",
        ),
        (["--calibration", "{stepps: 5}"], "unknown option --calibration.stepps; did you mean --calibration.steps?"),
        (["--calibraton.steps", "5"], "unknown option --calibraton.steps; did you mean --calibration.steps?"),
        (["--num_prompts", "5"], "unknown option --num_prompts; did you mean --calibration.num_prompts?"),
        (["--patt", "2:4"], "unknown option --patt; did you mean --pattern?"),
        (["--xyzzy", "5"], "unknown option --xyzzy"),
        (["word"], "cannot place 'word'; every value needs the name of its option before it"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "x" * 500], f"--seed is '{'x' * 55}...'; give a whole number"),
    ],
)
def test_wrong_options(capsys, args, message):
    assert said(capsys, *BASE, *args) == message


def test_missing_and_wrong_keys_of_configs(capsys, tmp_path):
    assert said(capsys, "--pipeline", "p") == "give --output"
    assert said(capsys) == "give --pipeline and --output"
    assert said(capsys, "p", kind=SampleOptions) != ""
    config = tmp_path / "c.yaml"
    for text, message in [
        ("seed: abc", "--seed is 'abc'; give a whole number"),
        ("output: 2024", "--output is '2024'; give text (a number or true as text needs quotes)"),
        ("calibration: {steps: abc}", "--calibration.steps is 'abc'; give a whole number"),
        ("patern: '2:4'", "unknown option --patern; did you mean --pattern?"),
        ("- a", f"{config} is not a config: it is a list, not keys with values"),
        ("", f"{config} is not a config: it is empty, not keys with values"),
    ]:
        config.write_text(text)
        assert said(capsys, *BASE, "--config", config) == message
    for path, word in [
        (tmp_path, "Is a directory"),
        (tmp_path / "no", "not found"),
        ("", "empty"),
        ("x" * 300, "too long"),
    ]:
        assert word in said(capsys, *BASE, "--config", path)
    config.write_bytes(bytes(range(256)))
    assert "no UTF-8 text" in said(capsys, *BASE, "--config", config)


NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'obsdiff.pruning.options.PruningOptions':
        {}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='x', val='y')"""


def test_what_goes_wrong_inside_a_class():
    def inside(text):
        return explain(NESTED.format(text.replace("\n", "\n        ")), ["model"])

    assert (
        inside("Parser key \"seed\":\n  Expected a <class 'int'>. Got value: abc")
        == "--model.seed is 'abc'; give a whole number"
    )
    assert inside("unrecognized arguments: --sed=1") == "unknown option --model.sed; did you mean --model.seed?"
    assert inside("Option 'nonsense' is not accepted") == "unknown option --model.nonsense"
    union = (
        "Parser key \"refit\":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class 'bool'>, "
        "<class 'NoneType'>]\n  Errors:\n    - Expected a <class 'bool'>\n  Given value: maybe"
    )
    assert inside(union) == "--model.refit is 'maybe'; give true or false"
    assert explain("Something\n  else", []) == "Something else"
    assert len(explain("x" * 1000, [])) < 310


def test_nearest():
    assert nearest("prun", ["prune", "train"]) == "; did you mean prune?"
    assert nearest("zebra", ["prune", "train"]) == ""


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--seed", "1" + "0" * 30], "it must be a whole number from 0 to 2^63 - 1"),
        (["--seed", "-1"], "from 0 to"),
        (["--evaluation.seed", "-1"], "from 0 to"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--device", "foo"], "unknown device 'foo'"),
        (["--device", "cuda:x"], "unknown device"),
        (["--device", ""], "unknown device"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--output", ""], "output is empty"),
        (["--output", "."], "holds the current folder"),
        (["--output", ".."], "holds the current folder"),
        (["--output", "/"], "holds the current folder"),
        (["--output", "x" * 300], "too long a name"),
        (["--output", "~nobody-here/x"], "no such user"),
        (["--pipeline", ""], "pipeline is empty"),
        (["--pipeline", "x" * 300], "too long a name"),
        (["--statistics", ""], "statistics is empty"),
        (["--statistics", "."], "holds the current folder"),
        (["--statistics", "x" * 300], "too long a name"),
        (["--sensitivity", "x" * 300], "too long a name"),
        (["--plan", "x" * 300], "too long a name"),
        (["--plan", ""], "plan is empty"),
        (["--plan", "."], "Is a directory"),
        (["--calibration.prompts", "x" * 300], "too long a name"),
        (["--calibration.prompts", ""], "calibration.prompts is empty"),
        (["--evaluation.prompts", "none.csv"], "none.csv not found"),
        (["--calibration.damping", ".nan"], "finite number"),
        (["--calibration.damping", ".inf"], "finite number"),
        (["--calibration.guidance_scale", ".nan"], "finite number"),
        (["--scan.levels", "[.nan]"], "above 0 and below 1"),
        (["--scan.levels", "[0.5, .inf]"], "above 0 and below 1"),
        (["--scan.levels", "[]"], "scan.levels is empty"),
        (["--limits.floors", "{a: .nan}"], "from 0 to 1"),
        (["--limits.ceilings", "{a: .inf}"], "from 0 to 1"),
        (["--pattern", "unstructured:nan"], "at least 0 and below 1"),
        (["--pattern", "structured:heads=0.5,multiple_of=inf"], "whole number"),
        (["--pattern", "structured:heads=0.5,multiple_of=nan"], "whole number"),
        (["--pattern", "1:" + "9" * 5000], "unknown pattern"),
        (["--budget", "sparsity:nan"], "unknown budget"),
        (["--evaluation.batch_size", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_values_that_no_run_can_have(capsys, tmp_path, monkeypatch, args, word):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "prune", "--pipeline", "digits-sd3", "--output", "o", *args)
    assert word in line and len(line) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["sample", "digits-sd3", "--prompt", "x", "--seed", "-1"], "from 0 to"),
        (["sample", "digits-sd3", "--prompt", "x", "--steps", "0"], "at least 1"),
        (["sample", "digits-sd3", "--prompt", "x", "--guidance_scale", ".nan"], "finite"),
        (["sample", "digits-sd3", "--prompt", "[]"], "no prompt"),
        (["sample", "digits-sd3", "--prompt", "[7, yes]"], "quote"),
        (["sample", "digits-sd3", "--prompt", "x", "--output", ""], "output is empty"),
        (["sample", "digits-sd3", "--prompt", "x", "--output", "x" * 300 + ".png"], "too long"),
        (["inspect", ""], "folder is empty"),
        (["inspect", "x" * 300], "too long"),
        (["bench", "prune", "--threads", "0"], "threads is 0"),
        (["bench", "prune", "--threads", "-1"], "threads is -1"),
        (["bench", "prune", "--threads", "1" + "0" * 30], "threads is"),
        (["bench", "prune", "--statistics", ""], "statistics is empty"),
        (["bench", "scan", "--pipeline", "nowhere"], "unknown pipeline"),
        (["bench", "scan", "--device", "foo"], "unknown device"),
        (["trian"], "did you mean train?"),
    ],
)  # fmt: skip
def test_values_of_the_other_commands(capsys, args, word):
    assert word in refused(capsys, *args)


@pytest.mark.parametrize("command", [["prune"], ["sample"], ["inspect"]])
def test_help_begins_with_an_example_and_what_is_required(capsys, command):
    from obsdiff.cli.main import main

    with pytest.raises(SystemExit):
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"example: obsdiff {command[0]} ") and lines[3].startswith("required: ")


def test_the_home_folder_is_filled_in(monkeypatch, tmp_path, pipe_folder):
    from obsdiff.cli.early import checked_prune

    monkeypatch.setenv("HOME", str(pipe_folder.parent))
    found = checked_prune(PruneOptions(pipeline=f"~/{pipe_folder.name}", output="~/out", statistics="~/s"))
    assert (found.pipeline, found.output) == (str(pipe_folder), str(pipe_folder.parent / "out"))
    assert found.statistics == str(pipe_folder.parent / "s")


def test_the_device_defaults_to_what_is_there(monkeypatch):
    import torch

    from obsdiff.devices import choose_device
    from obsdiff.errors import UserError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == "cpu" and choose_device(None, float64=False) == "mps"
    with pytest.raises(UserError, match="torch finds no cuda device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == "cuda" and choose_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="torch finds 2 cuda devices"):
        choose_device("cuda:2")


def test_bench_options_parse():
    assert parse_options(BenchOptions, "obsdiff bench prune", ["--pattern", "2:4"]).pattern == "2:4"
