"""What obsdiff remembers of a pipeline beside diffusers' own configuration."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obsdiff.errors import UserError
from obsdiff.files import FILES, read_json, write_json
from obsdiff.names import ALIGNMENTS, EMBEDDED_PROMPTS

INFO_FILE = "obsdiff.json"
WHOLE = ("num_inference_steps", "height", "width", "max_sequence_length", "num_frames")
NUMBERS = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "frame_rate")
SWITCHES = ("use_resolution_binning",)
CALL_ARGUMENTS = (*WHOLE, *NUMBERS, *SWITCHES)
MOST = 2**16  # more of any of them is a slip, and would fill memory or never end
PROMPT_SETS = ("calibration", "evaluation")


@dataclass(frozen=True)
class PipelineInfo:
    """Source, call defaults and evaluation habits of a pipeline.

    Attributes:
        source: What the user called it: an embedded name, a folder, a hub id.
        call: The pipeline's own call defaults (``obsdiff.json`` beside the weights), over diffusers' defaults.
        alignment: What can read its images ("digits": the embedded classifier), or None.
        prompts: Default prompt sets, "calibration" and "evaluation": names of embedded ones, or files.
        manifest: ``pruning.json`` if it came out of a prune run.
        blocks: By list of the denoiser that lost some, the numbers that its blocks had in the dense model; None: it
            lost none, as far as is known.
    """

    source: str
    call: Mapping[str, Any] = field(default_factory=dict)
    alignment: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    blocks: Mapping[str, Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``obsdiff.json``, as long as it names no files (see :func:`write_info`)."""
        blocks = {} if self.blocks is None else {"blocks": {name: list(own) for name, own in self.blocks.items()}}
        return {"call": dict(self.call), "alignment": self.alignment, "prompts": dict(self.prompts), **blocks}


def write_info(info: PipelineInfo, folder: Path) -> None:
    """Write ``obsdiff.json`` into a pipeline's folder, and the prompt files that it names beside it."""
    content = info.to_json()
    for key, source in info.prompts.items():
        file = Path(source)
        if source not in EMBEDDED_PROMPTS and file.is_file():
            content["prompts"][key] = f"prompts-{key}{file.suffix}"
            shutil.copyfile(file, folder / content["prompts"][key])
    write_json(folder / INFO_FILE, content)


def read_info(folder: Path) -> dict[str, Any]:
    """``call``, ``alignment``, ``prompts`` and ``blocks`` of a pipeline's ``obsdiff.json``, as far as it gives them.

    The folder may come from anyone. A prompt set that it names is an embedded one or a file inside the folder, given
    here by its absolute path; another is left out with a warning, as only a user may name it.

    Raises:
        UserError: It is not what :func:`write_info` writes.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        return {}
    content = read_json(path, "obsdiff's pipeline information")
    known = _checked(content, ("call", "alignment", "prompts", "blocks", FILES), path, "the file")
    known.pop(FILES, None)  # what a folder that lists its files adds
    if "call" in known:
        for name, value in _checked(known["call"], CALL_ARGUMENTS, path, "call").items():
            _check_argument(name, value, path)
    alignment = known.get("alignment")
    if alignment is not None and alignment not in ALIGNMENTS:
        raise UserError(f"{path}: alignment is {_short(alignment)}; it must be null or {' or '.join(ALIGNMENTS)}")
    if "blocks" in known and not _are_blocks(known["blocks"]):
        raise UserError(
            f"{path}: blocks is {_short(known['blocks'])}; it must give, by list, the blocks' dense numbers"
        )
    if "prompts" in known:
        named = _checked(known["prompts"], PROMPT_SETS, path, "prompts")
        for key, value in named.items():
            if not isinstance(value, str) or not value:
                raise UserError(f"{path}: prompts.{key} is {_short(value)}; it must be the name of a prompt set")
        known["prompts"] = {key: own for key, name in named.items() if (own := _own_prompts(folder, name, path))}
    return known


def _are_blocks(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(own, list) and all(type(i) is int and i >= 0 for i in own) for own in lists)


def _checked(value: Any, keys: tuple[str, ...], path: Path, what: str) -> dict[str, Any]:
    """``value`` if it is an object with some of ``keys`` and no others."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is {_short(value)}; it must be an object with some of {', '.join(keys)}")
    if unknown := [key for key in value if key not in keys]:
        raise UserError(f"{path}: {what} has an unknown key {_short(unknown[0])}; known are {', '.join(keys)}")
    return dict(value)


def _check_argument(name: str, value: Any, path: Path) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise UserError(f"{path}: call.{name} is {_short(value)}; it must be true or false")
    elif name in NUMBERS:
        if not number or not -MOST <= value <= MOST:
            raise UserError(f"{path}: call.{name} is {_short(value)}; it must be a number from {-MOST} to {MOST}")
    elif not number or not isinstance(value, int) or not 1 <= value <= MOST:
        raise UserError(f"{path}: call.{name} is {_short(value)}; it must be a whole number from 1 to {MOST}")


def _own_prompts(folder: Path, name: str, path: Path) -> str | None:
    """The embedded set, or the file inside ``folder``, that ``name`` is; None and a warning for anything else."""
    if name in EMBEDDED_PROMPTS:
        return name
    try:
        file = (folder / name).resolve()
        if file.is_file() and file.is_relative_to(folder.resolve()):
            return str(file)
    except (OSError, ValueError, RuntimeError):  # overlong, with a NUL, or a loop of links
        pass
    warnings.warn(
        f"{path} names the prompts {_short(name)}, which are neither embedded nor a file in that folder; they are not "
        "used unless you name them yourself",
        stacklevel=2,
    )
    return None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a very long number"
    return text if len(text) <= 60 else text[:60] + "..."


def info_of(pipe: Any) -> PipelineInfo:
    """The information attached to ``pipe``, or what can be said of a pipeline made elsewhere."""
    found = pipe.__dict__.get("obsdiff_info")
    if isinstance(found, PipelineInfo):
        return found
    source = getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__
    file = Path(str(source)) / INFO_FILE  # diffusers alone may have loaded what was saved here
    blocks = read_json(file, "obsdiff's pipeline information").get("blocks") if file.is_file() else None
    return PipelineInfo(str(source), blocks=blocks if _are_blocks(blocks) else None)


def attach_info(pipe: Any, info: PipelineInfo) -> None:
    """Attach ``info`` to ``pipe``."""
    pipe.__dict__["obsdiff_info"] = info


def call_arguments(pipe: Any, **overrides: Any) -> dict[str, Any]:
    """Steps, guidance and size that a call of ``pipe`` uses: ``overrides`` that are not None over the pipeline's own
    defaults over those of its class."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {
        key: parameters[key].default
        for key in CALL_ARGUMENTS
        if key in parameters and parameters[key].default is not inspect.Parameter.empty
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    merged = {**defaults, **info_of(pipe).call, **given}
    return {key: value for key, value in merged.items() if value is not None}
