"""Any pipeline measured: against the dense one, against its prompts and against real images, as all reports do it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsdiff.allocation.clock import call_of, time_calls
from obsdiff.allocation.latency import share_of
from obsdiff.allocation.request import check_evaluation
from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import check_measurable
from obsdiff.evaluation.evaluate import DENSE, RESULTS, Images, evaluation_of
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.prompts import evaluation_prompts
from obsdiff.evaluation.references import draw
from obsdiff.evaluation.sampling import cycle_prompts
from obsdiff.evaluation.scorers import check_scorers, score
from obsdiff.evaluation.suite import load_suite
from obsdiff.export.figures import evaluation_table
from obsdiff.export.places import finite, pipeline_bytes
from obsdiff.export.report import draw_samples
from obsdiff.files import write_json, write_text
from obsdiff.memory import peak_memory_bytes
from obsdiff.models.calls import remembered_call
from obsdiff.models.conditioning import told_nothing
from obsdiff.models.denoisers import parts_of
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.modes import eval_mode
from obsdiff.models.subject import subject_of
from obsdiff.obs.select import count_nonzero
from obsdiff.pruning.folder import run_folder
from obsdiff.pruning.manifest import read_manifest
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions
from obsdiff.ranks import solved_in_turn
from obsdiff.versions import versions

FILE = "evaluation.json"
ROUNDS = 15  # in which both denoisers are timed in turns
SHOWN = 8


def origin_of(pipeline: str) -> tuple[str, str | None]:
    """What a pipeline is called in its evaluation, and the dense one that it was made of; None where nothing says so.

    Args:
        pipeline: A name, a folder or a hub id.
    """
    folder = run_folder(pipeline)
    if folder is None:
        return "evaluated", None
    manifest = read_manifest(folder)
    return "recovered" if manifest.get("recovery") else "pruned", manifest.get("pipeline")


def asked_prompts(pipe: Any, options: EvaluationOptions, distinct: bool = False) -> list[str]:
    """One prompt per image, of the named set or the pipeline's own.

    Args:
        pipe: What draws.
        options: Of the evaluation.
        distinct: Take a prompt that a named set holds several times as one: DPG-Bench has a row for each question.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    if options.prompts is None and not info_of(pipe).prompts and not told_nothing(pipe, None):
        raise UserError("name what to draw: --evaluation.prompts FILE (.txt, .csv, .jsonl ...) or a data set")
    if distinct and options.prompts is not None and not told_nothing(pipe, options.prompts):
        once = list(dict.fromkeys(load_prompts(options.prompts, options.column)))
        return cycle_prompts(once, options.num_images)
    prompts = evaluation_prompts(pipe, options, CalibrationOptions(prompts=options.prompts, column=options.column))
    if not prompts:
        raise UserError("evaluation.num_images is 0: there is nothing to measure")
    return prompts


def evaluate(
    pipe: Any,
    against: Any | None = None,
    *,
    what: str = "evaluated",
    scorers: Mapping[str, str] | None = None,
    latency: bool = True,
    quiet: bool = True,
    texts: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a pipeline, as ``obsdiff evaluate`` and every report do.

    Args:
        pipe: The pipeline.
        against: The dense one, whose images of the same prompts and seeds are compared; None compares with none.
        what: What the pipeline is called in the result: "pruned", "recovered" or "evaluated".
        scorers: Commands that score images, by the name of their figure (:func:`obsdiff.evaluation.scorers.score`).
        latency: Time one call of the denoisers, in turns.
        quiet: No progress bars.
        texts: The prompts themselves, one per image; None takes those that the options name.
        options: As :class:`obsdiff.pruning.options.EvaluationOptions`: num_images, prompts, measures and so on.

    Returns:
        ``evaluation``: see :func:`obsdiff.evaluation.evaluate.evaluation_of`; ``size``: parameters, nonzero ones, bytes
        and FLOPs of one denoiser call, of both; ``latency``: share of the dense call's time and its 95 % interval, or
        None; ``versions``, ``device``, ``time_s``, ``peak_memory_bytes``; ``images``: by name, (n, c, h, w).

    Raises:
        UserError: An option is wrong, a prompt cannot be measured, or a scorer fails.
    """
    started = time.perf_counter()
    asked = EvaluationOptions(**options)
    check_evaluation(asked)
    check_scorers(scorers or {})
    if what not in RESULTS:
        raise UserError(f"what is {what!r}; choose one of {', '.join(RESULTS)}")
    prompts = asked_prompts(pipe, asked) if texts is None else list(texts)
    alignment = info_of(pipe).alignment
    check_measurable(prompts, alignment, asked.measures)
    suite = load_suite(alignment, asked, pipe.device)
    seeds = list(range(asked.seed, asked.seed + len(prompts)))
    pipes = {what: pipe} if against is None else {DENSE: against, what: pipe}
    drawn: dict[str, Images] = {}
    for name, each in pipes.items():
        drawn[name] = draw(
            each, prompts, seeds, asked.batch_size, alignment, allow_nonfinite=name != DENSE, quiet=quiet
        )
    if len({images.guided.shape for images in drawn.values()}) > 1:
        sizes = " and ".join(" x ".join(map(str, images.guided.shape[1:])) for images in drawn.values())
        raise UserError(f"images of {sizes} (channels, height, width) cannot be compared; measure against none")
    evaluation = evaluation_of(suite, prompts, seeds, drawn)
    todo = [(scorer, command, name) for scorer, command in (scorers or {}).items() for name in drawn]
    for (_, _, name), figures in solved_in_turn(todo, lambda one: score(*one[:2], drawn[one[2]].guided, prompts)):
        evaluation[name] |= figures
    return {
        "evaluation": evaluation,
        "size": {name: _size(each) for name, each in pipes.items()},
        "latency": _latency(against, pipe) if latency and against is not None else None,
        "device": str(pipe.device),
        "versions": versions(),
        "time_s": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(pipe.device),
        "prompts": prompts,
        "seeds": seeds,
        "images": {name: images.guided for name, images in drawn.items()},
    }


def _size(pipe: Any) -> dict[str, int]:
    subject = subject_of(pipe)
    weights = list(subject.denoiser.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "nonzero": sum(map(count_nonzero, weights)),
        "denoiser_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "pipeline_bytes": pipeline_bytes(pipe),
        "flops": denoiser_flops(subject, call_arguments(pipe)),
    }


@torch.no_grad()
def _latency(dense: Any, pipe: Any) -> dict[str, Any]:
    """Share of the dense call's time that a call of this denoiser takes, both timed in turns in this process."""
    calls = []
    for each in (dense, pipe):
        denoiser, recorded = subject_of(each).denoiser, remembered_call(each, call_arguments(each))
        single = next(iter(recorded.values()))
        parts = parts_of(denoiser)
        calls.append(call_of(parts, {prefix: recorded.get(prefix[:-1], single) for prefix in parts}))
    with eval_mode(dense), eval_mode(pipe):
        share, low, high = share_of([time_calls(calls) for _ in range(ROUNDS)])
    return {"share": share, "interval": [low, high], "rounds": ROUNDS}


def write_evaluation(folder: Path, found: Mapping[str, Any], title: str) -> None:
    """``evaluation.json``, ``evaluation.md`` and ``samples.png`` of what :func:`evaluate` gave."""
    kept = {key: value for key, value in found.items() if key not in ("images", "prompts", "seeds")}
    write_json(folder / FILE, finite(kept))
    write_text(folder / "evaluation.md", render(found, title))
    rows: dict[str, Tensor] = {
        name: images[:SHOWN].nan_to_num().clamp(0, 1) for name, images in found["images"].items()
    }
    shown = len(next(iter(rows.values())))
    draw_samples(folder / "samples.png", rows, found["prompts"][:shown], found["seeds"][:shown], title)


def render(found: Mapping[str, Any], title: str) -> str:
    """The page."""
    sizes = found["size"]
    lines = [f"# {title}", "", *evaluation_table(found["evaluation"]), "", f"| | {' | '.join(sizes)} |"]
    lines.append("|---|" + "---|" * len(sizes))
    for key in next(iter(sizes.values())):
        lines.append(f"| {key.replace('_', ' ')} | {' | '.join(f'{size[key]:,}' for size in sizes.values())} |")
    if (timed := found["latency"]) is not None:
        low, high = timed["interval"]
        lines.append(f"| latency of a call | 1 | {timed['share']:.3f} ({low:.3f} to {high:.3f}) |")
    lines += ["", f"On {found['device']}; {', '.join(f'{key} {value}' for key, value in found['versions'].items())}."]
    return "\n".join([*lines, "", "![same prompts and seeds](samples.png)"]) + "\n"
