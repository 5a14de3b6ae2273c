"""``report.json`` for programs, ``report.md`` and ``samples.png`` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from obsdiff.export.figures import evaluation_table
from obsdiff.export.summary import dead_rows, depth_rows, rank_rows, reconstruction_rows


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: what was done, the figures, the layers that lost most."""
    sparsity, parameters, flops = report["sparsity"], report["parameters"], report["flops"]
    rows = [
        ("pipeline", report["pipeline"]),
        ("pattern", f"{report['pattern']} by {report['method']}{' with refit' if report['refit'] else ''}"),
        ("sparsity achieved", f"{sparsity['achieved']:.4%} (requested {sparsity['requested']:.4%})"),
        (
            "denoiser parameters",
            f"{parameters['dense']:,} -> {parameters['pruned']:,}, {parameters['nonzero']:,} of them not zero",
        ),
        ("FLOPs per denoiser call", f"{flops['dense'] / 1e9:.4g} G -> {flops['pruned'] / 1e9:.4g} G"),
        ("mean layer error", _number(report["layer_error"]["mean"])),
    ]
    if (steps := report["refit_steps"]) is not None:
        rows.append(("refit steps by layer", f"{steps['min']} to {steps['max']}, median {steps['median']:g}"))
    rows += [*depth_rows(report), *rank_rows(report), *reconstruction_rows(report), *dead_rows(report)]
    rows += [("note", note) for note in report["notes"]]
    rows += _allocation_rows(report)
    rows += [
        ("time", ", ".join(f"{key} {value:.1f} s" for key, value in report["time_s"].items())),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB on {report['device']}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in report["versions"].items())),
    ]
    lines = [f"# {report['pipeline']} pruned to {report['pattern']}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows]
    if report["evaluation"] is not None:
        lines += ["", "## Quality", "", *evaluation_table(report["evaluation"])]
    errors = report["layer_error"]["per_layer"]
    if errors:
        lines += ["", "## Layers that lost most", "", "| layer | relative output error |", "|---|---|"]
        worst = sorted(errors.items(), key=lambda item: -item[1])[:10]
        lines += [f"| `{name}` | {error:.5f} |" for name, error in worst]
    if report["rule"] != "uniform":
        lines += ["", "![share removed by layer and block](ratios.png)"]
    if report["evaluation"] is not None:
        lines += ["", "![dense and pruned, same prompts and seeds](samples.png)"]
    return "\n".join(lines) + "\n"


def steps_taken(by_layer: Mapping[str, int]) -> dict[str, Any] | None:
    """The steps of the refits for a report: min, median, max and by layer; None without any."""
    if not by_layer:
        return None
    steps = list(by_layer.values())
    return {"min": min(steps), "median": median(steps), "max": max(steps), "per_layer": dict(by_layer)}


def _in_a_new_process(record: Mapping[str, Any]) -> str:
    """How sure a latency's share is."""
    if "achieved_interval" not in record:
        return ""
    low, high = record["achieved_interval"]
    return f" ({low:.2%} to {high:.2%} in a new process)"


def _allocation_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the plan came about, if it is not plainly uniform."""
    if report["rule"] == "uniform" and report["budget"] is None:
        return []
    rows = [("allocation", f"{report['rule']}, budget {report['budget'] or 'none'}")]
    record = report.get("allocation")
    if record is not None:
        rows.append(("budget met", f"{record['achieved']:.4%}" + _in_a_new_process(record)))
    if record is not None and "scan" in record:
        scan = record["scan"]
        rows += [
            (
                "error of the denoiser's output",
                f"{record['joint_error']:.5g} all together, {record['predicted_error']:.5g} predicted as the sum of "
                f"single layers (at least {record['error_bound']:.5g}), {record['uniform_joint_error']:.5g} uniform",
            ),
            (
                "sensitivity scan",
                f"{scan['scan_s']:.1f} s, {scan['triples']} recorded calls, "
                f"{scan['bare_passes']:.1f} x the denoiser calls of a calibration pass",
            ),
        ]
    return rows


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.5g}"


def draw_samples(
    path: Path, rows: Mapping[str, Tensor], prompts: Sequence[str], seeds: Sequence[int], title: str
) -> None:
    """A grid: named rows of images (n, c, h, w) in [0, 1], one column per prompt and seed."""
    from matplotlib.figure import Figure

    count = len(prompts)
    figure = Figure(figsize=(1.5 * count + 0.8, 0.8 + 1.6 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in enumerate(rows.items()):
        for column in range(count):
            axis = axes[row][column]
            image = images[column].permute(1, 2, 0).numpy()
            gray = image.shape[-1] == 1
            axis.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name, fontsize=11)
            if row == 0:
                axis.set_title(_wrapped(f"{prompts[column]} (seed {seeds[column]})"), fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png")


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 22)[:4])
