"""Calibration: denoising trajectories of the real pipeline, statistics of every layer input on the way."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from obsdiff.errors import UserError
from obsdiff.memory import kept_meanwhile
from obsdiff.models.conditioning import Conditioning, check_prompts, encode_prompts
from obsdiff.models.denoisers import device_of
from obsdiff.models.graph import Site
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.offload import refuse_offloaded
from obsdiff.models.subject import Subject, subject_of
from obsdiff.numbers import check_seed, check_whole
from obsdiff.obs.observers import GATES, PASSES, gradient_for, observer_for, rounding
from obsdiff.obs.precision import check_precision
from obsdiff.obs.timesteps import check_weighting
from obsdiff.progress import track
from obsdiff.pruning.alphas import named_weighting
from obsdiff.pruning.collect import collecting, rounding_calls
from obsdiff.pruning.fingerprint import Settings, fingerprint_of
from obsdiff.pruning.gates import check_gateable, gated_groups, learned_gates
from obsdiff.pruning.gradients import check_differentiable, layers_of, loss_gradients
from obsdiff.pruning.statistics import (
    INDEX,
    Statistics,
    check_fingerprint,
    check_serves,
    check_store,
    open_statistics,
    save_statistics,
)
from obsdiff.pruning.trajectories import check_call, counted_calls, noise_seeds, run_trajectories
from obsdiff.pruning.unfinished import Unfinished, own_unfinished, remove_unfinished, to_go_on_from
from obsdiff.ranks import from_all, own_share, rank, wait_for_all, world_size

SAVE_EVERY_S = 300.0


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | Conditioning,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weighting: str = "log_decrease",
    tokens: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    store: str | Path | None = None,
    sites: Collection[str] | None = None,
    needs: Collection[str] = ("gram",),
    quiet: bool = True,
) -> Statistics:
    """Measure the inputs of every prunable layer over whole denoising trajectories (OBS-Diff 2510.06751 §4.1).

    Args:
        pipe: A diffusers pipeline of a supported family, or its :class:`~obsdiff.models.subject.Subject`; it is run
            with its own sampler and not changed.
        prompts: Prompts, or an already encoded :class:`Conditioning`.
        steps: Denoising steps; None takes the pipeline's own default.
        guidance_scale: Classifier-free guidance; None takes the pipeline's own default.
        weighting: Timestep weights: log_decrease (the paper's), or others of :mod:`obsdiff.obs.timesteps`; "measured":
            found out on the model first (:mod:`obsdiff.pruning.alphas`).
        tokens: Tokens drawn of each sequence at each call; None uses all. Padded text tokens never count.
        batch_size: Prompts per pipeline call.
        seed: Noise seed.
        store: Folder to keep the statistics in. A finished store of the same settings is opened instead of measured
            again, an unfinished one (kept beside it, with ``.unfinished`` added to the name) is continued, also what
            another number of processes has left.
        sites: Only these sites (names of their first layers); None: all.
        needs: What the statistics are for: "gram" serves every method that goes by layer inputs, "diagonal" (of H)
            only those that need no more (wanda, dsnot), at a fraction of time and memory; beside "gram" one of
            :data:`obsdiff.names.PRECISIONS`, where the device has it ("tf32", "bfloat16": products that make Hessians
            and those of the blocks' linear layers round what they multiply, unless it is one vector a call; "int8":
            those that make Hessians, to 8 bits of a channel's largest); and of
            :data:`obsdiff.obs.observers.PASSES`, each of which is a pass of its own
            (:mod:`obsdiff.pruning.gradients`, :mod:`obsdiff.pruning.gates`) whose result no store keeps.
        quiet: No progress bar.

    Returns:
        The statistics, in memory or in the store.

    Raises:
        UserError: Non-finite activations, a layer that saw no input, a store of other settings, a gradient or gates
            that cannot be had.
    """
    subject = subject_of(pipe, prompts)
    refuse_offloaded(subject.denoiser, "a calibration of all layers at once")
    call = call_arguments(subject.pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    settings = Settings(call, seed, weighting, tokens, batch_size)
    check_settings(settings, prompts)
    settings = replace(settings, weighting=named_weighting(subject, prompts, weighting, call, seed))
    observer, slope = observer_for(needs), gradient_for(needs)
    wanted = {needs} if isinstance(needs, str) else set(needs)
    inputs = wanted - PASSES
    graph = subject.graph
    if isinstance(sites, str):
        raise UserError(f"sites is one text, {sites!r}; give a set of names")
    chosen = [site for site in (*graph.vectors, *graph.sites) if sites is None or site.name in sites]
    if unknown := sorted(set(sites or ()) - {site.name for site in chosen}):
        raise UserError(f"there is no site {unknown[0]}; sites are named after the first layer that reads them")
    subject.check(list(graph.layers) if sites is None else [layer for site in chosen for layer in site.layers])
    if slope is not None:
        check_differentiable(subject)
    groups = gated_groups(graph, chosen) if GATES in wanted else []
    if GATES in wanted:
        check_gateable(subject, groups)
    fingerprint = fingerprint_of(subject, prompts, settings) | rounding(observer)
    statistics = Statistics(fingerprint, time_s={"calibrate": 0.0, "forward_only": 0.0}, observer=observer)
    if inputs or not wanted & PASSES or store is not None:
        request = _Request(subject, chosen, prompts, settings, None if store is None else Path(store), quiet)
        statistics = _inputs(request, statistics, inputs)
    if wanted & PASSES:
        told = prompts if isinstance(prompts, Conditioning) else encode_prompts(subject.pipe, prompts, call)
    if slope is not None:
        reading = [site for site in chosen if site not in graph.vectors]
        statistics.gradients = loss_gradients(subject, told, settings, layers_of(graph, reading), slope, quiet)
    if groups:
        statistics.gates = learned_gates(subject, told, settings, groups, quiet)
    spent = sum(done.time_s for done in (statistics.gradients, statistics.gates) if done is not None)
    if spent:
        statistics.time_s = statistics.time_s | {"calibrate": statistics.time_s["calibrate"] + spent}
    return statistics


@dataclass(frozen=True)
class _Request:
    """What is to be measured: of which pipeline, at which sites, with which prompts and settings, kept where."""

    subject: Subject
    sites: Sequence[Site]
    prompts: Sequence[str] | Conditioning
    settings: Settings
    store: Path | None
    quiet: bool


def _inputs(request: _Request, statistics: Statistics, needs: Collection[str]) -> Statistics:
    """Layer inputs, added to the empty ``statistics`` or found in the store."""
    subject, chosen, store, fingerprint = request.subject, request.sites, request.store, statistics.fingerprint
    unfinished, device = None, device_of(subject.denoiser)
    if store is not None:
        check_store(store)
        if (store / INDEX).exists():
            found = open_statistics(store)
            check_fingerprint(found.fingerprint, fingerprint, store)
            check_serves(found, needs, "what is asked for")
            return found
        unfinished = Unfinished(own_unfinished(store))
        check_store(unfinished.folder)
        for folder in to_go_on_from(store, fingerprint, request.quiet):
            statistics = _with_sums_of(folder, statistics, chosen, device)
            if folder != unfinished.folder:
                unfinished.merged.append(folder)
    check_precision(needs, device)
    prompts, settings = request.prompts, request.settings
    told = prompts if isinstance(prompts, Conditioning) else encode_prompts(subject.pipe, prompts, settings.call)
    _measure(subject, chosen, told, settings, statistics, unfinished, request.quiet or rank() > 0)
    add_up_processes(statistics, chosen)
    check_measured(chosen, statistics)
    if store is None:
        return statistics
    if rank() == 0:
        save_statistics(statistics, store)
        remove_unfinished(store)
    wait_for_all()
    return open_statistics(store)  # read back site by site, so that memory holds one Hessian at a time


def check_settings(settings: Settings, prompts: Sequence[str] | Conditioning) -> None:
    """Refuse a calibration that cannot be run.

    Raises:
        UserError: A setting is out of range, or there are no prompts.
    """
    check_weighting(settings.weighting)
    check_prompts(prompts)
    if settings.tokens is not None:
        check_whole("calibration.tokens", settings.tokens, 1)
    check_whole("calibration.batch_size", settings.batch_size, 1)
    check_call(settings.call)
    check_seed("seed", settings.seed)


def _with_sums_of(folder: Path, statistics: Statistics, sites: Sequence[Site], device: torch.device) -> Statistics:
    """``statistics`` with those of a calibration that was cut off, if they fit."""
    found = _partial(folder, statistics, sites)
    if not statistics.prompts:  # the asked sites alone: others would stay partial
        return replace(found, sites={s.name: found.site(s.name, device) for s in sites}, folder=None, index={})
    for site in sites:  # one by one, so that memory holds one of theirs
        statistics.sites[site.name].merge(found.site(site.name, device))
    times = {key: max(spent, found.time_s[key]) for key, spent in statistics.time_s.items()}  # at the same time
    return replace(statistics, prompts=sorted({*statistics.prompts, *found.prompts}), time_s=times)


def _partial(folder: Path, wanted: Statistics, sites: Sequence[Site]) -> Statistics:
    """What a calibration that was cut off has kept, not read yet.

    Raises:
        UserError: It does not fit.
    """
    found = open_statistics(folder)
    check_fingerprint(found.fingerprint, wanted.fingerprint, folder)
    if found.observer != wanted.observer:
        what = f"the {found.observer} of H, not the {wanted.observer}"
        raise UserError(f"{folder} was begun for {what}; ask for the same, or delete it")
    if missing := [site.name for site in sites if site.name not in found]:
        raise UserError(
            f"{folder} was begun without {len(missing)} of the layers, such as {missing[0]}; delete it to measure all"
        )
    return found


def _measure(
    subject: Subject,
    sites: Sequence[Site],
    conditioning: Conditioning,
    settings: Settings,
    statistics: Statistics,
    unfinished: Unfinished | None,
    quiet: bool,
) -> None:
    """Run this process's share of the trajectories that are in no process's ``statistics`` yet, and add them."""
    started = saved = time.perf_counter()
    before = dict(statistics.time_s)
    there = list(statistics.prompts)
    done = set().union(*from_all(there))  # also: nobody reads what others have left any more
    waiting = [number for number in range(len(conditioning)) if number not in done]
    left = waiting[own_share(len(waiting), settings.batch_size)]
    every = noise_seeds(settings.seed, len(conditioning))
    seeds = [every[number] for number in left]
    rest, pipe = conditioning.rows(left), subject.pipe
    with (
        kept_meanwhile(),
        eval_mode(pipe),
        rounding_calls(subject.graph, statistics.observer),
        counted_calls(subject) as counter,
        collecting(subject, sites, rest, settings, statistics, counter) as collector,
    ):
        batches = run_trajectories(
            subject,
            rest,
            seeds,
            settings.batch_size,
            settings.call,
            partial(collector.begin, rest, seeds),
        )
        for part, latents in track(batches, -(-len(rest) // settings.batch_size), "calibrating", quiet):
            if not bool(torch.isfinite(latents).all()):
                raise UserError(
                    f"calibration gave non-finite latents at prompts {left[part][0]} to {left[part][-1]}; "
                    "the pipeline itself fails there, try another dtype"
                )
            statistics.prompts = sorted(there + left[: part.stop])
            now = time.perf_counter()
            statistics.time_s = {
                "calibrate": before["calibrate"] + now - started,
                "forward_only": before["forward_only"] + collector.forward_s,
            }
            if unfinished is not None and now - saved > SAVE_EVERY_S and part.stop < len(rest):
                save_statistics(statistics, unfinished.folder)
                unfinished.saved()
                saved = time.perf_counter()


def add_up_processes(statistics: Statistics, sites: Sequence[Site]) -> None:
    """Replace every process's sums by those over all of them, so that they all know the same."""
    if world_size() == 1:
        return
    for site in sites:
        statistics.sites[site.name].add_up()
    everyone = from_all((statistics.prompts, statistics.time_s))
    statistics.prompts = sorted(number for prompts, _ in everyone for number in prompts)
    statistics.time_s = {key: max(times[key] for _, times in everyone) for key in statistics.time_s}


def check_measured(sites: Sequence[Site], statistics: Statistics) -> None:
    """Refuse statistics that no solve can go by.

    Raises:
        UserError: A site saw no input, or one that is not finite or all zeros.
    """
    for site in sites:
        found = statistics.sites[site.name]
        if found.num_tokens == 0:
            raise UserError(
                f"layer {site.name} saw no input during calibration; exclude it or use settings under which it runs"
            )
        if not found.is_finite():
            raise UserError(
                f"layer {site.name} saw non-finite activations during calibration; try --dtype float32 or bfloat16"
            )
        if not bool(found.power().sum() > 0):
            raise UserError(f"layer {site.name} saw only zeros during calibration; exclude it")
