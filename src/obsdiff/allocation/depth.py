"""Which stages go: those without which the denoiser's output changes least, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from obsdiff.allocation.effort import MOST_PASSES, TRIPLES
from obsdiff.allocation.planning import depth_of
from obsdiff.allocation.probe import Probe, record_probe
from obsdiff.allocation.restart import Restart
from obsdiff.allocation.scan import BROKEN
from obsdiff.criteria import find_method
from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.info import call_arguments
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.pattern import Depth
from obsdiff.progress import track
from obsdiff.pruning.describe import describe
from obsdiff.pruning.fingerprint import Settings
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.shorten import prune_shorter, removable, shorten, spared_stages, stages_to_remove
from obsdiff.pruning.surgery import Edits
from obsdiff.ranks import rank, solved_in_turn


@dataclass(frozen=True)
class Choice:
    """The stages to remove.

    Attributes:
        stages: Their names in the whole denoiser, the one chosen first first.
        errors: Relative error of the denoiser's guided output after each, against the whole denoiser's.
        alone: The error with each single stage left out that may be.
        triples: Recorded calls that it was measured on.
        denoiser_calls: Calls of the denoiser that it took, recording included; one prompt each.
        time_s: Seconds.
    """

    stages: tuple[str, ...]
    errors: tuple[float, ...]
    alone: dict[str, float] = field(default_factory=dict)
    triples: int = 0
    denoiser_calls: int = 0
    time_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For manifests and reports, beside the stages."""
        return {
            "errors": list(self.errors),
            "alone": self.alone,
            "triples": self.triples,
            "denoiser_calls": self.denoiser_calls,
        }


def runs_needed(candidates: int, count: int, stages: int) -> float:
    """What a choice costs, in multiples of the whole probe through the whole denoiser."""
    return 1 + sum((candidates - i) * (stages - i - 1) / stages for i in range(count))


def triples_for(subject: Subject, depth: Depth, options: PruningOptions, calls: int) -> tuple[int, float]:
    """Triples to record where a calibration pass makes ``calls`` calls, and how many bare passes over them it takes."""
    count = 1 if depth.amount is None else stages_to_remove(subject, depth, options.spare_blocks)
    candidates = sum(reason is None for reason in removable(subject, options.spare_blocks).values())
    runs = runs_needed(candidates, count, len(subject.graph.stages))
    if options.scan.triples is not None:
        return min(options.scan.triples, calls), runs
    return max(4, min(TRIPLES, calls, int(MOST_PASSES * calls / runs))), runs


def probe_of(subject: Subject, depth: Depth, options: PruningOptions, prompts: Sequence[str] | Conditioning) -> Probe:
    """Calls of the whole pipeline to measure the removal of stages on."""
    given = options.calibration
    call = call_arguments(subject.pipe, num_inference_steps=given.steps, guidance_scale=given.guidance_scale)
    weighting = given.weighting or find_method(options.method).weighting
    settings = Settings(call, options.seed, weighting, batch_size=given.batch_size)
    calls = len(prompts) * int(call.get("num_inference_steps") or 1)
    triples, _ = triples_for(subject, depth, options, calls)
    conditioning = prompts if isinstance(prompts, Conditioning) else encode_prompts(subject.pipe, prompts, call)
    return record_probe(subject, conditioning, settings, triples)


def choose_stages(
    subject: Subject,
    depth: Depth,
    options: PruningOptions,
    prompts: Sequence[str] | Conditioning,
    quiet: bool = True,
) -> Choice:
    """Measure each single stage left out on calls of the whole pipeline, take the one that costs least, and go on with
    the shorter denoiser: an interval comes out where an interval is best.

    Args:
        subject: The pipeline; as before afterwards.
        depth: How many stages.
        options: ``spare_blocks``, ``scan.triples``, ``seed``, and of ``calibration`` steps, guidance, weighting and
            batch size.
        prompts: The calibration's.
        quiet: No progress bar.

    Raises:
        UserError: So many stages cannot go.
    """
    started = time.perf_counter()
    count = stages_to_remove(subject, depth, options.spare_blocks)
    probe = probe_of(subject, depth, options, prompts)
    steps = list(islice(removals(subject, Restart(subject.graph, probe), options.spare_blocks, quiet), count))
    stages = tuple(step.stage for step in steps)
    if len(steps) < count:
        raise UserError(f"depth:{depth.amount:g} cannot be met: after {', '.join(stages)} no other stage can go")
    runs = 1 + sum(len(step.measured) for step in steps)
    calls_made = probe.recorded + runs * len(probe)
    errors = tuple(step.measured[step.stage] for step in steps)
    return Choice(stages, errors, dict(steps[0].measured), len(probe), calls_made, time.perf_counter() - started)


@dataclass(frozen=True)
class Removal:
    """One more stage that goes.

    Attributes:
        stage: The one that changes the output least.
        measured: The error with each that could go, beside those that went before.
    """

    stage: str
    measured: dict[str, float]


def removals(
    subject: Subject, restart: Restart, spare_blocks: Sequence[int] | None = None, quiet: bool = True
) -> Iterator[Removal]:
    """Stage after stage, each time the one without which the output of what is left changes least, while any can go.

    Args:
        subject: The pipeline, whole whenever the next is asked for.
        restart: Measures on its calls.
        spare_blocks: Stages that stay.
        quiet: No progress bar.
    """
    candidates = [name for name, reason in removable(subject, spare_blocks).items() if reason is None]
    chosen: list[str] = []

    def measure(name: str) -> float | None:
        edits = Edits()
        try:
            shorten(edits, subject, [*chosen, name])
            return min(restart.error(), BROKEN)
        except UserError:  # it is the last of its stack
            return None
        finally:
            edits.undo()

    while left := [name for name in candidates if name not in chosen]:
        what = f"leaving out stage {len(chosen) + 1}"
        measured = track(solved_in_turn(left, measure), len(left), what, quiet or rank() > 0)
        found = {name: error for name, error in measured if error is not None}
        if not found:
            return
        chosen.append(min(found, key=lambda name: found[name]))
        yield Removal(chosen[-1], found)


def prune_depth(
    subject: Subject,
    plan: Plan,
    options: PruningOptions,
    prompts: Sequence[str] | Conditioning,
    layers: Callable[[Subject, PruningOptions], PruneReport],
    quiet: bool = True,
) -> PruneReport:
    """Remove stages, then prune the layers of the shorter denoiser.

    Args:
        subject: The pipeline. If anything fails, no weight has changed.
        plan: Of the layers; its entries are empty where depth stands alone. It may name the stages itself.
        options: What is asked for.
        prompts: The calibration's.
        layers: Prunes the layers, given the shorter pipeline and what is asked for of it.
        quiet: No progress bars.

    Raises:
        UserError: It cannot be done.
    """
    depth, choice = depth_of(options), None
    if depth is not None:
        choice = choose_stages(subject, depth, options, prompts, quiet)
        plan = replace(plan, pattern=depth, removed=choice.stages)
    own = replace(options, spare_blocks=still_spared(subject, plan.removed, options))
    if depth is not None and depth.then is not None:
        own = replace(own, pattern=str(depth.then))
    rest = (lambda shorter: layers(shorter, own)) if plan.entries else None
    report = prune_shorter(subject, plan, rest, None if choice is None else choice.to_json())
    if choice is not None:
        report.time_s["allocate"] = report.time_s.get("allocate", 0.0) + choice.time_s
    if rest is None and options.dead != "ignore":
        report.dead = dict.fromkeys(subject_of(subject.pipe, subject.conditioning).dead, "left")
    return report


def still_spared(subject: Subject, removed: Sequence[str], options: PruningOptions) -> list[int] | None:
    """The numbers that spared stages have in the shorter denoiser."""
    if options.spare_blocks is None:
        return None
    stages = subject.graph.stages
    spared = spared_stages(stages, options.spare_blocks)
    left = [stage for stage in stages if stage not in removed]
    return [i for i, stage in enumerate(left) if stage in spared]


def describe_depth(subject: Subject, plan: Plan, options: PruningOptions, num_prompts: int) -> str:
    """For people: which stages go, or how they will be chosen."""
    depth = depth_of(options)
    if depth is None:
        return f"{', '.join(plan.removed)} go first, as the plan says"
    given = options.calibration
    call = call_arguments(subject.pipe, num_inference_steps=given.steps, guidance_scale=given.guidance_scale)
    calls = num_prompts * int(call.get("num_inference_steps") or 1)
    triples, runs = triples_for(subject, depth, options, calls)
    if options.budget is not None:
        return (
            f"{describe(depth)} under {options.budget}: each number is calibrated and allocated in turn, until the "
            f"output error on {triples} recorded calls rises"
        )
    return (
        f"{describe(depth)}; which of {len(removable(subject))} go is measured on {triples} recorded calls, "
        f"{runs * triples / calls:.1f} times the denoiser calls of a calibration pass"
    )
