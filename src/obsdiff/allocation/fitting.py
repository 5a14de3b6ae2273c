"""Choosing batches and a way to calibrate so that a prune fits the memory there is, before any of it is done."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from obsdiff.allocation.planning import (
    allocates,
    calibrates_once,
    check_options,
    check_products,
    first_plan,
    needs_for,
    packages_for,
)
from obsdiff.allocation.request import check_offload
from obsdiff.allocation.shapes import (
    bytes_at_hand,
    bytes_outside,
    component_bytes,
    scan_of,
    shapes_of,
    sites_of,
    solving_of,
)
from obsdiff.errors import UserError
from obsdiff.evaluation.call_memory import call_shapes
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.memory import resident_memory_bytes
from obsdiff.models.info import call_arguments
from obsdiff.models.loading import split_source
from obsdiff.models.offload import shelf_of
from obsdiff.models.subject import Subject, subject_of
from obsdiff.models.weightless import open_weightless
from obsdiff.numbers import bytes_text, parse_bytes
from obsdiff.obs.observers import PASSES, observer_for
from obsdiff.obs.pattern import of_layers, parse_request
from obsdiff.peaks import Moment, Peaks
from obsdiff.pruning.folder import PIPELINE, run_folder
from obsdiff.pruning.manifest import read_manifest
from obsdiff.pruning.memory_plan import MemoryPlan, memory_plan
from obsdiff.pruning.memory_shapes import Batches, Scan, Shapes, Solving
from obsdiff.pruning.options import PruneOptions
from obsdiff.pruning.plan import Plan, packages_of, stage_packages
from obsdiff.pruning.stream import check_repeats
from obsdiff.pruning.time_plan import Amount, Speed, TimePlan, largest_share, products_per_s, time_plan
from obsdiff.ranks import started_processes

MOST_PACKAGES = 16  # tried; each is a whole calibration pass
CONTEXT_BYTES = 600 * 2**20  # assumed of a CUDA device: its context and the workspaces of its libraries
RUN_BYTES = 120 * 2**20  # of libraries that a run first needs while it runs, measured on a CPU (docs/performance.md)


@dataclass(frozen=True)
class Room:
    """What may be used; None: all there is."""

    device: int | None = None
    host: int | None = None

    def holds(self, plan: Peaks) -> bool:
        """Whether a plan fits."""
        return self.lacks(plan) == 0

    def lacks(self, plan: Peaks) -> int:
        """Bytes by which a plan does not fit."""
        most = plan.device_bytes + (0 if plan.on_host else CONTEXT_BYTES)
        taken = ((most, self.device), (plan.host_bytes, self.host))
        return sum(max(0, size - limit) for size, limit in taken if limit is not None)

    def exceeded(self, plan: Peaks, what: str) -> tuple[str, Moment, int]:
        """Of a plan that does not fit: what ``what`` takes and the limit, for people; when that is, and bytes of it."""
        over_host = self.host is not None and plan.host_bytes > self.host
        name, limit = ("host", self.host) if over_host else ("device", self.device)
        most = plan.host_bytes if over_host else plan.device_bytes + CONTEXT_BYTES
        moment = plan.host if over_host or plan.device is None else plan.device
        taken = f"{what} {bytes_text(most)} of {name} memory, while {moment.name}"
        return f"{taken}; --{name}_memory is {bytes_text(limit or 0)}", moment, most


@dataclass(frozen=True)
class Planned:
    """A prune, planned.

    Attributes:
        options: As asked for, with what was chosen.
        memory: What it will need.
        time: How long it will take here; None where its device is not this machine's.
        prompts, steps: Of each calibration pass.
        shapes: What it was planned from.
        notes: What could not be counted.
        chosen: For people: options with what was chosen of them, where that is not what was asked for; "" if it is.
    """

    options: PruneOptions
    memory: MemoryPlan
    time: TimePlan | None
    prompts: int
    steps: int
    shapes: Shapes
    notes: tuple[str, ...] = ()
    chosen: str = ""


@dataclass(frozen=True)
class _Work:
    """What does not depend on batches and packages; of the calls that a streamed calibration records, the bytes of
    their arguments, of what a stage has answered to them, and of what it has in all processes."""

    subject: Subject
    plan: Plan
    options: PruneOptions
    statistics: Path | None
    shapes: Shapes
    solving: Solving
    scan: Scan | None
    on_host: bool
    recorded: int
    answers: int
    all_answers: int

    def memory(self, prompts: int, images: int, packages: int) -> MemoryPlan:
        """With these batches and so many packages."""
        stored, settings = self.statistics is not None, self.options.calibration
        held = on_disk = 0
        if settings.streamed and self.solving.measured:
            away = settings.calls_on_disk
            held, on_disk = self.recorded + (0 if away else self.answers), self.all_answers if away else 0
        if stored or not self.plan.entries:
            passes: Any = [[site.name for site in sites_of(self.subject.graph, self.plan, stored)]]
        elif settings.streamed:
            passes = stage_packages(self.subject.graph, self.plan)
        else:
            passes = packages_of(self.subject.graph, self.plan, packages)
        return memory_plan(
            self.shapes,
            self.solving,
            Batches(prompts, images, tuple(map(tuple, passes)), held, on_disk),
            prompts=settings.num_prompts,
            images=self.options.evaluation.num_images,
            on_host=self.on_host,
            scan=self.scan,
            processes=started_processes(),
        )

    def calibrating(self, **changes: Any) -> _Work:
        """With other options of the calibration."""
        calibration = replace(self.options.calibration, **changes)
        return replace(self, options=replace(self.options, calibration=calibration))


def room_of(options: Any, device: str) -> Room:
    """What the options (``device_memory``, ``host_memory``) let a run use.

    Raises:
        UserError: A size is none, or one is given for a device that has no memory of its own.
    """
    own = None if options.device_memory is None else parse_bytes("device_memory", options.device_memory)
    host = None if options.host_memory is None else parse_bytes("host_memory", options.host_memory)
    if own is not None and torch.device(device).type == "cpu":
        raise UserError("--device_memory is that of a cuda device, and this run is on the cpu; give --host_memory")
    return Room(own, host)


def plan_from_configs(options: PruneOptions, device: str) -> Planned:
    """Plan a prune from its pipeline's config files alone, and fit it into the memory that the options name.

    Raises:
        UserError: The pipeline cannot be built, or nothing fits.
    """
    room = room_of(options, device)
    planned, work = _planned(open_unloaded(options.pipeline, options.dtype), options, device, room)
    if not room.holds(planned.memory):
        raise UserError(_refusal(planned, work, room, device))
    return planned


def plan_loaded(subject: Subject, options: PruneOptions, flops: int | None = None) -> Planned:
    """The same for a pipeline that is loaded, which makes one of its calls; nothing is refused or chosen.

    Args:
        subject, options: What is pruned, and how.
        flops: Of one call with one image without guidance, if they are known.
    """
    device, on_host = str(subject.pipe._execution_device), options.offload or subject.pipe.device.type == "cpu"
    weights = sum(component_bytes(subject.pipe).values())
    if (shelf := shelf_of(subject.denoiser)) is not None:
        shelf.drop()
        weights = bytes_outside(subject)
    imports = resident_memory_bytes() - (weights if on_host else 0)
    if options.offload:  # counting a call of its own would count the blocks that move
        subject = open_unloaded(options.pipeline, options.dtype)
    return _planned(subject, options, device, Room(), imports, flops)[0]


def plan_unloaded(subject: Subject, options: PruneOptions, device: str) -> Planned:
    """The same for a pipeline without weights (:func:`open_unloaded`)."""
    return _planned(subject, options, device, Room())[0]


def open_unloaded(source: str, dtype: str | None) -> Subject:
    """A pipeline, or that of a prune run, without weights."""
    folder = run_folder(source)
    if folder is None:
        return subject_of(open_weightless(split_source(source)[0], dtype or "float32", source))
    return subject_of(open_weightless(str(folder / PIPELINE), dtype or read_manifest(folder)["dtype"], source))


def _planned(
    subject: Subject,
    options: PruneOptions,
    device: str,
    room: Room,
    imports: int | None = None,
    flops: int | None = None,
) -> tuple[Planned, _Work]:
    settings, statistics = options.calibration, None if options.statistics is None else Path(options.statistics)
    check_offload(options)
    check_options(options, statistics, None if options.sensitivity is None else Path(options.sensitivity))
    here = torch.device(device).type == "cpu" or torch.cuda.is_available()  # the device is this machine's
    if here:
        check_products(options, statistics, torch.device(device))
    graph = subject.graph
    if settings.streamed and needs_for(options, statistics):
        check_repeats(subject)
    plan = first_plan(graph, options)
    stored = statistics is not None
    call = call_arguments(subject.pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
    steps = int(call.get("num_inference_steps") or 1)
    drawn = options.evaluation.num_images > 0
    observer = observer_for(needs_for(options, statistics) - PASSES)
    calls = call_shapes(subject, call, sites_of(graph, plan, stored), observer, drawn)
    imports = resident_memory_bytes() if imports is None else imports
    shapes = shapes_of(subject, plan, calls, stored, max(imports, 0) + RUN_BYTES)
    if options.offload or options.weights_on_disk:
        shapes = replace(shapes, at_hand=bytes_at_hand(subject), on_disk=options.weights_on_disk)
    solving = solving_of(options, plan, graph, statistics, packages_for(options, statistics), device)
    scan = scan_of(subject, plan, options, calls, settings.num_prompts, steps)
    each = 2 if asks_twice(subject, call) else 1
    own = settings.num_prompts * largest_share(settings.num_prompts, settings.batch_size, started_processes())
    recorded = round(own * each * (calls.arguments + steps * calls.sample))
    answers, all_answers = (round(n * each * steps * calls.waiting) for n in (own, settings.num_prompts))
    on_host = torch.device(device).type == "cpu"
    work = _Work(subject, plan, options, statistics, shapes, solving, scan, on_host, recorded, answers, all_answers)
    whole = _why_whole(work)
    memory, chosen = _fit(work, room, whole)
    spent = None
    if here:
        scanned, levels = (0.0, 1) if scan is None else (scan.calls, scan.levels)
        images = options.evaluation.num_images
        flops = (flops or denoiser_flops(subject, call)) * calls.rows
        speed = Speed(products_per_s(device), flops, calls.operations)
        amount = Amount(settings.num_prompts, steps, images, scanned, levels)
        spent = time_plan(shapes, solving, memory.batches, speed, amount, started_processes())
    notes = [calls.note] if calls.note else []
    if options.offload:
        notes.append("the time that it takes to move blocks to the device and back is not counted")
    if options.weights_on_disk:
        notes.append(
            "the time that it takes to read blocks, where the system's cache does not hold them, is not counted"
        )
    if options.reconstruction.asked:
        notes.append("the reconstruction of stages is not counted")
    if plan.removed or parse_request(options.pattern) != of_layers(parse_request(options.pattern)):
        notes.append("stages that go are counted as if they stayed, and what choosing them takes is not counted")
    if options.evaluation.measures:
        notes.append("networks that measure images are not counted")
    text = _told(options, chosen)
    if chosen.calibration.packages != settings.packages:
        text += f" (not stage by stage: {whole or 'that does not fit'})"
    return Planned(chosen, memory, spent, settings.num_prompts, steps, shapes, tuple(notes), text), work


def asks_twice(subject: Subject, call: Mapping[str, Any]) -> bool:
    """Whether the pipeline asks for the negative prompt in a call of its own."""
    accepted = inspect.signature(type(subject.pipe).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"  # else it is told to the denoiser
    return subject.family.guidance == "calls" and (call.get(scale) or 0) > 1


def _fit(work: _Work, room: Room, whole: str) -> tuple[MemoryPlan, PruneOptions]:
    """The first plan that fits: by the first way that does (:func:`_ways`), with the largest batches up to those that
    were given; where none does, the one that lacks least."""
    options = work.options
    given, drawn = options.calibration.batch_size, options.evaluation.batch_size
    least, found = packages_for(options, work.statistics), list[tuple[MemoryPlan, PruneOptions]]()
    for way, packages in _ways(work, least, whole):
        images = next((b for b in _halves(drawn) if room.holds(way.memory(1, b, packages))), None)
        if images is not None:
            prompts = next(b for b in _halves(given) if b == 1 or room.holds(way.memory(b, images, packages)))
            return way.memory(prompts, images, packages), _with(way.options, prompts, images)
        found.append((way.memory(1, 1, packages), _with(way.options, 1, 1)))
    return min(found, key=lambda planned: room.lacks(planned[0]))


def _ways(work: _Work, least: int, whole: str) -> Iterator[tuple[_Work, int]]:
    """Ways to calibrate, with the packages of each: as it is asked for; stage by stage where nobody said how, which
    costs two more passes of the denoiser and nothing in quality; that with its calls on the disk; and in more packages,
    each of which is a pass, and which cost quality."""
    yield work, least
    settings = work.options.calibration
    if work.solving.measured and (settings.streamed or not whole):
        if not settings.streamed:
            yield work.calibrating(streamed=True), 1
        if not settings.calls_on_disk:
            yield work.calibrating(streamed=True, calls_on_disk=True), 1
    if _may_split(work):
        yield from ((work.calibrating(packages=count), count) for count in range(least + 1, MOST_PACKAGES + 1))


def _with(options: PruneOptions, prompts: int, images: int) -> PruneOptions:
    return replace(
        options,
        calibration=replace(options.calibration, batch_size=prompts),
        evaluation=replace(options.evaluation, batch_size=images),
    )


def _may_split(work: _Work) -> bool:
    """Whether sites may be measured one after the other: nobody said how, and one calibration is not needed."""
    settings, once = work.options.calibration, calibrates_once(work.options, work.statistics)
    return settings.packages is None and not settings.streamed and not once and work.solving.measured


def _why_whole(work: _Work) -> str:
    """For people: why sites cannot be measured stage by stage without being asked; "" where they can."""
    if not _may_split(work):
        return "the request says how"
    try:
        check_options(work.calibrating(streamed=True).options)
        check_repeats(work.subject)
    except UserError as error:
        return str(error).rpartition("; ")[0]  # what follows is advice for one who asked
    return ""


def _told(asked: PruneOptions, chosen: PruneOptions, batches: bool = True) -> str:
    """For people: what was chosen of the options, where that is not what was asked for."""
    names = ["calibration.streamed", "calibration.calls_on_disk", "calibration.packages"]
    names += ["calibration.batch_size", "evaluation.batch_size"] if batches else []
    said = ((name, attrgetter(name)(asked), attrgetter(name)(chosen)) for name in names)
    return " ".join(f"--{name} {str(then).lower()}" for name, before, then in said if before != then)


def _halves(given: int) -> Iterator[int]:
    while given > 1:
        yield given
        given //= 2
    yield 1


def _refusal(planned: Planned, work: _Work, room: Room, device: str) -> str:
    """One line: what the smallest plan needs and when, and what would fit."""
    said, _, most = room.exceeded(planned.memory, "this prune takes at least")
    return f"{said}. What would fit: {_what_fits(work, room, device, most)}"


def _what_fits(work: _Work, room: Room, device: str, most: int) -> str:
    options, calibration = work.options, work.options.calibration
    uniform = replace(options, allocation="uniform", budget=None, statistics=None, sensitivity=None)
    ways: list[tuple[str, PruneOptions]] = []
    if allocates(options) or work.statistics is not None:
        ways.append(("--allocation uniform", uniform))
    plain, said = (uniform, "--allocation uniform ") if ways else (options, "")
    streamed = replace(plain, calibration=replace(calibration, streamed=True, packages=None))
    said += "--calibration.streamed true"
    split = calibration.packages is not None  # else stages are tried anyway
    if split:
        ways.append((said, streamed))
    if options.dtype in (None, "float32"):
        ways.append(("--dtype bfloat16", replace(options, dtype="bfloat16")))
        ways.append(("--dtype bfloat16 --allocation uniform", replace(uniform, dtype="bfloat16")))
    if torch.device(device).type != "cpu" and not (options.offload or options.reconstruction.asked):
        ways.append((f"{said} --offload true", replace(streamed, offload=True)))
    if torch.device(device).type == "cpu" and not options.weights_on_disk:
        ways.append(("--weights_on_disk true", replace(options, weights_on_disk=True)))
        ways.append(("--allocation uniform --weights_on_disk true", replace(uniform, weights_on_disk=True)))
        if split:
            ways.append((f"{said} --weights_on_disk true", replace(streamed, weights_on_disk=True)))
    for text, other in ways:
        try:
            subject = work.subject if other.dtype == options.dtype else open_unloaded(other.pipeline, other.dtype)
            planned, _ = _planned(subject, other, device, room)
        except UserError:
            continue  # this way is none with these options
        if room.holds(planned.memory):
            more = _told(other, planned.options, batches=False)
            instead = " in place of --calibration.packages" if split and other.calibration.packages is None else ""
            on_device = room.device is not None and not planned.memory.on_host
            taken = planned.memory.device_bytes if on_device else planned.memory.host_bytes
            return f"{text}{more and ' '}{more}{instead} ({bytes_text(taken)})"
    return f"{bytes_text(most)} or more of it, or a smaller pipeline"
