"""Files and folders that appear whole or not at all, and replace nothing but what we wrote.

Everything is written under a temporary name beside its target (so that the last step is a rename, never a copy between
disks), flushed, then renamed. The temporary name tells the process that writes; what a killed one left is removed by
the next that writes there. A folder of ours holds an index, a JSON file that lists all its files under ``files``: only
listed files are ever replaced or removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsdiff.errors import UserError, brief

if TYPE_CHECKING:
    from pydantic import BaseModel

FILES = "files"  # the key of an index under which it lists the files of its folder
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_PART = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\w+\.(?:part|old)")
_ABANDONED_S = 86_400.0  # another machine's unfinished write of this age is taken for dead


# ---- writing


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its name when the block ends well, and vanishes otherwise.

    What was there before stays until the new file is whole and on the disk.

    Raises:
        UserError: The place cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    with clear_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=".part", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _publish(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, index: str, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well, and vanishes otherwise.

    Args:
        target: New, empty, or (with ``replace``) an earlier folder of the same kind.
        index: The JSON file, written by the block, that will list the folder's files.
        replace: Swap an earlier folder out, once the new one is complete; its listed files are removed.

    Raises:
        UserError: The place cannot be written, the disk is full, or the target holds anything that is not ours.
    """
    target = Path(os.path.realpath(target))
    with clear_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target, index)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".part", dir=target.parent))
        try:
            yield temporary
            content = read_json(temporary / index, "an index")
            write_json(temporary / index, {**content, FILES: _files_in(temporary)})
            for path in (*temporary.rglob("*"), temporary):
                _publish(path)
            _swap_in(temporary, target, index, replace)
            _flush(target.parent)
        except UserError as error:
            if str(temporary) not in str(error):
                raise
            # a file inside could not be written, and the name that it had is nobody's any more
            raise UserError(str(error).replace(str(temporary), str(target))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that vanishes with the block; what killed processes left there goes first.

    Raises:
        UserError: The place cannot be written.
    """
    target = Path(os.path.realpath(target))
    with clear_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".part", dir=target.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(new: Path, target: Path, index: str, replace: bool) -> None:
    check_folder(target, index, "a finished run", replace=replace)
    if not _occupied(target):
        os.replace(new, target)
        return
    old = new.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove_listed(old, index)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinity are refused, since other readers refuse them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _prefix(target: Path) -> str:
    return f".{target.name}.{_HOST}-{os.getpid()}-"


def _publish(path: Path) -> None:
    """Give a file or folder the permissions that the user's umask asks for (temporary ones are private), and flush."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    _flush(path)


def _flush(path: Path) -> None:
    """Have the disk hold what was written; folders only where their file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def clear_failures(target: Path) -> Iterator[None]:
    """Turn what operating system and safetensors say of a failed write into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {target}: {reason}; choose another place or free some space") from error
    except Exception as error:
        # safetensors is not imported for it: this module is part of a light start
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"cannot write {target}: {error}; choose another place or free some space") from error


# ---- what is ours


def check_folder(target: Path, index: str, what: str, *, replace: bool, hint: str = "--overwrite true") -> None:
    """Refuse a place for a folder that holds anything but, if it may be replaced, an earlier one and nothing else.

    What a killed process left of an unfinished write to one of its files is no reason, and is removed.

    Args:
        target: The place.
        index: Name of the index that a folder of this kind has.
        what: The kind, such as "a prune run".
        replace: Whether an earlier one may be replaced.
        hint: The option that allows it.

    Raises:
        UserError: It holds something else.
    """
    with clear_failures(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} exists and is not a folder; choose another place")
        if os.path.ismount(target):
            raise UserError(f"{target} is where a disk is mounted, which cannot be replaced; choose a folder inside it")
        for name in (index, *(_listed(target, index) or ())):
            remove_leftovers(target / name)
        if not _occupied(target):
            return
        listed, there = _listed(target, index), _files_in(target)
    if listed is None:
        raise UserError(f"{target} exists and holds something else than {what}; choose another place")
    if foreign := sorted(set(there) - listed):
        raise UserError(
            f"{target} holds {what}, and {len(foreign)} file{'s' * (len(foreign) > 1)} that it did not write, such as "
            f"{foreign[0]}; move them away or choose another place"
        )
    if not replace:
        raise UserError(f"{target} holds {what} already; choose another place or pass {hint}")


def check_writable(*places: Path) -> None:
    """Refuse places where nothing can be written; nothing is left there.

    Raises:
        UserError: One cannot be written.
    """
    for place in places:
        with clear_failures(place):
            folder = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
            if not folder.is_dir():
                raise UserError(f"cannot write {place}: {folder} is not a folder; choose another place")
            with tempfile.NamedTemporaryFile(prefix=_prefix(place), suffix=".part", dir=folder):
                pass  # under the name that a write uses: some names leave no room for it


def check_apart(**places: Path | None) -> None:
    """Refuse folders that lie in one another: each is written, and replaced, as a whole.

    Args:
        places: By the name of their option; None where the user named none.

    Raises:
        UserError: Two are the same, or one holds another.
    """
    named = [
        (f"--{name} {place}", Path(os.path.realpath(place))) for name, place in places.items() if place is not None
    ]
    for at, (name, place) in enumerate(named):
        for other, around in named[:at] + named[at + 1 :]:
            if place == around or around in place.parents:
                where = "the same as" if place == around else "inside"
                raise UserError(f"{name} is {where} {other}, which is written as a whole; choose a folder outside it")


def check_space(place: Path, needed_bytes: int) -> None:
    """Refuse a disk with less room than is needed.

    Raises:
        UserError: Naming both sizes.
    """
    with clear_failures(place):
        folder = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"writing {place} takes about {needed_bytes / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB "
            "left; free some space or choose another place"
        )


def remove_folder(folder: Path, index: str) -> None:
    """Remove a folder of ours: its listed files, and then what is empty."""
    if folder.is_dir():
        _remove_listed(folder, index)


def remove_leftovers(target: Path, index: str | None = None) -> None:
    """Remove what killed processes left of unfinished writes to ``target``.

    An earlier folder that was already moved aside when its successor's writer died is put back.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        match = _PART.fullmatch(path.name)
        if match is None or _alive(path, match["host"], int(match["pid"])):
            continue
        with suppress(FileNotFoundError):  # another process may be cleaning up as well
            if path.suffix == ".part":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif not _occupied(target):
                os.replace(path, target)
            elif index is not None:
                _remove_listed(path, index)


def _alive(path: Path, host: str, pid: int) -> bool:
    """Whether the process that writes ``path`` may still be at it."""
    if host != _HOST:
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime < _ABANDONED_S
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return True
    except PermissionError:
        pass  # somebody else's process
    return True


def _occupied(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _files_in(folder: Path) -> list[str]:
    """Everything in a folder that is not a folder itself, by relative name."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def _listed(folder: Path, index: str) -> set[str] | None:
    """The files that a folder's index lists; None without one."""
    with suppress(UserError, TypeError, KeyError):
        return {str(name) for name in read_json(folder / index, "an index")[FILES]}
    return None


def _remove_listed(folder: Path, index: str) -> None:
    for name in (_listed(folder, index) or set()).intersection(_files_in(folder)):
        (folder / name).unlink(missing_ok=True)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with suppress(OSError):  # not empty: somebody else's file is in it
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


# ---- reading


def read_json(path: Path, what: str, schema: type[BaseModel] | None = None) -> Any:
    """Parse a JSON file that is supposed to be ``what``.

    Args:
        path: The file.
        what: For errors.
        schema: What it must hold, checked strictly; further keys are allowed.

    Raises:
        UserError: It cannot be read, is not JSON, or does not fit the schema.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{path} not found; expected {what}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected {what}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{path} is not {what}: {brief(str(error))}") from None
    if schema is not None:
        from pydantic import ValidationError

        try:
            schema.model_validate(content, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "its content"
            raise UserError(f"{path} is not {what}: {brief(where)}: {first['msg']}") from None
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
