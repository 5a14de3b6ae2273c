"""Stages that a reconstruction has finished (:mod:`obsdiff.pruning.kept`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from torch import nn

from obsdiff.files import remove_folder
from obsdiff.pruning.kept import KeptParts, check_kept

INDEX = "reconstruction.json"


@dataclass(frozen=True)
class StageError:
    """Relative squared error of a stage's outputs on calls that were not trained on, before and after.

    Attributes:
        before, after: The errors.
        time_s: Seconds that it took, in an earlier run where that finished it.
        passes: How often each of the other calls was begun in both stages, to solve it again.
    """

    before: float
    after: float
    time_s: float = 0.0
    passes: int = 0


def check_finished(folder: Path) -> None:
    """Refuse a place for stages that holds something else, or cannot be written.

    Raises:
        UserError: Naming it.
    """
    check_kept(folder, INDEX, "stages of a reconstruction")


def remove_finished(folder: Path) -> None:
    """Remove what was kept: the run that it was for is written."""
    remove_folder(folder, INDEX)


class Finished:
    """Weights of stages.

    Args:
        folder: Where.
        key: Hash of everything that they depend on.
        stages: Their names, in their order.
    """

    def __init__(self, folder: Path, key: str, stages: Sequence[str]) -> None:
        self._parts = KeptParts(folder, INDEX, key, stages)

    def load(self, name: str, stage: nn.Module) -> StageError | None:
        """Give a stage the weights that it was trained to; None and untouched if it was not finished."""
        if name not in self._parts:
            return None
        said, state = self._parts.read(name)
        stage.load_state_dict(state)
        return StageError(*json.loads(said["error"]))

    def save(self, name: str, stage: nn.Module, error: StageError) -> None:
        """Keep a stage that is finished.

        Raises:
            UserError: It cannot be written.
        """
        self._parts.write(name, stage.state_dict(), {"error": json.dumps(astuple(error))})
