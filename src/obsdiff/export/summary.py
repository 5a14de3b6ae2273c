"""What a command says when it is done: about six aligned lines, in units that people read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obsdiff.evaluation.evaluate import UNGUIDED
from obsdiff.evaluation.measures.base import Figures
from obsdiff.export.figures import figure, named
from obsdiff.export.figures import title as words
from obsdiff.obs.pattern import LOWRANK, RANK
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
FIGURES = {"mse": "MSE to dense", "alignment": "alignment", "frechet": "Fréchet"}  # those that a summary has room for
SIZES = {"parameters": "parameters", "denoiser_bytes": "bytes of the denoiser", "flops": "FLOPs per call"}
FORMS = {"alignment": "{:.1%}", "frechet": "{:.2f}"}


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
    rows.append(("quality", _quality(report["evaluation"])))
    rows += _remarks(report["evaluation"])
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
    """What ranks leave out, of a report or a manifest: of each vector, and of tokens where it is most."""
    ranks = report.get("ranks") or {}
    vectors = {name: found for name, found in ranks.items() if found.get("kind", RANK) == RANK}
    rows = [(RANK, _rank_figures(name, found)) for name, found in vectors.items()]
    if tokens := {name: found for name, found in ranks.items() if name not in vectors}:
        worst = max(tokens, key=lambda name: tokens[name]["error"])
        rows.append((LOWRANK, f"{len(tokens)} inputs; the most is lost of {_rank_figures(worst, tokens[worst])}"))
    return rows


def _rank_figures(name: str, found: Mapping[str, Any]) -> str:
    figures = f"{found['rank']:g} of {found['width']:g} directions at {name}: {found['input_left_out']:.2g} of the "
    figures += f"input left out, output error {found['error']:.2g}"
    if (other := found.get("error_held_out")) is not None:
        figures += f", on other prompts {other:.2g}"
    return figures


def reconstruction_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was done stage by stage, of a report or a manifest."""
    found = report.get("reconstruction")
    if found is None or not found["stages"]:
        return []
    errors = list(found["stages"].values())
    before, after = (sum(error[at] for error in errors) / len(errors) for at in (0, 1))
    worked = sum(error[1] < error[0] for error in errors)
    how = ["solved again"] if found.get("closed_form") else []
    how += [f"trained for {found['steps']:,} steps each"] if found["steps"] else []
    text = f"{len(errors)} stages {', then '.join(how)}, mean output error {before:.2g} -> {after:.2g}"
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
    recovery = report["recovery"]
    steps = f"{recovery['steps']:,} step{'s' * (recovery['steps'] != 1)}"
    rows = [("recovered", f"{report['pipeline']}: {_done(report)}, {steps}"), ("parameters", _parameters(report))]
    rows += depth_rows(report)
    rows += [("note", note) for note in report.get("notes", ())]
    if (evaluation := report["evaluation"]) is not None:
        rows += _changes(evaluation, "pruned", "recovered") + _remarks(evaluation)
    if report["budget"] is not None:
        rows.append(("budget", _budget(report["budget"])))
    rows.append(("time", _time(report, total_s)))
    rows.append(("result", _contents(output)))
    return aligned(rows)


def evaluation_summary(what: str, evaluation: Mapping[str, Any], total_s: float) -> str:
    """What ``obsdiff train validate`` and ``test`` say.

    Args:
        what: What was evaluated.
        evaluation: As :func:`obsdiff.evaluation.evaluate.evaluation_of` gives it.
        total_s: How long the command took.
    """
    rows = [("evaluated", what), *_changes(evaluation, "pruned", "recovered"), *_remarks(evaluation)]
    return aligned([*rows, ("time", duration(total_s))])


def measured_summary(title: str, found: Mapping[str, Any], output: Path | None, total_s: float) -> str:
    """What ``obsdiff evaluate`` says.

    Args:
        title: What was measured against what.
        found: As :func:`obsdiff.export.evaluate.evaluate` gives it.
        output: Where it was written to, or None.
        total_s: How long the command took.
    """
    evaluation, sizes = found["evaluation"], found["size"]
    what = next(reversed(sizes))
    rows = [("evaluated", f"{title}; {evaluation['n']} images")]
    for name in named(evaluation[what]):
        beside = f" (dense {figure(evaluation['dense'], name)})" if name in evaluation.get("dense", {}) else ""
        rows.append((words(name), figure(evaluation[what], name) + beside))
    for key, text in SIZES.items():
        rows.append((text, " -> ".join(amount(size[key]) for size in sizes.values())))
    if (timed := found["latency"]) is not None:
        rows.append(
            ("latency", f"{timed['share']:.3f} ({timed['interval'][0]:.3f} to {timed['interval'][1]:.3f}) of dense")
        )
    rows += _remarks(evaluation)
    rows.append(("time", f"{duration(total_s)}, peak memory {memory(found['peak_memory_bytes'])}"))
    if output is not None:
        rows.append(("result", f"{output} (evaluation.json, evaluation.md, samples.png)"))
    return aligned(rows)


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


def _short(figures: Figures, name: str) -> str:
    """A figure in a line that holds several; images that are not finite have none."""
    if figures.get(name) is None:
        return "not finite" if "not_finite" in figures else "not measured"
    text = FORMS.get(name.removesuffix(UNGUIDED), "{:.3g}").format(figures[name])
    low, high = figures.get(f"{name}_interval") or (None, None)
    return f"{text} (95% {low:.3g} to {high:.3g})" if name == "mse" and low is not None else text


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    """The few figures that matter most of a prune."""
    if evaluation is None:
        return "not measured"
    dense, pruned = evaluation["dense"], evaluation["pruned"]
    figures = [f"{FIGURES[name]} {_short(pruned, name)}" for name in ("mse",) if name in pruned]
    for name in FIGURES:
        if name in dense and name in pruned:
            figures.append(f"{FIGURES[name]} {_short(dense, name)} -> {_short(pruned, name)}")
    return f"{', '.join(figures)}; {evaluation['n']} images"


def _changes(evaluation: Mapping[str, Any], before: str, after: str) -> list[tuple[str, str]]:
    """What became of each figure, beside the dense one."""
    rows, dense = [], evaluation.get("dense", {})
    for name, what in FIGURES.items():
        parts = []
        for key, where in ((name, ""), (name + UNGUIDED, "without guidance ")):
            if key in evaluation[after]:
                old = (
                    FORMS.get(name, "{:.3g}").format(evaluation[before][key])
                    if evaluation[before].get(key) is not None
                    else _short(evaluation[before], key)
                )
                beside = f" (dense {_short(dense, key)})" if key in dense else ""
                parts.append(f"{where}{old} -> {_short(evaluation[after], key)}{beside}")
        if parts:
            rows.append((what, ", ".join(parts) + (f"; {evaluation['n']} images" if name == "mse" else "")))
    return rows


def _remarks(evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [("note", remark) for remark in (evaluation or {}).get("remarks", ())]


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
