"""YAML by the core schema of 1.2, wherever it is read."""

import math

import pytest
import yaml

from obsdiff.cli.parse import parse_options
from obsdiff.errors import UserError
from obsdiff.obs.pattern import NM
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.planfile import parse_plan
from obsdiff.yamlfiles import load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"), ("1:2", "1:2"), ("16:32", "16:32"), ("190:20:30", "190:20:30"), ("1:30.5", "1:30.5"),
        ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("010", 10), ("0o10", 8), ("0x10", 16), ("1e-3", 1e-3),
        ("1_000", "1_000"), ("2026-11-25", "2026-11-25"), ("true", True), ("False", False), ("~", None), ("", None),
        ("-7", -7), ("1.", 1.0), (".5", 0.5), ("-.inf", -math.inf), ("'2:4'", "2:4"), ("=", "="),
        ("{a: &x 2:4, b: *x}", {"a": "2:4", "b": "2:4"}), ("{<<: {a: 1}, a: 2}", {"a": 2}),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_say(text, value):
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "{x: {b: 1, b: 1}}",
        "[1, 2",
        "[" * 100_000,
        "9" * 10_000,
        "? [a]\n: 1",
        "!!python/name:os.system x",
        "\x00",
        "a: b: c",
        '"\\uD800"',
    ],
)
def test_what_is_no_plain_yaml_is_one_kind_of_error(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_what_safe_dump_writes_comes_back():
    value = {
        "a": "2:4",
        "b": "no",
        "c": "010",
        "d": 1e-7,
        "e": 10**20,
        "f": None,
        "g": [True, "", "~", "0x1F"],
        "h": math.inf,
    }
    assert load_yaml(yaml.safe_dump(value)) == value


def options(tmp_path, *args, config=None):
    if config is not None:
        (tmp_path / "c.yaml").write_text(config)
        args = ("--config", str(tmp_path / "c.yaml"), *args)
    return parse_options(PruneOptions, "obsdiff prune", ["--pipeline", "p", "--output", "o", *args])


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "16:32"])
def test_patterns_need_no_quotes(tmp_path, pattern):
    """On the command line, in lists of it, in configs and in plans."""
    assert options(tmp_path, "--pattern", pattern).pattern == pattern
    assert options(tmp_path, "--limits.choices", f"[dense,{pattern}]").limits.choices == ["dense", pattern]
    assert options(tmp_path, "--limits", f"{{choices: [{pattern}]}}").limits.choices == [pattern]
    found = options(tmp_path, config=f"pattern: {pattern}\nlimits: {{choices: [dense, {pattern}]}}\n")
    assert (found.pattern, found.limits.choices) == (pattern, ["dense", pattern])
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"pattern: {pattern}\nlayers:\n  a: {pattern}\n  no: dense\n")
    n, m = map(int, pattern.split(":"))
    read, _ = parse_plan(plan)
    assert read.pattern == NM(n, m) == read.entries["a"] and list(read.entries) == ["a", "no"]


def test_numbers_and_switches_are_read_as_people_write_them(tmp_path):
    found = options(tmp_path, "--seed", "010", "--calibration.damping", "1e-3", "--overwrite", "yes")
    assert (found.seed, found.calibration.damping, found.overwrite) == (10, 1e-3, True)
    found = options(tmp_path, config="calibration: {damping: 1e-3, column: no}\noverwrite: yes\nrefit: off\n")
    assert (found.calibration.damping, found.calibration.column) == (1e-3, "no")
    assert (found.overwrite, found.refit) == (True, False)


def test_base_60_is_no_number_either(tmp_path, capsys):
    for args in (["--seed", "2:4"], ["--calibration.steps", "1:30"], ["--calibration.damping", "1:30.5"]):
        with pytest.raises(SystemExit):
            options(tmp_path, *args)
        assert args[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"- a", "is a list"),
        (b"words", "just 'words'"),
        (b"a:\n  - [", "line 2"),
        (b"\xff\xfe", "no UTF-8"),
        (b"a: 1\na: 2", "'a' stands there twice"),
        (b"1: 2", "its key 1"),
        (b"[" * 9999, "nested too deeply"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, word):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=word) as raised:
        read_yaml(path, "config")
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["none.yaml", ".", "x" * 300])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot read config|too long a name"):
        read_yaml(tmp_path / name, "config")
