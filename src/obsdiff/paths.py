"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path

from obsdiff.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux and macOS file systems


def user_path(path: str | Path, option: str) -> Path:
    """The path that a user gave for an option, ``~`` filled in.

    Raises:
        UserError: It is empty, or no file system can hold it.
    """
    text = str(path)
    if not text.strip():
        raise UserError(f"{option} is empty; give a path")
    if "\0" in text:
        raise UserError(f"{option} holds a null character; no file is called so")
    if text.startswith("~"):
        filled = os.path.expanduser(text)
        if filled.startswith("~"):
            raise UserError(f"{option} is {text[:80]!r}, but there is no such user; write ./{text[:80]} for a file")
        text = filled
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    if len(os.fsencode(text)) > LONGEST_PATH or longest > LONGEST_NAME:
        raise UserError(f"{option} is too long a name for a file ({len(text)} characters: {text[:40]}...)")
    return Path(text)


def new_folder(path: str | Path, option: str) -> Path:
    """The path of a folder that a run is going to make, or to replace as a whole.

    Raises:
        UserError: As :func:`user_path`; or it is the current folder, one that holds it, or the root, which cannot be
            replaced.
    """
    found = user_path(path, option)
    whole, here = Path(os.path.abspath(found)), Path.cwd()
    if whole == here or whole in here.parents:
        raise UserError(f"{option} is {path}, which holds the current folder; give a folder of its own")
    return found


def unfinished_stages(output: str) -> Path:
    """Where a prune run keeps the stages that its reconstruction has finished, until the run is written: beside it."""
    return _beside(output, "reconstruction")


def unfinished_solves(output: str) -> Path:
    """The same for the layers that it has solved."""
    return _beside(output, "solved")


def unfinished_recording(folder: Path) -> Path:
    """The same for what a recording of trajectories has drawn."""
    return _beside(str(folder), "recording")


def _beside(output: str, what: str) -> Path:
    target = Path(os.path.realpath(output))
    return target.with_name(f".{target.name}.{what}")
