"""The figures of an evaluation in words and tables: what each is called and how it is written, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from obsdiff.evaluation.evaluate import STAGES, UNGUIDED
from obsdiff.evaluation.measures.base import Figures

TITLES = {
    "mse": "MSE to dense",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "distance": "distance of features to dense",
    "alignment": "alignment",
    "alignment_top5": "alignment among the five likeliest",
    "clip_score": "CLIP score",
    "frechet": "Fréchet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "cmmd": "CMMD",
}
FORMS = {"alignment": "{:.1%}", "precision": "{:.1%}", "recall": "{:.1%}", "frechet": "{:.3f}", "psnr": "{:.2f}"}
OTHERS = "{:.3g}"


def title(name: str) -> str:
    """What people call a figure, such as ``frechet@dinov2_unguided``."""
    guided = name.removesuffix(UNGUIDED)
    kind, _, extractor = guided.partition("@")
    text = TITLES.get(kind, kind) + (f" ({extractor})" if extractor else "")
    return f"{text}, without guidance" if name.endswith(UNGUIDED) else text


def shown(name: str, value: float | None, interval: Sequence[float] | None = None) -> str:
    """A figure as people read it, with its 95 % interval if there is one."""
    if value is None:
        return "not measured"
    kind = name.removesuffix(UNGUIDED).partition("@")[0].partition("_")[0]
    form = FORMS.get(kind, OTHERS)
    text = form.format(value)
    if interval is None or interval[0] == interval[1]:
        return text
    return f"{text} ({form.format(interval[0])} to {form.format(interval[1])})"


def named(figures: Figures) -> list[str]:
    """The names of the figures that are numbers or missing, in order."""
    apart = ("_interval", "_groups", "not_finite")
    return [name for name in figures if not name.removesuffix(UNGUIDED).endswith(apart)]


def figure(figures: Figures, name: str) -> str:
    """One of them, in words."""
    guided, unguided = name.removesuffix(UNGUIDED), UNGUIDED if name.endswith(UNGUIDED) else ""
    return shown(name, figures[name], figures.get(f"{guided}_interval{unguided}")) if name in figures else ""


def evaluation_table(evaluation: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown table, a column for each of dense, pruned and so on, and what to know about it."""
    stages = [stage for stage in STAGES if stage in evaluation]
    names = list(dict.fromkeys(name for stage in reversed(stages) for name in named(evaluation[stage])))
    lines = [f"| | {' | '.join(stages)} |", "|---|" + "---|" * len(stages)]
    for name in names:
        lines.append(f"| {title(name)} | {' | '.join(figure(evaluation[stage], name) for stage in stages)} |")
    for group in evaluation[stages[-1]].get("alignment_groups") or {}:
        parts = [(evaluation[stage].get("alignment_groups") or {}).get(group) for stage in stages]
        count = next(part["n"] for part in parts if part is not None)
        values = ["" if part is None else f"{part['value']:.1%}" for part in parts]
        lines.append(f"| alignment of {group}, n = {count} | {' | '.join(values)} |")
    lines += [
        "",
        f"n = {evaluation['n']}, first noise seed {evaluation['first_seed']}; 95 % bootstrap intervals over images.",
    ]
    for stage in stages:
        if spoilt := evaluation[stage].get("not_finite"):
            lines.append(f"{spoilt} {stage} images have pixels that are not finite: nothing of them is measured.")
    if worst := evaluation["worst"]:
        texts = "; ".join(f"{found['prompt']!r} ({OTHERS.format(found['mse'])})" for found in worst)
        lines.append(f"Furthest from the dense images, MSE: {texts}.")
    by: dict[str, list[str]] = {}
    for name, text in evaluation["says"].items():
        by.setdefault(text, []).append(title(name))
    lines += [f"{', '.join(titles)}: {text}." for text, titles in by.items()]
    lines += [f"Not measured: {name}, since {reason}." for name, reason in evaluation["skipped"].items()]
    for name, least in evaluation["few"].items():
        lines.append(f"{title(name)}: few images for so many features; their covariance has full rank from {least} on.")
    return lines + [f"Note: {remark}." for remark in evaluation["remarks"]]
