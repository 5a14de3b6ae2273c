"""What the command lines leave out of libraries' talk, and what they show."""

import logging
import subprocess
import sys
import types
import warnings

import pytest

from obsdiff.cli.main import main
from obsdiff.quiet import quiet_libraries, source_of


def warn_from(module, message, category):
    """Warn as if the module's code did."""
    found = types.ModuleType(module)
    code = compile("import warnings\nwarnings.warn(message, category)", f"/x/site-packages/{module}/part.py", "exec")
    exec(code, vars(found) | {"message": message, "category": category})


@pytest.mark.parametrize(
    ("module", "message", "category"),
    [
        ("torch", "f is deprecated", FutureWarning),
        ("diffusers", "f is deprecated", DeprecationWarning),
        (
            "lightning",
            "The number of training batches (6) is smaller than the logging interval Trainer(...",
            UserWarning,
        ),
        ("lightning", "The 'train_dataloader' does not have many workers which may be a bottleneck.", UserWarning),
    ],
)
def test_known_noise_is_left_out(capsys, module, message, category):
    with quiet_libraries():
        warn_from(module, message, category)
    assert capsys.readouterr().err == ""


def test_other_warnings_are_one_line_each(capsys):
    with quiet_libraries():
        warn_from("torch", "something is odd\n  with this tensor", UserWarning)
        warnings.warn_explicit("overflow in exp", RuntimeWarning, "/x/site-packages/scipy/linalg.py", 3)
    assert capsys.readouterr().err.splitlines() == [
        "torch: something is odd with this tensor",
        "scipy: overflow in exp",
    ]


def test_our_own_warnings_stay(capsys):
    import torch

    from obsdiff.obs.linalg import inverse

    with quiet_libraries():
        inverse(torch.diag(torch.tensor([1.0, 1.0, -0.05])))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("obsdiff: ") and "not positive definite" in line


def test_lightning_says_what_matters_only(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level("INFO", logger.name), quiet_libraries():
        for text in ("GPU available: False, used: False", "💡 Tip: try litlogger", "Seed set to 0"):
            logger.info(text)
        for text in ("GPU available: True (cuda), used: False", "Trainer will use only 1 of 8 GPUs"):
            logger.info(text)
    assert [record.message[:20] for record in caplog.records] == ["GPU available: True ", "Trainer will use onl"]


def test_nothing_stays_changed_and_importing_changes_nothing():
    before, showing = list(warnings.filters), warnings.showwarning
    with quiet_libraries():
        assert warnings.filters != before
    assert warnings.filters == before and warnings.showwarning is showing
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    assert not logger.filters
    check = "import warnings; n = list(warnings.filters); import obsdiff; print(warnings.filters == n)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "True\n"


def test_files_are_known_by_their_package():
    import obsdiff.callbacks.mask
    import obsdiff.data.images

    for module in (obsdiff, obsdiff.callbacks.mask, obsdiff.data.images):
        assert source_of(module.__file__) == "obsdiff"
    assert source_of("/venv/lib/python3.11/site-packages/torch/nn/functional.py") == "torch"
    assert source_of("/venv/lib/python3.11/site-packages/six.py") == "six"
    assert source_of("/home/me/script.py") == "warning"


def test_no_command_ignores_all_warnings(capsys, monkeypatch):
    """``obsdiff bench train`` once did."""
    from obsdiff.bench import train as training

    def measured(*_):
        warnings.warn_explicit("a real problem", UserWarning, "/x/site-packages/torch/a.py", 3)
        return {"figure": 1}

    monkeypatch.setattr(training, "bench_train", measured)
    main(["bench", "train"])
    said = capsys.readouterr()
    assert said.out == '{"figure": 1}\n' and said.err == "torch: a real problem\n"
