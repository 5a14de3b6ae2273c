"""Bringing a pruned denoiser to the dense one stage by stage, as options ask (:mod:`obsdiff.pruning.reconstruct`)."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from obsdiff.allocation.probe import record_probe
from obsdiff.costs import BACKWARD
from obsdiff.criteria import find_method
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.memory import is_out_of_memory
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.graph import Graph
from obsdiff.models.info import call_arguments
from obsdiff.models.offload import refuse_offloaded
from obsdiff.models.subject import Subject, subject_of
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.finished import StageError, check_finished
from obsdiff.pruning.masks import weight_masks
from obsdiff.pruning.oneshot import zeroed_layers
from obsdiff.pruning.options import PruningOptions, ReconstructionOptions
from obsdiff.pruning.reconstruct import Call, Pair, divided, reconstruct
from obsdiff.pruning.report import PruneReport, count_parameters
from obsdiff.pruning.surgery import lost_rows
from obsdiff.ranks import rank


@dataclass(frozen=True)
class Whole:
    """What a reconstruction needs of the pipeline before it is pruned.

    Attributes:
        denoiser: A copy.
        graph: What it was, by names and sizes; the weights are those of the pruned one.
        sites: Layers with weights of their own that run once in a call and read tokens, those of one tensor together.
        calls: Recorded on its way.
        recorded: Rows through the denoiser that recording took.
        flops: Of one row.
        time_s: Seconds it took.
        store: Folder to keep finished stages in, or None.
    """

    denoiser: nn.Module
    graph: Graph
    sites: list[list[str]]
    calls: list[Call]
    recorded: int
    flops: int
    time_s: float
    store: Path | None


def before_reconstruction(
    subject: Subject, options: PruningOptions, prompts: Sequence[str], store: Path | None
) -> Whole:
    """Copy the denoiser and record its calls.

    Args:
        subject: The pipeline, not pruned yet.
        options: What is asked for.
        prompts: The calibration's.
        store: Folder to keep finished stages in, or None.

    Raises:
        UserError: There are too few calls, or the folder cannot be used.
    """
    if store is not None:
        check_finished(store)
    started = time.perf_counter()
    settings, asked = options.calibration, options.reconstruction
    call = call_arguments(subject.pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    weighting = settings.weighting or find_method(options.method).weighting
    how = Settings(call, options.seed, weighting, batch_size=settings.batch_size)
    probe = record_probe(subject, encode_prompts(subject.pipe, prompts, call), how, asked.triples)
    rows = probe.calls[0].rows
    calls = [Call(name, given, len(weights) * rows) for name, given, weights in probe.batches(asked.batch_size * rows)]
    for name, count in Counter(call.denoiser for call in calls).items():
        if count < 2:
            raise UserError(
                f"a reconstruction needs two batches at least, and {len(probe)} recorded triples make {count}"
                f"{f' of {name}' if name else ''}; use a smaller --reconstruction.batch_size or more "
                "--reconstruction.triples"
            )
    flops = denoiser_flops(subject, call_arguments(subject.pipe))
    spent = time.perf_counter() - started
    return Whole(
        copy.deepcopy(subject.denoiser),
        subject.graph,
        own_sites(subject),
        calls,
        probe.recorded * rows,
        flops,
        spent,
        store,
    )


def reconstruct_stages(pipe: Any, report: PruneReport, options: PruningOptions, whole: Whole, quiet: bool) -> None:
    """Solve and train the stages of the pruned pipeline, and say so in its report.

    Args:
        pipe: Pruned; changed in place.
        report: Of the prune.
        options: What is asked for.
        whole: The pipeline before.
        quiet: No progress bar.
    """
    asked, subject = options.reconstruction, subject_of(pipe)
    refuse_offloaded(subject.denoiser, "a reconstruction")
    pair, quiet = _pair(subject, report, whole), quiet or rank() > 0
    try:
        errors = reconstruct(pair, whole.calls, asked, seed=options.seed, store=whole.store, quiet=quiet)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # the pipeline is pruned already: whoever called may not begin again in smaller batches
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"out of memory in a reconstruction; use a smaller --reconstruction.batch_size ({said})"
        ) from error
    report.reconstruction = {
        "closed_form": asked.closed_form,
        "steps": asked.steps,
        "lr": asked.lr,
        "calls": len(whole.calls),
        "stages": {name: [error.before, error.after] for name, error in errors.items()},
        "denoiser_flops": _flops(whole, denoiser_flops(subject, call_arguments(pipe)), asked, errors),
    }
    count_parameters(subject.denoiser, report)
    report.time_s["reconstruct"] = whole.time_s + sum(error.time_s for error in errors.values())


def _pair(subject: Subject, report: PruneReport, whole: Whole) -> Pair:
    masks = weight_masks(report.masks, report.shrunk is not None)
    for layer in zeroed_layers(subject.graph).keys() - masks.keys():  # of an earlier prune: they stay zero too
        masks[layer] = subject.graph.weight(layer).detach().ne(0)
    removed = set((report.depth or {}).get("removed", ()))
    before = [stage for stage in whole.graph.stages if stage not in removed]
    stages = dict(zip(subject.graph.stages, before, strict=True))
    now = {was: name for name, was in stages.items()}
    return Pair(
        subject.denoiser,
        whole.denoiser,
        stages,
        masks,
        frozenset(whole.graph.chains),
        sites=[list(_called(site, now).values()) for site in whole.sites],
        lost=_lost(report, stages, whole.graph),
        still=frozenset(layer for layer, fate in report.dead.items() if fate == "zero"),
    )


def own_sites(subject: Subject) -> list[list[str]]:
    """Layers with weights of their own that run once in a call and read tokens, those of one tensor together."""
    graph, times = subject.graph, subject.trace.times
    owners = Counter(id(graph.weight(layer)) for site in graph.sites for layer in site.layers)
    alone = {layer for layer, count in times.items() if count == 1}
    return [[n for n in site.layers if n in alone and owners[id(graph.weight(n))] == 1] for site in graph.sites]


def _called(names: Iterable[str], stages: Mapping[str, str]) -> dict[str, str]:
    """What is called so inside stages, and its name in another model, which has these stages by the names given."""
    found = {}
    for name in names:
        for stage, there in stages.items():
            if f"{name}.".startswith(f"{stage}."):
                found[name] = there + name.removeprefix(stage)
    return found


def _lost(report: PruneReport, stages: Mapping[str, str], before: Graph) -> dict[str, Tensor]:
    """By layer of the dense denoiser, the outputs that went with units."""
    units = {name for name, group in before.group_of.items() if group.basis is None}
    called = _called(report.masks, stages)
    return lost_rows(before, {was: report.masks[name] for name, was in called.items() if was in units})


def _flops(whole: Whole, pruned: int, asked: ReconstructionOptions, errors: Mapping[str, StageError]) -> float:
    """Recording; going through the stages of both models, and a call of each to see what has to be held meanwhile; the
    stages' steps; their errors, before and after each way; and what solving them again took, each pass counted whole,
    as if stages were equal.

    Args:
        whole: The dense denoiser and its calls.
        pruned: FLOPs of one row through the pruned one.
        asked: What of.
        errors: What was done.
    """
    by_denoiser: dict[str, list[Call]] = {}
    for call in whole.calls:
        by_denoiser.setdefault(call.denoiser, []).append(call)
    rows = sum(call.rows for call in whole.calls)
    held = sum(call.rows for calls in by_denoiser.values() for call in divided(calls)[1])
    each = rows / len(whole.calls)
    trained = (1 + BACKWARD) * asked.steps * each
    checked = (1 + asked.closed_form + (asked.steps > 0)) * held
    solved = (rows - held) * sum(error.passes for error in errors.values()) / max(1, len(errors))
    of_dense, of_pruned = whole.recorded + rows + each + solved, rows + each + trained + solved + checked
    return whole.flops * of_dense + pruned * of_pruned
