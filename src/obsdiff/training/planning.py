"""What a recovery needs of memory and time, before anything of it is done: a step runs on the meta device, all the rest
is arithmetic on shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.allocation.fitting import (
    RUN_BYTES,
    Planned,
    Room,
    asks_twice,
    open_unloaded,
    plan_unloaded,
)
from obsdiff.allocation.planning import first_plan
from obsdiff.allocation.shapes import component_bytes
from obsdiff.costs import step_flops
from obsdiff.errors import UserError
from obsdiff.evaluation.call_memory import CallShapes, call_shapes
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.references import UNGUIDED
from obsdiff.export.memory_report import moment_table, most_lines
from obsdiff.memory import resident_memory_bytes
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.latents import encode_images
from obsdiff.models.subject import Subject
from obsdiff.models.told import Told
from obsdiff.models.weightless import peaks_of_models
from obsdiff.peaks import Peaks
from obsdiff.progress import duration
from obsdiff.pruning.folder import MASKS
from obsdiff.pruning.manifest import read_manifest
from obsdiff.pruning.masks import load_masks, weight_masks
from obsdiff.pruning.options import EvaluationOptions, PruneOptions, PruningOptions
from obsdiff.pruning.record import INDEX
from obsdiff.pruning.time_plan import Speed, products_per_s
from obsdiff.training.fits import check_guided, check_images
from obsdiff.training.memory_plan import Sizes, moments_of
from obsdiff.training.objectives import teacher_runs
from obsdiff.training.selection import check_selection, choose_trained
from obsdiff.training.stage import PRUNED, given_run, pruned_before, request_of, settled, store_of
from obsdiff.training.step_memory import StepMemory, step_memory, told_to

TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
STEP = "one step"
LESS_RECORDING = "a smaller --data.record_batch_size"
LESS_PRUNING = (
    "--model.pruning.allocation uniform, --model.pruning.calibration.streamed true (with calls_on_disk true), a "
    "smaller --model.pruning.calibration.batch_size"
)
LESS_TRAINING = (
    "a smaller --data.batch_size with --trainer.accumulate_grad_batches, --model.trained.gradient_checkpointing true, "
    "--model.trained.lora_rank with --model.trained.frozen_dtype bfloat16, --trainer.precision bf16-true, a smaller "
    "--model.evaluation.batch_size"
)
DRAWN_SETS = 4  # dense and pruned, with guidance and without


@dataclass(frozen=True)
class Settings:
    """What a recovery is about to do.

    Attributes:
        module: The :class:`obsdiff.training.recovery.Recovery`.
        data: Its data module.
        device: Such as "cpu" or "cuda:0".
        precision: Lightning's name of it.
        averaged: Whether an average of the weights is kept.
        steps: Of training; None where nobody said.
        processes: That train together.
        accumulated: Batches of an optimizer step.
    """

    module: Any
    data: Any
    device: str
    precision: str
    averaged: bool
    steps: int | None
    processes: int = 1
    accumulated: int = 1


@dataclass(frozen=True)
class RecoveryPlan:
    """What a recovery will need.

    Attributes:
        memory: At its moments.
        trained: Parameters that are trained.
        dense: Parameters of the dense denoiser.
        time_s: Seconds by stage, and of one step; empty where the device is not on this machine.
        pruning: The one-shot stage, if it is still to come.
        notes: What could not be counted.
    """

    memory: Peaks
    trained: int
    dense: int
    time_s: Mapping[str, float]
    pruning: Planned | None
    notes: tuple[str, ...]


def plan_recovery(settings: Settings) -> RecoveryPlan:
    """Plan a recovery from configs alone.

    Raises:
        UserError: The pipeline cannot be built, or its step does not run without weights.
    """
    module, data = settings.module, settings.data
    folder = _pruned_folder(module)
    dense = open_unloaded(_dense_source(module, folder), "float32")
    _check(module, data, dense)
    pruning = None
    masked, cut = list[str](), False
    if folder is None and module.pruning is not None:
        options = _prune_options(module)
        pruning = plan_unloaded(dense, options, settings.device)
        plan = first_plan(dense.graph, options)
        masked, cut = list(plan.weights), plan.structured
    student = open_unloaded(module.pipeline if folder is None else str(folder), "float32")
    manifest = {} if folder is None else read_manifest(folder)
    if folder is not None:
        masked = list(weight_masks(load_masks(folder / MASKS), manifest["shrunk"] is not None))
    masks = _masks(student, masked)
    call = call_arguments(dense.pipe)
    calls = call_shapes(dense, call, (), "gram", module.evaluation.num_images > 0)
    shape = getattr(data, "image_shape", None)
    parts, loaded = component_bytes(dense.pipe), component_bytes(student.pipe)
    encoding, latents = (0, None) if shape is None else _encoding(student, data.batch_size, shape)
    guided = "distill_guided" in module.weights
    share = -(-data.batch_size // len(student.components))
    told = told_to(student, share, guided, latents, None if shape is None else (shape[1], shape[2]))
    teachers = list(dense.components.values()) if teacher_runs(module.weights, _records(data)) else []
    kept = (manifest.get("depth") or {}).get("kept")
    step = _step(settings, student, teachers, masks, told, kept)
    trained = [p for p in student.denoiser.parameters() if p.requires_grad]
    result = sum(loaded[name] for name in student.components)
    rounded = settings.precision in TRUE or module.trained.frozen_dtype not in (None, "float32")
    prompts, drawn = len(getattr(data, "prompts", ())), module.evaluation
    recording = _recording(dense, data, calls, told, prompts) if _records(data) else 0
    recorded = _records(data) and not (data.folder / INDEX).exists()
    sizes = Sizes(
        process=max(resident_memory_bytes(), 0) + RUN_BYTES,
        whole=sum(parts.values()),
        dense=sum(parts[name] for name in dense.components),
        others=sum(size for name, size in loaded.items() if name not in student.components),
        student=result,
        training=sum(t.nbytes for t in (*student.denoiser.parameters(), *student.denoiser.buffers())),
        teacher=sum(p.nbytes for teacher in teachers for p in teacher.parameters()),
        masked=sum(mask.numel() for mask in masks.values()),
        converted=result if rounded else 0,
        anew=result if rounded or module.trained.lora_rank is not None else 0,
        average=sum(p.nbytes for p in trained) if settings.averaged else 0,
        step=step.peak,
        moments=step.kept,
        gradients=step.gradients,
        encoding=encoding,
        recording=recording,
        shard=recording * min(data.record_batch_size, prompts) // max(prompts, 1) if recorded else 0,
        images=DRAWN_SETS * drawn.num_images * calls.image,
        drawing=min(drawn.batch_size, drawn.num_images) * max(calls.call, calls.decode, calls.text),
        recorded=min(data.record_batch_size, prompts) * max(calls.call, calls.text) if recorded else 0,
    )
    on_host = torch.device(settings.device).type == "cpu"
    before = () if pruning is None else pruning.memory.moments
    moments = tuple(moments_of(sizes, before, _records(data), on_host))
    return RecoveryPlan(
        Peaks(moments=moments, on_host=on_host),
        sum(p.numel() for p in trained),
        sum(p.numel() for p in dense.denoiser.parameters()),
        _times(settings, dense, calls, prompts if recorded else 0, bool(teachers), pruning),
        pruning,
        tuple(_notes(settings, calls, pruning, cut)),
    )


def check_room(plan: RecoveryPlan, room: Room) -> None:
    """Refuse a recovery that does not fit.

    Raises:
        UserError: Saying what it needs, when, and what takes less.
    """
    if room.holds(plan.memory):
        return
    said, moment, _ = room.exceeded(plan.memory, "this recovery takes")
    before = () if plan.pruning is None else [part.name for part in plan.pruning.memory.moments]
    less = LESS_RECORDING if moment.name == "recording" else LESS_PRUNING if moment.name in before else LESS_TRAINING
    raise UserError(f"{said}. Less takes: {less}")


def plan_text(plan: RecoveryPlan, settings: Settings) -> str:
    """All that is known: what is trained, each moment's parts, time."""
    module = settings.module
    terms = " + ".join(module.weights)
    shares = f"{plan.trained:,} of {plan.dense:,} parameters" if plan.trained != plan.dense else f"{plan.dense:,}"
    lines = [
        f"{module.pipeline}: recovery by {terms} in batches of {settings.data.batch_size}, planned without weights",
        f"trained: {shares}",
        "",
        *moment_table(plan.memory),
        "",
        *most_lines(plan.memory),
    ]
    stages = {name: seconds for name, seconds in plan.time_s.items() if name != STEP and seconds}
    if plan.time_s:
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items())
        step = f"{STEP} {plan.time_s[STEP]:.2g} s"
        lines.append(f"time: about {duration(sum(stages.values()))} on this machine ({listed}; {step})")
    else:
        lines.append("time: unknown: the device is not on this machine")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


# ---- what there is


def _check(module: Any, data: Any, dense: Subject) -> None:
    """What a fit refuses as well."""
    check_selection(dense.denoiser, module.trained)
    if "distill_guided" in module.weights:
        check_guided(dense, None)
    if (shape := getattr(data, "image_shape", None)) is not None:
        check_images(dense, shape, str(getattr(data, "source", None) or type(data).__name__))


def _pruned_folder(module: Any) -> Path | None:
    """The prune run that it starts from, if that is there already."""
    given = given_run(module.pipeline, module.pruning)
    if module.pruning is None:
        return given
    own: Path = module.output / PRUNED
    return own if pruned_before(own, request_of(module.pipeline, module.pruning), module.overwrite) else None


def _dense_source(module: Any, folder: Path | None) -> str:
    if module.pruning is not None or folder is None:
        return str(module.pipeline)
    return str(read_manifest(folder).get("pipeline") or module.pipeline)


def _prune_options(module: Any) -> PruneOptions:
    pruning = settled(module.pruning)
    given = {field.name: getattr(pruning, field.name) for field in fields(PruningOptions)}
    store = store_of(pruning, module.output)
    return PruneOptions(
        pipeline=module.pipeline,
        output=str(module.output),
        statistics=None if store is None else str(store),
        evaluation=EvaluationOptions(num_images=0),
        **given,
    )


def _masks(subject: Subject, layers: list[str]) -> dict[str, Tensor]:
    """Of the layers whose single weights went."""
    modules = dict(subject.denoiser.named_modules())
    found = {name: getattr(modules.get(name), "weight", None) for name in layers}
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in found.items() if w is not None}


def _records(data: Any) -> bool:
    return hasattr(data, "trajectories")


def _recorded_call(subject: Subject, data: Any) -> dict[str, Any]:
    steps, scale = (getattr(data, name, None) for name in ("steps", "guidance_scale"))
    return call_arguments(subject.pipe, num_inference_steps=steps, guidance_scale=scale)


def _asked(subject: Subject, call: Mapping[str, Any], calls: CallShapes) -> int:
    """Rows that the denoiser answers for each prompt and step."""
    return 2 * calls.rows if asks_twice(subject, call) else calls.rows


def _recording(subject: Subject, data: Any, calls: CallShapes, told: Told, prompts: int) -> int:
    """Latents, answers to both prompts, and what every prompt is told."""
    call = _recorded_call(subject, data)
    sample, answers = calls.sample // calls.rows, _asked(subject, call, calls)
    embeds = sum(value.nbytes // len(told.latents) for value in told.embeds.values())
    return prompts * (int(call.get("num_inference_steps") or 1) * sample * (1 + answers) + embeds)


def _encoding(subject: Subject, size: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Of a batch of images: the autoencoder's activations, and the shape of one's latents."""
    with peaks_of_models(subject.pipe) as peaks, torch.no_grad():
        latents = encode_images(subject.pipe, torch.zeros(size, *shape), torch.Generator())
        return max(peaks.values(), default=0), tuple(latents.shape[1:])


def _step(
    settings: Settings,
    student: Subject,
    teachers: list[nn.Module],
    masks: Mapping[str, Tensor],
    told: Told,
    kept: Mapping[str, Any] | None,
) -> StepMemory:
    module = settings.module
    try:
        choose_trained(student.denoiser, masks, module.trained)
        if settings.precision in TRUE:
            nn.Module.to(student.denoiser, TRUE[settings.precision])
        for teacher in teachers if module.teacher_dtype is not None else ():
            nn.Module.to(teacher, getattr(torch, module.teacher_dtype))  # diffusers' own warns of what is not there
        models = list(student.components.values())
        return step_memory(models, teachers, module.weights, told, module.optimization, kept)
    except UserError:
        raise
    except Exception as error:  # of any model, optimizer or kernel
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"a step of this {student.family.denoiser} does not run without weights ({reason})") from error


def _times(
    settings: Settings, subject: Subject, calls: CallShapes, prompts: int, taught: bool, pruning: Planned | None
) -> dict[str, float]:
    """Seconds by stage."""
    if torch.device(settings.device).type != "cpu" and not torch.cuda.is_available():
        return {}
    module, data, call = settings.module, settings.data, call_arguments(subject.pipe)
    speed = Speed(products_per_s(settings.device), denoiser_flops(subject, call), calls.operations)
    batch = data.batch_size * (2 if "distill_guided" in module.weights else 1)
    recording = _recorded_call(subject, data)
    recorded = prompts * int(recording.get("num_inference_steps") or 1) * _asked(subject, recording, calls)
    unguided = info_of(subject.pipe).alignment is not None and UNGUIDED.keys() <= call.keys()
    rows = _asked(subject, call, calls) + (1 if unguided else 0)
    drawn = module.evaluation.num_images * int(call.get("num_inference_steps") or 1) * rows
    step_s = speed.calls_s(step_flops(batch, batch * taught, "distill_jacobian" in module.weights), batch)
    step_s *= settings.accumulated
    return {
        "recording": speed.calls_s(recorded, max(getattr(data, "record_batch_size", 1), 1)),
        "pruning": 0.0 if pruning is None or pruning.time is None else pruning.time.total_s,
        "drawing": speed.calls_s(3 * drawn, module.evaluation.batch_size * calls.rows),  # dense, pruned, recovered
        "training": step_s * (settings.steps or 0),
        STEP: step_s,
    }


def _notes(settings: Settings, calls: CallShapes, pruning: Planned | None, cut: bool) -> Iterator[str]:
    if calls.note:
        yield calls.note
    if pruning is not None:
        yield from pruning.notes
    if cut:
        yield "what a structured pattern or ranks take away is counted as if it trained"
    if settings.precision.endswith("-mixed"):
        yield f"activations are counted in float32, which {settings.precision} halves in part"
    if settings.steps is None:
        yield "the budget is not in steps, so training has no time"
    yield "validations are not in the time, and products are timed in float32"
    if settings.processes > 1:
        yield "one process of several is planned; what FSDP2 splits among them is counted whole"
