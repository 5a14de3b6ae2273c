"""Calibration stage by stage: calls recorded once on the dense pipeline's way, and carried through the pruned stages.

A stage is measured on what the pruned stages before it make of the recorded calls, so that what they lost is seen by
those behind them (as with packages, OBS-Diff 2510.06751 §4.2, and as GPTQ 2210.17323 and SparseGPT 2301.00774 go
through a language model), while only the statistics of one stage are held, and the denoiser runs about three times in
all: recording, measuring, going on.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.calls import arguments_of
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.denoisers import device_of, parts_of
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.nested import kept_once
from obsdiff.models.offload import turn_of
from obsdiff.models.replay import MadeCall, answering, passing_stages, stopping
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.observers import PASSES, observer_for, rounding
from obsdiff.obs.precision import check_precision
from obsdiff.progress import track
from obsdiff.pruning.alphas import named_weighting
from obsdiff.pruning.calibrate import add_up_processes, check_measured, check_settings
from obsdiff.pruning.collect import collecting, rounding_calls
from obsdiff.pruning.fingerprint import Settings, fingerprint_of
from obsdiff.pruning.statistics import Statistics
from obsdiff.pruning.trajectories import CallCounter, counted_calls, noise_seeds, run_trajectories, seen_calls
from obsdiff.ranks import own_share, rank
from obsdiff.spill import Spill


def stream(
    pipe: Any,
    prompts: Sequence[str] | Conditioning,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    weighting: str = "log_decrease",
    tokens: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    needs: Collection[str] = ("gram",),
    quiet: bool = True,
) -> Stream:
    """A calibration that goes through the stages with :func:`obsdiff.prune`, as its ``statistics``.

    Args:
        pipe, prompts, steps, guidance_scale, weighting, tokens, batch_size, seed, needs, quiet: As for
            :func:`obsdiff.calibrate`; what takes a pass of its own (gradients, gates) cannot be had.

    Raises:
        UserError: The settings are wrong, the method goes by gradients or gates, or a block runs more than once in a
            call.
    """
    subject = subject_of(pipe, prompts)
    call = call_arguments(subject.pipe, num_inference_steps=steps, guidance_scale=guidance_scale)
    settings = Settings(call, seed, weighting, tokens, batch_size)
    check_settings(settings, prompts)
    wanted = {needs} if isinstance(needs, str) else set(needs)
    if wanted & PASSES:
        raise UserError(f"{', '.join(sorted(wanted & PASSES))} are measured on the whole denoiser, not stage by stage")
    check_repeats(subject)
    settings = replace(settings, weighting=named_weighting(subject, prompts, weighting, call, seed))
    observer = observer_for(wanted)
    check_precision(wanted, device_of(subject.denoiser))
    fingerprint = fingerprint_of(subject, prompts, settings) | rounding(observer)
    told = prompts if isinstance(prompts, Conditioning) else encode_prompts(subject.pipe, prompts, call)
    return Stream(subject, told, settings, fingerprint, observer, quiet)


def check_repeats(subject: Subject) -> None:
    """Refuse a denoiser that is not gone through stage by stage.

    Raises:
        UserError: A block runs more than once in a call.
    """
    if subject.graph.repeats:
        raise UserError(f"this {subject.family.denoiser} runs a block more than once in a call; calibrate in packages")


@dataclass(kw_only=True)
class _Call(MadeCall):
    """A call of the dense pipeline.

    Attributes:
        part: The prompts of its batch.
        step: Calls so far in this trajectory, step, and steps, as the counter told them.
    """

    part: slice
    step: tuple[int, int, int]


class Stream:
    """Statistics of one stage after the other, each measured on what the denoiser as it is now makes of the calls.

    Attributes:
        subject: The pipeline.
        fingerprint: What the numbers depend on.
    """

    def __init__(
        self,
        subject: Subject,
        told: Conditioning,
        settings: Settings,
        fingerprint: dict[str, Any],
        observer: str,
        quiet: bool,
    ) -> None:
        self.subject, self.fingerprint = subject, fingerprint
        self._settings, self._observer, self._quiet = settings, observer, quiet or rank() > 0
        self._share = own_share(len(told), settings.batch_size)
        self._told = told[self._share]
        self._seeds = noise_seeds(settings.seed, len(told))[self._share]
        self._calls: list[_Call] | None = None
        self._spill: Spill | None = None
        self._passing: frozenset[str] = frozenset()  # stages whose answers only the next one reads

    def runs(self, subject: Subject) -> bool:
        """Whether its calls are those of the same denoisers."""
        return all(map(operator.is_, self.subject.components.values(), subject.components.values()))

    def keep_on_disk(self, folder: Path) -> None:
        """Let what a stage answers to the calls wait for the next one in a file without a name, not in host memory.

        Args:
            folder: On whose disk; made where it is not there.

        Raises:
            UserError: It cannot be written, or calls are recorded already.
        """
        if self._calls is not None:
            raise UserError("the calls of this stream are recorded already; say where they wait before")
        self._spill = Spill(folder)

    @torch.no_grad()
    def record(self) -> list[_Call]:
        """Make the calls, once; the denoiser has to be dense still.

        Raises:
            UserError: The pipeline gives something that is not finite.
        """
        graph = self.subject.graph
        if self._calls is None:
            with eval_mode(self.subject.pipe), rounding_calls(graph, self._observer):
                self._calls = self._recorded()
                self._passing = passing_stages(graph.denoiser, graph.stages, graph.chains, self._calls)
        return self._calls

    @torch.no_grad()
    def __call__(self, sites: Collection[str]) -> Statistics:
        """Measure some sites on the denoiser as it is now.

        Args:
            sites: Of the stages that come next; never of one before those that were asked about already.

        Raises:
            UserError: Non-finite activations, a layer that saw no input.
        """
        started, graph = time.perf_counter(), self.subject.graph
        calls = self.record()
        chosen = [site for site in (*graph.vectors, *graph.sites) if site.name in sites]
        statistics = Statistics(self.fingerprint, observer=self._observer)
        counter = CallCounter(self.subject.pipe, self.subject.family.time)
        with eval_mode(self.subject.pipe), rounding_calls(graph, self._observer):
            first, last = (of(site.stage for site in chosen) for of in (min, max))
            asked = graph.stages[first : last + 1]
            if turn_of(graph.denoiser) is not None:
                self._go_on(graph.stages[:first])
            with (
                collecting(self.subject, chosen, self._told, self._settings, statistics, counter) as collector,
                answering(graph.denoiser, graph.stages[:first]) as replay,
                stopping(graph.layer(asked[-1])),
            ):
                passed = [call for call in calls if call.passes(asked)]
                for call in track(passed, len(passed), f"calibrating {asked[-1]}", self._quiet):
                    collector.begin(self._told, self._seeds, call.part)
                    counter.calls, counter.index, counter.total = call.step
                    if replay.run(call) is None:
                        collector.leave_call()
                    call.forget(graph.stages, self._passing)
        statistics.prompts = range(self._share.start, self._share.start + len(self._told))
        statistics.time_s = {"calibrate": time.perf_counter() - started, "forward_only": collector.forward_s}
        add_up_processes(statistics, chosen)
        check_measured(chosen, statistics)
        return statistics

    def _go_on(self, stages: Sequence[str]) -> None:
        """Let stages answer the calls one after the other, so that each moves to the device once, not in every call."""
        assert self._calls is not None
        graph = self.subject.graph
        for at, stage in enumerate(stages):
            waiting = [c for c in self._calls if c.passes([stage]) and stage not in c.answers]
            with answering(graph.denoiser, stages[: at + 1]) as replay, stopping(graph.layer(stage)):
                for call in waiting:
                    replay.run(call)
                    call.forget(graph.stages, self._passing)

    def _recorded(self) -> list[_Call]:
        """The denoiser's calls on the dense pipeline's way."""
        calls: list[_Call] = []
        now = slice(0)

        def begin(part: slice) -> None:
            nonlocal now
            counter.restart()
            now = part

        def see(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # the call before, or the one before that, where a negative prompt's is in between
            earlier = [call.arguments for call in calls[-2:] if call.part is now]
            given = kept_once(arguments_of(model, args, kwargs) | {"return_dict": False}, earlier)
            step = counter.calls, counter.index, counter.total
            calls.append(_Call(model, prefixes[id(model)], given, spill=self._spill, part=now, step=step))

        subject, settings = self.subject, self._settings
        prefixes = {id(model): prefix for prefix, model in parts_of(subject.denoiser).items()}
        with counted_calls(subject) as counter, seen_calls(subject, see):
            batches = run_trajectories(subject, self._told, self._seeds, settings.batch_size, settings.call, begin)
            for part, latents in track(batches, -(-len(self._told) // settings.batch_size), "recording", self._quiet):
                if not bool(torch.isfinite(latents).all()):
                    raise UserError(
                        f"recording gave non-finite latents at prompts {part.start} to {part.stop - 1}; the pipeline "
                        "itself fails there, try another dtype"
                    )
        return calls
