"""Prune diffusion pipelines in one shot and get pipelines back that diffusers loads.

    pipe = obsdiff.load_pipeline("digits-sd3")
    stats = obsdiff.calibrate(pipe, obsdiff.load_prompts("digits-train", num=64))
    report = obsdiff.prune(pipe, "unstructured:0.5", statistics=stats)
    obsdiff.save_pipeline(pipe, "out", report)

Names are imported when they are first used, so that ``import obsdiff`` costs nothing; importing it also lets
``diffusers.DiffusionPipeline.from_pretrained`` load structurally pruned pipelines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from obsdiff.models.register import register

if TYPE_CHECKING:
    from obsdiff.allocation.allocate import allocate
    from obsdiff.data.prompts import load_prompts
    from obsdiff.errors import UserError
    from obsdiff.evaluation.sampling import sample
    from obsdiff.export.evaluate import evaluate
    from obsdiff.models.offload import offload
    from obsdiff.obs.pattern import NM, Structured, Unstructured, parse_pattern
    from obsdiff.pruning.calibrate import calibrate
    from obsdiff.pruning.folder import load_pipeline, save_pipeline
    from obsdiff.pruning.layers import SolveOptions
    from obsdiff.pruning.lora import load_lora
    from obsdiff.pruning.oneshot import prune
    from obsdiff.pruning.report import PruneReport
    from obsdiff.pruning.stream import stream

_HOME = {
    "NM": "obsdiff.obs.pattern",
    "PruneReport": "obsdiff.pruning.report",
    "SolveOptions": "obsdiff.pruning.layers",
    "Structured": "obsdiff.obs.pattern",
    "Unstructured": "obsdiff.obs.pattern",
    "UserError": "obsdiff.errors",
    "allocate": "obsdiff.allocation.allocate",
    "calibrate": "obsdiff.pruning.calibrate",
    "evaluate": "obsdiff.export.evaluate",
    "load_lora": "obsdiff.pruning.lora",
    "load_pipeline": "obsdiff.pruning.folder",
    "load_prompts": "obsdiff.data.prompts",
    "offload": "obsdiff.models.offload",
    "parse_pattern": "obsdiff.obs.pattern",
    "prune": "obsdiff.pruning.oneshot",
    "sample": "obsdiff.evaluation.sampling",
    "save_pipeline": "obsdiff.pruning.folder",
    "stream": "obsdiff.pruning.stream",
}

__all__ = [
    "NM",
    "PruneReport",
    "SolveOptions",
    "Structured",
    "Unstructured",
    "UserError",
    "allocate",
    "calibrate",
    "evaluate",
    "load_lora",
    "load_pipeline",
    "load_prompts",
    "offload",
    "parse_pattern",
    "prune",
    "sample",
    "save_pipeline",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'obsdiff' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


register()
