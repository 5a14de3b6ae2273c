"""Parts of a long piece of work, kept as they are finished, so that a run that was killed goes on with the first that
is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obsdiff.files import FILES, check_folder, check_writable, remove_folder, whole_file, write_json
from obsdiff.ranks import rank, wait_for_all


class KeptParts:
    """One file of tensors for each part, whole or not there; those of another key are removed.

    Every process reads what was there at the start, and the first one writes, or each its own.

    Args:
        folder: Where.
        index: Name of the file in it that lists its files.
        key: Hash of everything that the parts depend on.
        parts: Their names, in their order.
    """

    def __init__(self, folder: Path, index: str, key: str, parts: Sequence[str]) -> None:
        self.key = key
        self._files = {name: folder / f"{number:03d}.safetensors" for number, name in enumerate(parts)}
        self.look_again()
        wait_for_all()  # before the first one writes
        if rank() == 0:
            if not self._said:
                remove_folder(folder, index)
            write_json(folder / index, {"key": key, FILES: [index, *(file.name for file in self._files.values())]})
        wait_for_all()  # before another one puts something there, too

    def look_again(self) -> None:
        """Count what was written since, by any process, as there."""
        self._said = {name: said for name, file in self._files.items() if (said := self._said_in(file)) is not None}

    def __contains__(self, name: str) -> bool:
        """Whether a part was there at the start."""
        return name in self._said

    def __len__(self) -> int:
        """How many were there."""
        return len(self._said)

    def read(self, name: str) -> tuple[Mapping[str, str], dict[str, Tensor]]:
        """What was said of a part that was there, and its tensors, mapped: memory takes what is looked at."""
        with safe_open(self._files[name], framework="pt") as file:
            return self._said[name], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def write(self, name: str, tensors: Mapping[str, Tensor], said: Mapping[str, str], own: bool = False) -> None:
        """Keep a part that is finished.

        Args:
            name: The part.
            tensors: What it is.
            said: What is to be known of it.
            own: It is this process's alone; else all have it, and the first one writes.

        Raises:
            UserError: It cannot be written.
        """
        if rank() > 0 and not own:
            return
        there = {key: _alone(tensor.detach().cpu().contiguous()) for key, tensor in tensors.items()}
        with whole_file(self._files[name]) as temporary:
            save_file(there, temporary, {"key": self.key, **said})

    def _said_in(self, file: Path) -> dict[str, str] | None:
        """None if the file is not there, damaged, or of something else."""
        with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as content:
            said: dict[str, str] = content.metadata() or {}
            if said.get("key") == self.key:
                return said
        return None


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that shares no memory with another one of the same storage, which safetensors refuses."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_kept(folder: Path, index: str, what: str) -> None:
    """Refuse a place for parts that holds something else, or cannot be written.

    Raises:
        UserError: Naming it.
    """
    check_folder(folder, index, what, replace=True)
    check_writable(folder)
