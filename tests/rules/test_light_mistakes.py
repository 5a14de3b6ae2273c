"""Cheap mistakes are answered without importing what is slow to import, by names that match the code's tables."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest

MISTAKES = [
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--method", "foo"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--pattern", "half"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--method", "wanda", "--pattern", "structured:0.3"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--method", "ecodiff", "--pattern", "2:4"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--calibration.weighting", "cosine"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--allocation", "best"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--budget", "size:1"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--fusion", "sum"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--compared_columns", "48"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--compared_columns", "64", "--method", "wanda"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--dtype", "int8"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--device", "meta"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--plan", "none.yaml"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--calibration.prompts", "none.txt"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--calibraton.steps", "3"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--config", "none.yaml"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--host_memory", "much"],
    ["prune", "--pipeline", "digits-sd3", "--output", "o", "--device_memory", "24 bananas"],
    ["prune", "--pipeline", "nowhere", "--output", "o"],
    ["sample", "nowhere", "--prompt", "x"],
    ["sample", "digits-sd3", "--prompt", "x", "--dtype", "int8"],
    ["sample", "digits-sd3"],
    ["inspect", "nowhere"],
    ["bench", "prune", "--preset", "sd9"],
    ["bench", "scan", "--method", "foo"],
    ["train", "fit", "--config", "none.yaml"],
    ["train", "fitt"],
    ["train", "fit", "--modell.output", "x"],
    ["train"],
    ["prun"],
]
CHECK = """
import contextlib, io, json, sys
from obsdiff.cli.main import main
found = []
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(args)
            code = 0
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue()])
print(json.dumps([found, sorted({"torch", "diffusers", "lightning", "transformers", "scipy"} & set(sys.modules))]))
"""


def test_mistakes_import_neither_torch_nor_diffusers(tmp_path):
    done = subprocess.run([sys.executable, "-c", CHECK, json.dumps(MISTAKES)], capture_output=True, text=True,
                          check=True, cwd=tmp_path)  # fmt: skip
    found, imported = json.loads(done.stdout)
    assert imported == []
    for args, (code, said) in zip(MISTAKES, found, strict=True):
        assert code == 2 and said.startswith("obsdiff") and said.count("\n") == 1, (args, said)
    assert list(tmp_path.iterdir()) == []


def test_light_names_match_the_tables():
    from obsdiff import names
    from obsdiff.allocation import request
    from obsdiff.bench.presets import PRESETS
    from obsdiff.criteria import METHODS
    from obsdiff.criteria.structured import RULES
    from obsdiff.evaluation.alignment import READERS
    from obsdiff.obs import sweep
    from obsdiff.obs.precision import SWITCHES
    from obsdiff.obs.structured import FUSIONS

    assert tuple(METHODS) == names.METHODS
    assert tuple(name for name, method in METHODS.items() if method.structured) == names.STRUCTURED_METHODS
    assert tuple(name for name, method in METHODS.items() if method.compared) == names.SWEEPING_METHODS
    assert sweep.SUB_BLOCK == names.SUB_BLOCK
    assert tuple(name for name, method in METHODS.items() if method.solve is None) == names.UNIT_METHODS
    assert {method.structured for method in METHODS.values()} - {None} == set(RULES)
    assert {method.allocation for method in METHODS.values()} <= set(names.ALLOCATIONS)
    assert tuple(FUSIONS) == names.FUSIONS
    assert tuple(PRESETS) == names.PRESETS
    assert tuple(READERS) == names.ALIGNMENTS
    assert all(files("obsdiff.data.assets").joinpath(name, "model_index.json").is_file() for name in names.EMBEDDED)
    assert {preset.work.dtype for preset in PRESETS.values()} <= set(names.DTYPES)
    assert tuple(SWITCHES) == names.PRECISIONS
    assert set(request.KINDS) == {"sparsity", "parameters", "bytes", "flops", "latency"}


def test_train_knows_lightnings_own_options():
    """The first part of each option and each subcommand, which are refused before Lightning is imported."""
    from lightning.pytorch.cli import LightningCLI

    from obsdiff.cli.train import command_line
    from obsdiff.cli.train_arguments import ROOTS, SUBCOMMANDS

    assert tuple(LightningCLI.subcommands()) == SUBCOMMANDS
    seen = set()

    class Stop(Exception):
        pass

    class Parsers(command_line()):
        def parse_arguments(self, parser, args):
            for sub in self._subcommand_parsers.values():
                seen.update(name.lstrip("-").split(".")[0] for a in sub._actions for name in a.option_strings)
            raise Stop

    with pytest.raises(Stop):
        Parsers(args=["fit"])
    assert seen - {"h", "c"} <= set(ROOTS)
