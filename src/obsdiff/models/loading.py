"""Opening pipelines: embedded by name, from a folder, from the hub, or passed through."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from obsdiff.errors import UserError
from obsdiff.models.info import INFO_FILE, PipelineInfo, attach_info, read_info
from obsdiff.models.register import register

EMBEDDED = ("digits-sd3",)
DTYPES = ("float32", "bfloat16", "float16")


def open_pipeline(
    source: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    manifest: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Any:
    """Load what diffusers loads, with obsdiff's information attached.

    Args:
        source: An embedded name, a folder with ``model_index.json``, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        device: Where it goes.
        manifest: ``pruning.json`` that belongs to it.
        name: What to call it in reports; the source by default.

    Raises:
        UserError: Nothing loadable is called so.
    """
    import torch
    from diffusers import DiffusionPipeline

    register()
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    folder = _resolve(str(source))
    known = read_info(Path(folder))
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    except Exception as error:  # diffusers, hub client and safetensors raise a dozen kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load pipeline {source}: {type(error).__name__}: {reason}") from error
    accepted = inspect.signature(type(pipe).__call__).parameters
    if foreign := [name for name in known.get("call", {}) if name not in accepted]:
        raise UserError(f"{Path(folder) / INFO_FILE}: {type(pipe).__name__} takes no {foreign[0]}; delete it there")
    attach_info(pipe, PipelineInfo(name or str(source), **known, manifest=manifest))
    pipe.set_progress_bar_config(disable=True)
    return to_device(pipe, device)


def to_device(pipe: Any, device: str) -> Any:
    """Move a pipeline, with a clear error for devices that are not there."""
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error


def _resolve(source: str) -> str:
    """The folder or hub id to load."""
    if source in EMBEDDED:
        folder = files("obsdiff.data.assets").joinpath(source)
        return str(folder)
    path = Path(source)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{source} is a folder without model_index.json; give a diffusers pipeline folder")
        return source
    looks_like_hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise UserError(
            f"unknown pipeline {source!r}; give an embedded name ({', '.join(EMBEDDED)}), a folder, or a hub id "
            "(owner/name)"
        )
    return source
