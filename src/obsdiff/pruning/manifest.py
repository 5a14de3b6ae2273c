"""``pruning.json``: what was done to a pipeline, enough to rebuild and to check it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obsdiff.errors import UserError
from obsdiff.files import read_json
from obsdiff.pruning.oneshot import PruneReport

FILE = "pruning.json"
FORMAT = 1


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
        "plan": {name: str(pattern) for name, pattern in report.plan.entries.items()},
        "rule": report.plan.rule,
        "budget": report.plan.budget,
        "allocation": report.allocation,
        "sparsity": report.sparsity,
        "sparsity_per_layer": report.sparsity_per_layer,
        "layer_error": report.layer_error,
        "parameters": report.parameters,
        "time_s": report.time_s,
        "statistics": report.fingerprint,
        "shrunk": report.shrunk,
        "versions": versions(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a prune run's folder.

    Raises:
        UserError: There is none, or it is damaged.
    """
    manifest = read_json(folder / FILE, "the manifest of a prune run")
    needed = {"format", "pattern", "method", "component", "denoiser_sha256", "dtype", "plan", "shrunk"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise UserError(f"{folder / FILE} is not the manifest of a prune run")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder / FILE} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest
