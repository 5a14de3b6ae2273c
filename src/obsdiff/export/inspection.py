"""What was done to a pruned pipeline, as text, read from its files without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.export.summary import dead_rows, depth_rows, reconstruction_rows
from obsdiff.pruning.folder import run_folder
from obsdiff.pruning.manifest import FILE, read_manifest
from obsdiff.pruning.planfile import kinds_of, parse_plan


def inspect_run(source: str | Path) -> str:
    """A header and one row per pruned layer or module: pattern, share removed, error, new shape.

    Args:
        source: The folder of a prune run, or a plan file.

    Raises:
        UserError: ``source`` is neither.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return _plan(source)
    folder = run_folder(source)
    if folder is None:
        raise UserError(f"{source} is not the folder of a prune run (no pruning.json beside a pipeline/)")
    manifest = read_manifest(folder)
    try:
        return _run(folder, manifest)
    except MALFORMED as error:
        raise UserError(f"{folder / FILE} is damaged: {brief(error)}") from error


def _run(folder: Path, manifest: dict[str, Any]) -> str:
    """A prune run as text."""
    parameters = manifest["parameters"]
    header = [
        f"{folder}: {manifest['pipeline']} ({manifest['denoiser']}), {manifest['pattern']} by {manifest['method']}"
        + (" with refit" if manifest["refit"] else ""),
        f"parameters {parameters['dense']:,} -> {parameters['pruned']:,}, {parameters['nonzero']:,} not zero; "
        f"sparsity {manifest['sparsity']:.4%}; seed {manifest['seed']}",
    ]
    if statistics := manifest["statistics"]:
        header.append(
            f"calibrated on {statistics['num_prompts']} prompts, {statistics['steps']} steps, guidance "
            f"{statistics['guidance_scale']}, {statistics['weighting']} weights, "
            + ("stage by stage" if manifest.get("streamed") else f"{manifest['packages']} pass(es)")
        )
    done = [*depth_rows(manifest), *dead_rows(manifest), *reconstruction_rows(manifest)]
    header += [f"{name}: {text}" for name, text in done]
    header += [f"note: {note}" for note in manifest.get("notes", [])]
    if manifest.get("rule", "uniform") != "uniform":
        header.append(f"allocation {manifest['rule']}, budget {manifest['budget']}")
    return "\n".join([*header, "", *_table(manifest)] if manifest["plan"] else header)


def _plan(source: str | Path) -> str:
    """A plan file as text."""
    plan, content = parse_plan(source)
    width = max(map(len, plan.entries), default=0)
    header = f"{source}: {content.get('denoiser', 'any denoiser')}, {plan.pattern}, allocation {plan.rule}, budget "
    header += f"{plan.budget or 'none'}; {len(plan.entries)} entries, {kinds_of(plan)}"
    header += f"; first {', '.join(plan.removed)} go" if plan.removed else ""
    return "\n".join([header, "", *(f"{name:<{width}}  {pattern}" for name, pattern in plan.entries.items())])


def _table(manifest: dict[str, Any]) -> list[str]:
    shrunk = manifest["shrunk"] or {}
    weights = {
        name.removesuffix(".weight"): shape for name, shape in shrunk.get("tensors", {}).items() if len(shape) > 1
    }
    shapes = {**shrunk.get("layers", {}), **weights}
    rows = [("name", "pattern", "removed", "error", "shape")]
    for name, pattern in manifest["plan"].items():
        removed = f"{manifest['sparsity_per_layer'][name]:.2%}"
        rows.append((name, pattern, removed, _error(manifest, name), ""))
        for layer, shape in shapes.items():
            if layer.startswith(name + "."):
                rows.append(("  " + layer, "", "", _error(manifest, layer), " x ".join(map(str, shape))))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _error(manifest: dict[str, Any], name: str) -> str:
    error = manifest["layer_error"].get(name)
    return "" if error is None else f"{error:.5f}"
