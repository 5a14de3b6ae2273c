"""What obsdiff remembers of a pipeline beside diffusers' own configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INFO_FILE = "obsdiff.json"
CALL_ARGUMENTS = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")


@dataclass(frozen=True)
class PipelineInfo:
    """Source, call defaults and evaluation habits of a pipeline.

    Attributes:
        source: What the user called it: an embedded name, a folder, a hub id.
        call: The pipeline's own call defaults (``obsdiff.json`` beside the weights), over diffusers' defaults.
        alignment: "digits" where the embedded classifier can read its images, or None.
        prompts: Default prompt sets: "calibration", "evaluation".
        manifest: ``pruning.json`` if it came out of a prune run.
    """

    source: str
    call: Mapping[str, Any] = field(default_factory=dict)
    alignment: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``obsdiff.json``."""
        return {"call": dict(self.call), "alignment": self.alignment, "prompts": dict(self.prompts)}


def info_of(pipe: Any) -> PipelineInfo:
    """The information attached to ``pipe``, or what can be said of a pipeline made elsewhere."""
    found = pipe.__dict__.get("obsdiff_info")
    if isinstance(found, PipelineInfo):
        return found
    source = getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__
    return PipelineInfo(str(source))


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
