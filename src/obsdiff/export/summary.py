"""What a command says when it is done: about six aligned lines, in units that people read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obsdiff.progress import duration

STAGES = {
    "calibrate": "calibrating",
    "allocate": "allocating",
    "solve": "solving",
    "calibration": "calibrating",
    "allocation": "allocating",
    "reconstruct": "reconstructing",
    "recovery": "training",
}  # others are called as they are
WHOLE = ("total", "forward_only")  # not stages of their own
UNITS = {
    "steps": " steps",
    "images": " images",
    "denoiser_flops": " FLOPs",
    "device_s": " of device time",
    "wall_s": "",
}
SHOWN = ("pipeline", "report.md", "samples.png", "plan.yaml")  # what people open; the folder holds more
FIGURES = (("alignment", "alignment", "{:.1%}"), ("frechet", "Fréchet", "{:.2f}"))


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of a name and what it is, the latter below each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def amount(number: float) -> str:
    """A count in thousands (K), millions (M) and so on: three digits say enough."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}" if isinstance(number, float) and not number.is_integer() else f"{number:.0f}"


def memory(size: float) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def prune_summary(report: Mapping[str, Any], output: str | Path) -> str:
    """What ``obsdiff prune`` says.

    Args:
        report: The content of ``report.json``.
        output: The folder it lies in.
    """
    times = report["time_s"]
    rows = [
        ("pruned", f"{report['pipeline']}: {_done(report)}"),
        ("parameters", _parameters(report) + _dead(report)),
        *depth_rows(report),
        *rank_rows(report),
        *reconstruction_rows(report),
        *_allocation(report),
        *(("note", note) for note in report.get("notes", ())),
    ]
    figures = []
    if (fidelity := report["fidelity"]) is not None:
        figures.append(f"MSE to dense {_interval(fidelity)}")
    if (alignment := report["alignment"]) is not None:
        figures.append(f"alignment {_shown('{:.1%}', alignment['dense'])} -> {_shown('{:.1%}', alignment['pruned'])}")
    if (frechet := report["frechet"]) is not None:
        figures.append(f"Fréchet {_shown('{:.2f}', frechet['dense'])} -> {_shown('{:.2f}', frechet['pruned'])}")
    rows.append(("quality", _counted(figures, fidelity)))
    rows.append(
        ("time", f"{duration(times['total'])}{_stages(times)}, peak memory {memory(report['peak_memory_bytes'])}")
    )
    rows.append(("result", _contents(output)))
    return aligned(rows)


FATES = {"left": "free to delete (--dead remove)", "zero": "made zero", "cut": "cut to the least"}


def dead_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Layers that reach no output, by what became of them; of a report or a manifest."""
    return [("dead layers", f"{', '.join(layers)}: {FATES[fate]}") for fate, layers in _by_fate(report).items()]


def rank_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the ranks of vectors leave out, of a report or a manifest."""
    rows = []
    for name, found in (report.get("ranks") or {}).items():
        figures = f"{found['rank']:g} of {found['width']:g} directions at {name}: {found['input_left_out']:.2g} of the "
        figures += f"input left out, output error {found['error']:.2g}"
        if (other := found.get("error_held_out")) is not None:
            figures += f", on other prompts {other:.2g}"
        rows.append(("rank", figures))
    return rows


def reconstruction_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What training stage by stage did, of a report or a manifest."""
    found = report.get("reconstruction")
    if found is None or not found["stages"]:
        return []
    errors = list(found["stages"].values())
    before, after = (sum(error[at] for error in errors) / len(errors) for at in (0, 1))
    worked = sum(error[1] < error[0] for error in errors)
    text = f"{found['steps']:,} steps each of {len(errors)} stages, mean output error {before:.2g} -> {after:.2g}"
    return [("reconstruction", text + ("" if worked == len(errors) else f"; {len(errors) - worked} left as they were"))]


def depth_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which stages went, and what each changed; of a report or a manifest."""
    if not (depth := report.get("depth")):
        return []
    errors = [f"{error:.3g}" for error in depth.get("errors", ())]
    after = f"; error of the denoiser's output after each {', '.join(errors)}" if errors else ""
    removed = depth["removed"]
    return [("depth", f"{len(removed)} of {depth['of']} stages removed: {', '.join(removed)}{after}")]


def _by_fate(report: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer, fate in (report.get("dead") or {}).items():
        found.setdefault(fate, []).append(layer)
    return found


def _dead(report: Mapping[str, Any]) -> str:
    """How many layers reach no output, where there are any."""
    counts = {FATES[fate]: len(layers) for fate, layers in _by_fate(report).items()}
    return "".join(f"; {count} dead layer{'s' * (count > 1)} {fate}" for fate, count in counts.items())


def recovery_summary(report: Mapping[str, Any], output: str | Path, total_s: float | None = None) -> str:
    """What ``obsdiff train fit`` says of a recovery.

    Args:
        report: The content of ``report.json``.
        output: The folder it lies in.
        total_s: How long the command took; default: what the stages took.
    """
    recovery, dense = report["recovery"], report.get("dense", {})
    steps = f"{recovery['steps']:,} step{'s' * (recovery['steps'] != 1)}"
    rows = [("recovered", f"{report['pipeline']}: {_done(report)}, {steps}"), ("parameters", _parameters(report))]
    rows += depth_rows(report)
    rows += [("note", note) for note in report.get("notes", ())]
    if "fidelity_after" in recovery:
        before, after = recovery["fidelity_before"], recovery["fidelity_after"]
        figures = f"{_shown('{:.3g}', before['mse'])} -> {_interval(after)}"
        rows.append(("MSE to dense", _counted([figures], report["evaluation"])))
    for key, name, form in FIGURES:
        parts = []
        for suffix, where in (("", ""), ("_unguided", "without guidance ")):
            if (after := recovery.get(f"{key}{suffix}_after")) is not None:
                change = f"{_shown(form, recovery.get(f'{key}{suffix}_before'))} -> {form.format(after)}"
                parts.append(f"{where}{change} (dense {_shown(form, dense.get(key + suffix))})")
        if parts:
            rows.append((name, ", ".join(parts)))
    if report["budget"] is not None:
        rows.append(("budget", _budget(report["budget"])))
    rows.append(("time", _time(report, total_s)))
    rows.append(("result", _contents(output)))
    return aligned(rows)


def evaluation_summary(
    what: str, before: Mapping[str, Any], after: Mapping[str, Any], num_images: int, total_s: float
) -> str:
    """What ``obsdiff train validate`` and ``test`` say.

    Args:
        what: What was evaluated.
        before, after: Figures of the freshly pruned pipeline and of this one, as
            :func:`obsdiff.evaluation.references.measure` gives them.
        num_images: Images that were drawn.
        total_s: How long the command took.
    """
    mse = f"{_shown('{:.3g}', before['fidelity']['mse'])} -> {_interval(after['fidelity'])}"
    rows = [("evaluated", what), ("MSE to dense", _counted([mse], {"n": num_images}))]
    for key, name, form in FIGURES:
        if key in after:
            rows.append((name, f"{_shown(form, before.get(key))} -> {_shown(form, after[key])}"))
    return aligned([*rows, ("time", duration(total_s))])


def images_summary(what: str, files: Sequence[Path], total_s: float) -> str:
    """What ``obsdiff sample`` and ``obsdiff train predict`` say.

    Args:
        what: Where the images come from.
        files: The images.
        total_s: How long the command took.
    """
    where = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}" if files else "no image"
    count = f"{len(files)} image{'s' * (len(files) != 1)}"
    return aligned([("drawn", f"{count}, {what}"), ("time", duration(total_s)), ("result", where)])


def seeds_text(seeds: Sequence[int]) -> str:
    """``seed 3``, or ``seeds 3 to 10``."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _done(report: Mapping[str, Any]) -> str:
    achieved = report["sparsity"]["achieved"]
    if report["pattern"] is None or achieved is None:
        return "not pruned"
    return f"{report['pattern']} by {report['method']}, sparsity {achieved:.2%}"


def _parameters(report: Mapping[str, Any]) -> str:
    counts, flops = report["parameters"], report["flops"]
    if counts["pruned"] == counts["dense"]:
        return f"{amount(counts['dense'])}, of them {amount(counts['nonzero'])} not zero"
    share = counts["pruned"] / counts["dense"]
    text = f"{amount(counts['dense'])} -> {amount(counts['pruned'])} ({share:.1%})"
    return f"{text}, FLOPs per call {amount(flops['dense'])} -> {amount(flops['pruned'])}"


def _allocation(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """By which rule the plan was made and what of its budget was met, unless it is plainly uniform."""
    asked, met = report.get("budget"), (report.get("allocation") or {}).get("achieved")
    if report["rule"] in (None, "uniform") and asked is None:
        return []
    text = "" if asked is None else ", budget " + re.sub(r"\d+\.\d{5,}", lambda n: f"{float(n[0]):.4g}", str(asked))
    text += "" if asked is None or met is None else f" (met: {met:.2%})"
    return [("allocation", f"{report['rule']}{text}")]


def _shown(form: str, value: float | None) -> str:
    """A figure; images that are not finite have none."""
    return "not finite" if value is None else form.format(value)


def _interval(fidelity: Mapping[str, Any]) -> str:
    if fidelity["mse"] is None:
        return "not finite"
    low, high = fidelity["mse_interval"]
    return f"{fidelity['mse']:.3g} (95% {low:.3g} to {high:.3g})"


def _counted(figures: Sequence[str], sampled: Mapping[str, Any] | None) -> str:
    return f"{', '.join(figures)}; {sampled['n']} images" if figures and sampled is not None else "not measured"


def _stages(times: Mapping[str, float]) -> str:
    """What the longer parts of the time went to, in brackets."""
    parts = [f"{STAGES.get(k, k)} {duration(v)}" for k, v in times.items() if k not in WHOLE and v >= 0.05]
    return f" ({', '.join(parts)})" if parts else ""


def _limit(name: str, value: float) -> str:
    return duration(value) if name.endswith("_s") else f"{value:,.0f}" if name == "steps" else amount(value)


def limits_text(limits: Mapping[str, float]) -> str:
    """A budget's limits, such as ``500 steps, 10 min 0 s``."""
    return ", ".join(f"{_limit(name, limit)}{UNITS[name]}" for name, limit in limits.items())


def _budget(budget: Mapping[str, Any]) -> str:
    """What was used of each limit, all stages together."""
    parts = []
    for name, limit in budget["limit"].items():
        used = sum(cost[name] for cost in budget["used"].values())
        parts.append(f"{_limit(name, used)} of {_limit(name, limit)}{UNITS[name]}")
    return ", ".join(parts) or "no limit"


def _time(report: Mapping[str, Any], total_s: float | None) -> str:
    used = {} if report["budget"] is None else {k: cost["wall_s"] for k, cost in report["budget"]["used"].items()}
    total_s = sum(used.values()) if total_s is None else total_s
    return f"{duration(total_s)}{_stages(used)}, peak memory {memory(report['peak_memory_bytes'])}"


def _contents(output: str | Path) -> str:
    return f"{output} ({', '.join(name for name in SHOWN if (Path(output) / name).exists())})"
