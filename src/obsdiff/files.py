"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obsdiff.errors import UserError, brief


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well, and vanishes otherwise.

    With ``replace`` an existing target is swapped out only after the new one is complete.

    Raises:
        UserError: The place cannot be written, or the disk is full.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        _swap_in(temporary, target, replace)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; choose another place or free some space"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(new: Path, target: Path, replace: bool) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (new, *new.rglob("*")):  # safetensors writes files that only their owner may read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if target.exists() and any(target.iterdir()):
        if not replace:
            raise UserError(f"{target} exists and is not empty; choose another folder or pass --overwrite true")
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / "was")
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old / "was", target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(new, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON; NaN and infinity are refused, since other readers refuse them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file that is supposed to be ``what``.

    Raises:
        UserError: It is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found; expected {what}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected {what}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{path} is not {what}: {brief(str(error))}") from None
