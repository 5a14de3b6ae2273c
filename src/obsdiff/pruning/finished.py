"""Stages that a reconstruction has finished, kept so that a run that was killed goes on with the first that is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from obsdiff.errors import MALFORMED
from obsdiff.files import FILES, check_folder, check_writable, remove_folder, whole_file, write_json
from obsdiff.ranks import rank, wait_for_all

INDEX = "reconstruction.json"


@dataclass(frozen=True)
class StageError:
    """Relative squared error of a stage's outputs on calls that were not trained on, before and after.

    Attributes:
        before, after: The errors.
        time_s: Seconds that it took, in an earlier run where that finished it.
    """

    before: float
    after: float
    time_s: float = 0.0


def check_finished(folder: Path) -> None:
    """Refuse a place for stages that holds something else, or cannot be written.

    Raises:
        UserError: Naming it.
    """
    check_folder(folder, INDEX, "stages of a reconstruction", replace=True)
    check_writable(folder)


def remove_finished(folder: Path) -> None:
    """Remove what was kept: the run that it was for is written."""
    remove_folder(folder, INDEX)


class Finished:
    """One file of weights for each stage, whole or not there; those of another key are removed.

    Every process reads what was there at the start, and the first one writes.

    Args:
        folder: Where.
        key: Hash of everything that the stages' weights depend on.
        stages: Their names, in their order.
    """

    def __init__(self, folder: Path, key: str, stages: Sequence[str]) -> None:
        self.key = key
        self._files = {name: folder / f"{number:03d}.safetensors" for number, name in enumerate(stages)}
        self._found = {name: error for name, file in self._files.items() if (error := self._error(file)) is not None}
        wait_for_all()  # before the first one writes
        if rank() == 0:
            if not self._found:
                remove_finished(folder)
            write_json(folder / INDEX, {"key": key, FILES: [INDEX, *(file.name for file in self._files.values())]})

    def load(self, name: str, stage: nn.Module) -> StageError | None:
        """Give a stage the weights that it was trained to; None and untouched if it was not finished."""
        if (error := self._found.get(name)) is None:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            stage.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        return error

    def save(self, name: str, stage: nn.Module, error: StageError) -> None:
        """Keep a stage that is finished.

        Raises:
            UserError: It cannot be written.
        """
        if rank() > 0:
            return
        state = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stage.state_dict().items()}
        said = {"key": self.key, "error": json.dumps([error.before, error.after, error.time_s])}
        with whole_file(self._files[name]) as temporary:
            save_file(state, temporary, said)

    def _error(self, file: Path) -> StageError | None:
        """Of a stage that was finished; None if the file is not there, damaged, or of something else."""
        with suppress(OSError, SafetensorError, *MALFORMED), safe_open(file, framework="pt") as content:
            said = content.metadata()
            if said["key"] == self.key:
                return StageError(*map(float, json.loads(said["error"])))
        return None
