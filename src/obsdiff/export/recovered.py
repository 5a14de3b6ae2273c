"""The result of a recovery on disk: what a prune run leaves, with what training did and cost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.evaluation.evaluate import Images, evaluation_of
from obsdiff.evaluation.references import References
from obsdiff.export.figures import evaluation_table
from obsdiff.export.heatmap import draw_ratios
from obsdiff.export.places import finite, write_or_rescue
from obsdiff.export.report import draw_samples, steps_taken
from obsdiff.export.summary import depth_rows
from obsdiff.files import FILES, write_json, write_text
from obsdiff.memory import peak_memory_bytes
from obsdiff.models.released import doubles
from obsdiff.models.subject import graph_of, subject_of
from obsdiff.obs.pattern import parse_pattern
from obsdiff.obs.select import count_nonzero
from obsdiff.pruning.folder import MASKS, load_pipeline, write_pipeline_files
from obsdiff.pruning.manifest import FILE
from obsdiff.pruning.masks import broken_masks
from obsdiff.pruning.statistics import model_hash
from obsdiff.pruning.surgery import measured_sparsity
from obsdiff.versions import versions

RESULT, REPORT = "recovered", "report.json"
SHOWN = 8
EQUAL = (None, "uniform")  # rules that leave nothing to draw


def write_recovered(
    module: Any,
    state: Mapping[str, Tensor],
    images: Images | None,
    steps: int,
    loss: float | None,
    budget: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write the recovered pipeline into ``recovered`` under the module's output, whole or not at all.

    Args:
        module: The :class:`obsdiff.training.recovery.Recovery`.
        state: Its denoiser's whole state, adapters included, on the CPU.
        images: The evaluation's images with these weights.
        steps, loss: Optimizer steps, and the last loss.
        budget: Limits and costs.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: The place cannot be written, or a masked weight is not zero.
    """
    start = module.start
    pipe = load_pipeline(start.folder or start.dense, dtype="float32", parts=doubles(start.pipe))
    denoiser = subject_of(pipe).denoiser
    module.load_trained(denoiser, state)
    if broken := broken_masks(denoiser, start.masks):
        raise UserError(f"{len(broken)} layers, such as {broken[0]}, are not zero where masked; not exported")
    report = recovered_report(module, denoiser, images, steps, loss, budget)

    def write(folder: Path) -> None:
        write_pipeline_files(pipe, folder)
        if start.folder is not None:
            shutil.copyfile(start.folder / MASKS, folder / MASKS)
            manifest = {key: value for key, value in start.manifest.items() if key != FILES}
            manifest |= {"denoiser_sha256": model_hash(denoiser), "dtype": "float32"}
            manifest |= {"sparsity": report["sparsity"]["achieved"], "parameters": report["parameters"]}
            manifest["recovery"] = {"steps": steps, "objective": module.weights, "trained": vars(module.trained)}
            write_json(folder / FILE, manifest)
        write_json(folder / REPORT, finite(report))
        write_text(folder / "report.md", render_recovery(report))
        if report["rule"] not in EQUAL:
            title = f"{report['pipeline']}, {report['method']}, {start.manifest['budget']}"
            draw_ratios(folder / "ratios.png", graph_of(denoiser), start.manifest["sparsity_per_layer"], title)
        if images is not None:
            _draw(folder / "samples.png", module.frozen.refs, images, report)

    kept = f"the weights are in {module.output / 'checkpoints'}; fit --ckpt_path last writes the result again"
    replace = module.overwrite or module.resumed  # otherwise another run of the same output was faster
    write_or_rescue(module.output / RESULT, REPORT, replace, write, kept)
    return report


def recovered_report(
    module: Any, denoiser: Any, images: Images | None, steps: int, loss: float | None, budget: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The figures: those of the prune, then ``recovery`` and ``budget``."""
    manifest, refs = module.start.manifest, module.frozen.refs
    flops, dense_flops = module.frozen.flops
    parameters = list(denoiser.parameters())
    counts = {
        "dense": manifest.get("parameters", {}).get("dense", sum(p.numel() for p in parameters)),
        "pruned": sum(p.numel() for p in parameters),
        "nonzero": sum(map(count_nonzero, parameters)),
    }
    errors = manifest.get("layer_error", {})
    report: dict[str, Any] = {
        "pipeline": module.start.dense,
        **{key: manifest.get(key) for key in ("method", "pattern", "rule", "refit", "seed", "allocation")},
        "device": str(module.device),
        "versions": versions(),
        "calibration": manifest.get("statistics"),
        "notes": manifest.get("notes", []),
        "ranks": manifest.get("ranks", {}),
        "reconstruction": manifest.get("reconstruction"),
        "depth": manifest.get("depth"),
        "sparsity": {
            "achieved": _sparsity(denoiser, manifest, counts),
            "per_layer": manifest.get("sparsity_per_layer"),
        },
        "parameters": counts,
        "flops": {"dense": dense_flops, "pruned": flops},
        "layer_error": {"mean": sum(errors.values()) / len(errors) if errors else None, "per_layer": errors},
        "refit_steps": steps_taken(manifest.get("refit_steps", {})),
        "time_s": manifest.get("time_s"),
        "peak_memory_bytes": peak_memory_bytes(module.device),
        "objective": module.weights,
        "recovery": {"steps": steps, "loss": loss},
        "budget": budget,
        "evaluation": None,
    }
    if refs is not None and images is not None:
        drawn = {"dense": refs.dense, "pruned": refs.pruned, "recovered": images}
        report["evaluation"] = evaluation_of(module.validation.suite, refs.prompts, refs.seeds, drawn)
    return report


def _sparsity(denoiser: Any, manifest: Mapping[str, Any], counts: Mapping[str, int]) -> float | None:
    """What there is of the prune in the trained weights; None for a pipeline that was not pruned."""
    plan = {name: parse_pattern(pattern) for name, pattern in manifest.get("plan", {}).items()}
    if not plan and manifest.get("depth"):
        return 1 - counts["pruned"] / counts["dense"]
    return measured_sparsity(denoiser, plan, counts) if plan else None


def _draw(path: Path, refs: References, images: Images, report: Mapping[str, Any]) -> None:
    shown = min(SHOWN, len(refs.prompts))
    rows = {"dense": refs.dense.guided, "pruned": refs.pruned.guided, "recovered": images.guided}
    done = (
        "not pruned"
        if report["pattern"] is None
        else f"{report['sparsity']['achieved']:.0%} removed by {report['method']}"
    )
    title = f"{report['pipeline']}, {done}, recovered in {report['recovery']['steps']} steps"
    draw_samples(path, rows, refs.prompts[:shown], refs.seeds[:shown], title)


def render_recovery(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    recovery, budget, parameters = report["recovery"], report["budget"], report["parameters"]
    terms = ", ".join(f"{weight:g} x {name}" for name, weight in report["objective"].items())
    lines = [
        f"# {report['pipeline']} pruned to {report['pattern'] or 'nothing'} and recovered",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {recovery['steps']:,}, objective {terms} |",
        f"| denoiser parameters | {parameters['dense']:,} -> {parameters['pruned']:,}, "
        f"{parameters['nonzero']:,} of them not zero |",
        *(f"| {name} | {text} |" for name, text in depth_rows(report)),
        *(f"| note | {note} |" for note in report["notes"]),
        f"| versions | {', '.join(f'{key} {value}' for key, value in report['versions'].items())} |",
    ]
    if report["evaluation"] is not None:
        lines += ["", *evaluation_table(report["evaluation"])]
    if budget is not None:
        limits = ", ".join(f"{limit:g} {name}" for name, limit in budget["limit"].items()) or "none"
        lines += [
            "",
            f"Budget: {limits}.",
            "",
            "| spent on | steps | images | denoiser FLOPs | wall s |",
            "|---|---|---|---|---|",
        ]
        for stage, cost in budget["used"].items():
            lines.append(
                f"| {stage} | {cost['steps']:,.0f} | {cost['images']:,.0f} | {cost['denoiser_flops']:.3g} | "
                f"{cost['wall_s']:.1f} |"
            )
    if report["rule"] not in EQUAL:
        lines += ["", f"Sparsity allocated: {report['rule']}.", "", "![share removed by layer and block](ratios.png)"]
    if report["evaluation"] is not None:
        lines += ["", "![dense, pruned and recovered, same prompts and seeds](samples.png)"]
    return "\n".join(lines) + "\n"
