"""Command lines say what matters to their user: what libraries say besides is left out, by name.

Only the command lines use this; ``import obsdiff`` changes no filter. A warning that is not named here is shown, in one
line.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # bars of libraries, one for each part of each pipeline that is loaded or saved
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard's import
}

# of libraries: their users can do nothing about them, or have decided otherwise
CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
MESSAGES = (
    r"LightningCLI's args parameter is intended",  # our `obsdiff train` passes its arguments on
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"The '?\w+_dataloader'? does not have many workers",
    r"Checkpoint directory .* exists and is not empty",  # our own, on every run that goes on
    r"You called `self\.log\(.*no logger configured",
    r"Your `\w+_dataloader`'s sampler has shuffling enabled",
    r"You're resuming from a checkpoint that ended before the epoch ended",  # our loader goes on at the batch
    r"Precision .* is not supported by the model summary",
    r"Experiment logs directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
RECORDS = re.compile(
    r"\s*(Seed set to|(GPU|TPU|HPU) available: False|💡 Tip|Restoring states|Restored all states|Loaded model weights"
    r"|`Trainer\.\w+` stopped|Detected KeyboardInterrupt|Found \d+ module\(s\) in eval mode|Using .* Mixed Precision)"
)
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


class _Unless(logging.Filter):
    """Lets all records pass but those whose message begins as ``pattern``."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave out what is named above and show every other warning in one line, for as long as the block lasts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for category in CATEGORIES:
            warnings.filterwarnings("ignore", category=category, module=r"(?!obsdiff\b)")
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        warnings.showwarning = show_in_one_line
        for name in LOGGERS:
            logger, unless = logging.getLogger(name), _Unless(RECORDS)
            logger.addFilter(unless)
            stack.callback(logger.removeFilter, unless)
        yield


def show_in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as ``obsdiff: ...`` or ``torch: ...``, without the place in the code."""
    print(f"{source_of(filename)}: {' '.join(str(message).split())}", file=file or sys.stderr)


def source_of(filename: str) -> str:
    """The package that a file belongs to."""
    path = Path(filename).resolve()
    own = sys.modules["obsdiff"]
    roots: list[Any] = [*own.__path__, *(p for name in ("callbacks", "data") for p in _paths(f"obsdiff.{name}"))]
    if any(path.is_relative_to(Path(root).resolve()) for root in roots):
        return "obsdiff"
    parts = path.parts
    for place in ("site-packages", "dist-packages"):
        if place in parts:
            return Path(parts[len(parts) - parts[::-1].index(place)]).stem
    return "warning"


def _paths(module: str) -> list[str]:
    return list(getattr(sys.modules.get(module), "__path__", []))
