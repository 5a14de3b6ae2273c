"""``pruning.json``: what was done to a pipeline, enough to rebuild and to check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat

from obsdiff.errors import UserError
from obsdiff.files import read_json
from obsdiff.obs.pattern import Hybrid, Structured, of_layers, parse_pattern, parse_request
from obsdiff.pruning.report import PruneReport

FILE = "pruning.json"
FORMAT = 1

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=0)]


class _Parameters(BaseModel):
    dense: Size
    pruned: Size
    nonzero: Size


class _Calibration(BaseModel):
    num_prompts: Size
    steps: Size | None
    guidance_scale: FiniteFloat | None
    weighting: str


class _Shrunk(BaseModel):
    tensors: dict[str, list[Size]] = {}
    layers: dict[str, list[Size]] = {}  # as written until November 2026
    attributes: dict[str, dict[str, int | str | list[list[int] | int]]]


class _Depth(BaseModel):
    removed: Annotated[list[str], Field(min_length=1)]
    of: Size
    kept: dict[str, list[Size]]
    config: dict[str, dict[str, int | list[Size]]]
    model: str
    errors: list[FiniteFloat] = []
    alone: dict[str, FiniteFloat] = {}
    triples: Size = 0
    denoiser_calls: Size = 0


class Manifest(BaseModel):
    """What a manifest must hold, for those that read it as the plain dictionary that it is."""

    format: int
    pipeline: str | None = None
    component: str
    denoiser: str
    denoiser_sha256: str
    dtype: Literal["float32", "bfloat16", "float16"]
    pattern: str
    method: str
    refit: bool
    seed: int
    packages: Annotated[int, Field(ge=1)]
    streamed: bool = False
    weighing_calls: Size = 0
    plan: dict[str, str]
    rule: str = "uniform"
    budget: str | None = None
    allocation: dict[str, Any] | None = None
    sparsity: Share
    sparsity_per_layer: dict[str, Share]
    layer_error: dict[str, FiniteFloat]
    refit_steps: dict[str, Size] = {}
    parameters: _Parameters
    time_s: dict[str, FiniteFloat]
    statistics: _Calibration | None = None
    shrunk: _Shrunk | None
    notes: list[str] = []
    dead: dict[str, Literal["left", "zero", "cut"]] = {}
    ranks: dict[str, dict[str, FiniteFloat | Literal["rank", "lowrank"]]] = {}
    reconstruction: dict[str, Any] | None = None
    depth: _Depth | None = None


def manifest_of(report: PruneReport, source: str, component: str, denoiser: str) -> dict[str, Any]:
    """The manifest of a prune.

    Args:
        report: What was done.
        source: The pipeline it was done to.
        component: Name of the denoiser in the pipeline.
        denoiser: Its dense class.
    """
    from obsdiff.versions import versions

    return {
        "format": FORMAT,
        "pipeline": source,
        "component": component,
        "denoiser": denoiser,
        "pattern": str(report.pattern),
        "method": report.method,
        "refit": report.refit,
        "seed": report.seed,
        "packages": report.packages,
        "streamed": report.streamed,
        "weighing_calls": report.weighing_calls,
        "plan": {name: str(pattern) for name, pattern in report.plan.entries.items()},
        "rule": report.plan.rule,
        "budget": report.plan.budget,
        "allocation": report.allocation,
        "sparsity": report.sparsity,
        "sparsity_per_layer": report.sparsity_per_layer,
        "layer_error": report.layer_error,
        "refit_steps": report.refit_steps,
        "parameters": report.parameters,
        "time_s": report.time_s,
        "statistics": report.fingerprint,
        "shrunk": report.shrunk,
        "notes": report.notes,
        "dead": report.dead,
        "ranks": report.ranks,
        "reconstruction": report.reconstruction,
        "depth": report.depth,
        "versions": versions(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a prune run's folder.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path = folder / FILE
    manifest: dict[str, Any] = read_json(path, "the manifest of a prune run", Manifest)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']}; this version reads {FORMAT}")
    texts = {"": manifest["pattern"], **manifest["plan"]}
    patterns = {name: _pattern(path, text, not name) for name, text in texts.items()}
    kinds = {isinstance(pattern, Structured) for name, pattern in patterns.items() if name}
    wanted = {True, False} if isinstance(patterns[""], Hybrid) else {isinstance(patterns[""], Structured)}
    if kinds - wanted:
        raise UserError(f"{path} is not the manifest of a prune run: its plan mixes structured and other patterns")
    if patterns[""] is None and manifest.get("depth") is None:
        raise UserError(f"{path} is not the manifest of a prune run: it does not say which stages are removed")
    needed = patterns[""] is not None
    if bool(manifest["plan"]) is not needed or manifest["plan"].keys() != manifest["sparsity_per_layer"].keys():
        raise UserError(f"{path} is not the manifest of a prune run: plan and sparsity_per_layer name other layers")
    return manifest


def _pattern(path: Path, text: str, whole: bool) -> Any:
    try:
        return of_layers(parse_request(text)) if whole else parse_pattern(text)
    except UserError as error:
        raise UserError(f"{path} is not the manifest of a prune run: {error}") from None
