"""Rules of the house, enforced: import direction, lazy imports, configs, packaging, file length, README commands."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCES = {
    "obsdiff": ROOT / "src" / "obsdiff",
    "obsdiff.callbacks": ROOT / "callbacks",
    "obsdiff.data": ROOT / "data",
}
RANKS = [
    {
        "errors",
        "files",
        "versions",
        "progress",
        "memory",
        "ranks",
        "costs",
        "yamlfiles",
        "names",
        "paths",
        "peaks",
        "spill",
        "devices",
        "quiet",
        "numbers",
    },
    {"obs", "criteria", "diffusion"},
    {"models"},
    {"embedded"},
    {"pruning"},
    {"data"},
    {"evaluation"},
    {"allocation"},
    {"export"},
    {"callbacks"},
    {"training"},
    {"compare"},
    {"bench"},
    {"cli"},
]
NUMERICS = RANKS[1]


def modules():
    """Every module of the package: (dotted name, path)."""
    for prefix, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([prefix, *(part for part in parts if part != "__init__")]), path


def imports(path):
    """Every module a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(module):
    package = module.split(".")[1]
    return next(i for i, names in enumerate(RANKS) if package in names)


def test_dependencies_point_one_way():
    wrong = []
    for module, path in modules():
        if module == "obsdiff":
            continue
        for imported in imports(path):
            if imported.startswith("obsdiff.") and rank(imported) > rank(module):
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_no_two_packages_import_each_other():
    needed = {
        (module.split(".")[1], imported.split(".")[1])
        for module, path in modules()
        if module != "obsdiff"
        for imported in imports(path)
        if imported.startswith("obsdiff.")
    }
    assert not [pair for pair in needed if pair[0] < pair[1] and pair[::-1] in needed]


def test_a_pipeline_is_resolved_in_one_place():
    """What its denoisers are, and which family they are of, is asked of the Subject outside ``models``."""
    asked = [
        f"{module} imports {name.name}"
        for module, path in modules()
        if not module.startswith("obsdiff.models")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("obsdiff.models")
        for name in node.names
        if name.name in ("denoisers_of", "find_family")
    ]
    assert not asked


def test_numerics_import_torch_only():
    allowed = {"torch", "obsdiff", *sys.stdlib_module_names}
    wrong = [
        f"{module} imports {imported}"
        for module, path in modules()
        if module != "obsdiff" and module.split(".")[1] in NUMERICS
        for imported in imports(path)
        if imported.split(".")[0] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("statement", ["import obsdiff", "from obsdiff.cli.main import main; main(['--help'])"])
def test_importing_and_helping_stay_light(statement):
    heavy = "{'torch', 'diffusers', 'lightning', 'transformers'}"
    check = f"{statement}; import sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_prune_help_does_not_import_torch():
    check = (
        "import sys\ntry:\n    from obsdiff.cli.prune import main; main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'diffusers', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "--calibration.num_prompts" in done.stdout and done.stdout.strip().endswith("[]")


def test_public_names_exist_and_are_documented():
    import obsdiff

    for name in obsdiff.__all__:
        assert getattr(obsdiff, name).__doc__
    with pytest.raises(AttributeError):
        _ = obsdiff.nothing


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_instantiates(path):
    if path.parent.name == "prune":
        from obsdiff.cli.parse import parse_options
        from obsdiff.criteria import find_method
        from obsdiff.obs.pattern import parse_pattern
        from obsdiff.pruning.options import PruneOptions

        options = parse_options(PruneOptions, "obsdiff prune", ["--config", str(path)])
        parse_pattern(options.pattern)
        find_method(options.method)
    elif path.parent.name in ("compare", "ablate"):
        from obsdiff.cli.parse import parse_options
        from obsdiff.compare.cells import units_of
        from obsdiff.compare.options import CompareOptions

        units, _ = units_of(parse_options(CompareOptions, "obsdiff compare", ["--config", str(path)]))
        assert {unit.method for unit in units} and all(unit.evaluation.num_images for unit in units)
    else:
        from obsdiff.cli.train import command_line

        built = command_line()(args=["--config", str(path)], run=False, save_config_callback=None)
        assert built.model is not None and built.datamodule is not None


def test_configs_name_classes_by_their_one_name():
    def class_paths(node):
        if isinstance(node, dict):
            yield from ([node["class_path"]] if "class_path" in node else [])
            for value in node.values():
                yield from class_paths(value)
        elif isinstance(node, list):
            for value in node:
                yield from class_paths(value)

    for path in CONFIGS:
        for name in class_paths(yaml.safe_load(path.read_text())):
            assert name.split(".")[0] in ("obsdiff", "lightning", "torch"), f"{path}: {name}"


def test_files_are_short():
    long = {module: n for module, path in modules() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


OTHERS_FORMATS = {
    "obsdiff.callbacks.checkpoint": {"torch.save"},  # Lightning's, written whole
    "obsdiff.evaluation.imagenet": {"torch.load"},  # the file of a package, tensors only (weights_only)
}


def test_no_pickles():
    for module, path in modules():
        found = set(imports(path))
        if module == "obsdiff.ranks":  # between the processes of one run, as torch's own exchange of objects
            found.remove("pickle")
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & found, module
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not ({"torch.load", "torch.save"} - OTHERS_FORMATS.get(module, set())) & calls, module


def test_scripts_are_short_and_callbacks_and_data_have_one_name():
    for script in ("prune.py", "train.py"):
        assert len((ROOT / script).read_text().splitlines()) <= 20
    for _, path in modules():
        assert not {"callbacks", "data"} & {name.split(".")[0] for name in imports(path)}


def test_the_wheel_holds_every_module_and_asset(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for prefix, folder in SOURCES.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = f"{prefix.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
                assert name in held, f"{name} is missing from the wheel"


@pytest.mark.parametrize("document", ["README.md", "docs/usage.md"])
def test_documented_commands_name_what_is_there(document):
    """Every file, config and command of a document's shell blocks exists."""
    from obsdiff.cli.main import COMMANDS

    text = (ROOT / document).read_text()
    blocks = text.split("```sh")[1:]
    assert blocks
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks:
        for line in block.split("```")[0].replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            for word in words:
                if word.startswith("configs/") or word in ("prune.py", "train.py"):
                    assert (ROOT / word).is_file(), word
            if words[:1] == ["make"]:
                assert f"\n{words[1]}:" in makefile, words[1]
            if words[:1] == ["obsdiff"]:
                assert words[1] in COMMANDS, line
