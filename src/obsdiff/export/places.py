"""Where a run's files go: refused before any work if they cannot, rescued if writing them fails at the end."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from obsdiff.errors import UserError
from obsdiff.files import check_apart, check_writable, whole_folder
from obsdiff.pruning.folder import check_output
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.statistics import check_store


def check_places(options: PruneOptions) -> None:
    """Refuse folders that hold something else, lie in one another, or cannot be written.

    Raises:
        UserError: Naming the folder.
    """
    output = Path(options.output)
    statistics, sensitivity = (None if p is None else Path(p) for p in (options.statistics, options.sensitivity))
    check_apart(output=output, statistics=statistics, sensitivity=sensitivity)
    check_output(output, options.overwrite)
    if statistics is not None:
        check_store(statistics)
    if sensitivity is not None:
        check_writable(sensitivity)


def pipeline_bytes(pipe: Any) -> int:
    """What the weights of a pipeline take on disk."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(t.numel() * t.element_size() for model in models for t in model.state_dict().values())


def write_or_rescue(target: Path, index: str, replace: bool, write: Callable[[Path], None], kept: str) -> None:
    """Write a finished run, whole; where its place fails, to the system's temporary folder, so that no work is lost.

    Args:
        target, index, replace: See :func:`obsdiff.files.whole_folder`.
        write: Writes the run into the folder that it is given.
        kept: For people: what is there to go on from if nothing can be written at all.

    Raises:
        UserError: The target could not be written; says where the run lies instead, or what is kept.
    """
    try:
        with whole_folder(target, index, replace=replace) as folder:
            write(folder)
    except UserError as error:
        other = Path(tempfile.gettempdir()) / f"obsdiff-{target.name}-{os.getpid()}"
        try:
            with whole_folder(other, index) as folder:
                write(folder)
        except UserError:
            raise UserError(f"{error}; {kept}") from error
        raise UserError(f"{error}; the finished run lies in {other} instead, move it from there") from error


def finite(value: Any) -> Any:
    """The same figures for JSON: None in place of those that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
