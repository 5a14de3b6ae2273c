"""What a run can go on from: checkpoints are looked at before anything is loaded, pruned or trained."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.serialization import skip_data

from obsdiff.errors import UserError
from obsdiff.pruning.manifest import FILE
from obsdiff.training.stage import PRUNED

LAST = "last*.ckpt"  # Lightning numbers further ones
KEYS = {"state_dict", "global_step", "loops", "callbacks"}
SHARDS, REST = ".metadata", "meta.pt"  # of a checkpoint that is a folder: the index of its shards, all but tensors


def check_resume(
    asked: str, folders: Sequence[Path], output: Path | None, root: Path, fitting: bool, trusted: bool = False
) -> Path | None:
    """See whether ``--ckpt_path`` names something to go on from.

    Args:
        asked: ``last``, a path, or what Lightning knows besides.
        folders: Where the run keeps its checkpoints.
        output: The folder of a recovery; None for other modules.
        root: Where Lightning looks for the checkpoints of a cluster that was about to end a job.
        fitting: Whether training goes on from it.
        trusted: The file may hold anything (``--weights_only false``), so only its checksums are looked at.

    Returns:
        The file, or folder of shards; None if Lightning resolves the name.

    Raises:
        UserError: There is nothing to go on from; says what else there is.
    """
    other = _otherwise(folders, output, fitting)
    if asked == "best":
        raise UserError(f"--ckpt_path best: which checkpoint is best is not known after a run has ended; {other()}")
    if asked == "hpc":
        if not list(root.glob("hpc_ckpt_*.ckpt")):
            raise UserError(f"--ckpt_path hpc: there is no hpc_ckpt_*.ckpt in {root}; {other()}")
        return None
    if asked.startswith("registry"):
        if find_spec("litmodels") is None:
            raise UserError(f"--ckpt_path {asked}: model registries need the package litmodels; {other()}")
        return None
    if "://" in asked:
        return None
    if asked == "last":
        found = sorted((path for folder in folders for path in folder.glob(LAST)), key=lambda p: p.stat().st_mtime)
        if not found:
            where = ", ".join(map(str, folders)) or "the folder of a ModelCheckpoint"
            raise UserError(f"--ckpt_path last: there is no checkpoint in {where}; {other()}")
        path = found[-1]
    else:
        path = Path(asked)
    if not path.exists():
        raise UserError(f"--ckpt_path {path} does not exist; {other(path)}")
    if path.is_dir() and not (path / SHARDS).exists():
        raise UserError(f"--ckpt_path {path} is a folder; name a file in it; {other(path)}")
    if wrong := damage(path, trusted):
        raise UserError(f"checkpoint {path} is {wrong}; {other(path)}")
    if output is not None and not trusted and "obsdiff" not in read_checkpoint(path):
        raise UserError(f"checkpoint {path} is not of a recovery; {other(path)}")
    return path


def damage(path: Path, trusted: bool = False) -> str | None:
    """What is wrong with a checkpoint file, or None; reads it once, and runs no code that is in it.

    Args:
        path: The file; or a folder of shards, as strategies of several processes write them: no tensor of it is read.
        trusted: Its content may be anything.
    """
    needed = KEYS
    if path.is_dir():
        path, needed = path / REST, KEYS - {"state_dict"}
        if not path.is_file():
            return f"damaged: it has no {REST}"
    if not zipfile.is_zipfile(path):
        return "damaged: truncated, or no checkpoint at all"
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                return f"damaged: {broken} has a wrong checksum"
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "no checkpoint but another kind of file"
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        return f"damaged: {error}"
    if trusted:
        return None
    try:
        found = read_checkpoint(path)
    except UserError as error:
        return str(error)
    if missing := sorted(needed - found.keys()):
        return f"not a checkpoint of a training run: it has no {', '.join(missing)}"
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but the numbers in its tensors: steps, callbacks, names.

    Raises:
        UserError: It holds other things than a checkpoint may.
    """
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    path = path / REST if path.is_dir() else path
    try:
        with skip_data():  # however large it is
            found = TorchCheckpointIO().load_checkpoint(path, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # names are taken too
    except Exception as error:  # unpickling raises whatever the bytes ask for
        reason = str(error).strip().splitlines()
        raise UserError(f"damaged: {type(error).__name__}{f', {reason[0][:100]}' if reason else ''}") from None
    if not isinstance(found, dict):
        raise UserError("no checkpoint but another kind of file")
    return found


def _otherwise(folders: Sequence[Path], output: Path | None, fitting: bool) -> Any:
    """A function that says what else there is to go on from."""

    def other(tried: Path | None = None) -> str:
        found = [path for folder in folders for path in sorted(folder.glob("*.ckpt"))]
        found = [path for path in found if path.is_file() or (path / SHARDS).exists()]
        whole = [path for path in found if (tried is None or not _same(path, tried)) and damage(path) is None]
        if whole:
            return f"there is {', '.join(map(str, whole))}"
        if not fitting:
            return "run fit first"
        if output is not None and (output / PRUNED / FILE).exists():
            return (
                f"the pruned pipeline in {output / PRUNED} is kept and is not pruned again: run fit without --ckpt_path"
            )
        return "run fit without --ckpt_path"

    return other


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()
