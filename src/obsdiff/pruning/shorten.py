"""Whole stages out of a denoiser, so that its class and a plain config still describe it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.content import model_hash
from obsdiff.models.denoisers import parts_of
from obsdiff.models.info import attach_info, info_of
from obsdiff.models.stacks import Shorter, Stack, Uncounted, shortened
from obsdiff.models.subject import Subject, subject_of
from obsdiff.obs.pattern import Depth, of_layers
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport, count_parameters
from obsdiff.pruning.surgery import Edits, undone_on_error

BY_OUTPUT = "output error"  # what a report calls the method that chooses stages


def removable(subject: Subject, spare_blocks: Sequence[int] | None = None) -> dict[str, str | None]:
    """The stages that a config counts, in the order of execution, each with the reason why it must stay, or None.

    Args:
        subject: The pipeline.
        spare_blocks: Stages to leave alone, by number in the order of execution, negative ones from the end.

    Raises:
        UserError: There are none, or a spared one is not there.
    """
    spared = spared_stages(subject.graph.stages, spare_blocks or ())
    if not subject.stacks:
        raise UserError(
            f"depth removes blocks that a class counts in its config and runs as a chain, and a "
            f"{subject.family.denoiser} has none; use unstructured:RATIO or N:M, or structured:RATIO where its blocks "
            "are known"
        )
    found: dict[str, str | None] = {}
    for stack in subject.stacks:
        for i in range(stack.count):
            reason = None if stack.stage(i) not in spared else "it is spared"
            try:
                _shorter(subject, {stack: {i}})
            except Uncounted as error:
                reason = str(error)
            found[stack.stage(i)] = reason
    return found


def spared_stages(stages: Sequence[str], spare_blocks: Sequence[int]) -> set[str]:
    """Names of the stages with these numbers.

    Raises:
        UserError: One is not there.
    """
    for block in spare_blocks:
        if not -len(stages) <= block < len(stages):
            raise UserError(f"cannot spare block {block}: the denoiser has blocks 0 to {len(stages) - 1}")
    return {stages[block] for block in spare_blocks}


def stages_to_remove(subject: Subject, depth: Depth, spare_blocks: Sequence[int] | None = None) -> int:
    """How many stages a depth asks for; where a budget decides, how many may go.

    Raises:
        UserError: None, or more than can go.
    """
    stages = removable(subject, spare_blocks)
    candidates = [name for name, reason in stages.items() if reason is None]
    count = len(candidates) if depth.amount is None else depth.gone(len(stages))
    if depth.amount is not None and count == 0:
        raise UserError(f"depth:{depth.amount:g} of {len(stages)} stages is none; ask for a larger share, or depth:1")
    most = sum(
        min(stack.count - 1, sum(stack.stage(i) in candidates for i in range(stack.count))) for stack in subject.stacks
    )
    if depth.amount is None:
        return most
    if count > most:
        stay = "; ".join(f"{name} stays: {reason}" for name, reason in stages.items() if reason is not None)
        each = "one of each kind has to stay" if len(subject.stacks) > 1 else "one has to stay"
        raise UserError(
            f"depth:{depth.amount:g} asks for {count} of {len(stages)} stages, and at most {most} can go: "
            + (f"{each}; {stay}" if stay else each)
        )
    return count


def shorten(edits: Edits, subject: Subject, stages: Sequence[str]) -> Subject:
    """Take stages out of a denoiser and let its config say so.

    Args:
        edits: Remembers what was.
        subject: The pipeline, whole.
        stages: Names of the stages.

    Returns:
        The pipeline resolved anew.

    Raises:
        UserError: One is not there, or the class cannot build what would be left.
    """
    gone, changes = _changes(subject, stages)
    denoiser = subject.denoiser
    for stack, lost in gone.items():
        owner, _, child = stack.name.rpartition(".")
        old = denoiser.get_submodule(stack.name)
        blocks = [block for i, block in enumerate(old.children()) if i not in lost]
        edits.set(denoiser.get_submodule(owner), child, nn.ModuleList(blocks).train(old.training))
    for prefix, shorter in changes.items():
        _describe(edits, parts_of(denoiser)[prefix], shorter)
    pipe = subject.pipe
    return subject_of(pipe, subject.conditioning)


def _describe(edits: Edits, model: nn.Module, shorter: Shorter) -> None:
    """Let a model's config, and what its blocks know of their place, be those of the shorter model."""
    from diffusers.configuration_utils import FrozenDict

    config: Any = model.config
    for module, attribute, value in shorter.follow:
        edits.set(model.get_submodule(module), attribute, value)
    if (shrunk := shorter.config.get("shrunk")) is not None and hasattr(model, "bases"):
        bases = nn.Module()
        for child, basis in model.get_submodule("bases").named_children():
            if f"bases.{child}.weight" in shrunk["tensors"]:
                bases.add_module(child, basis)
        edits.set(model, "bases", bases)
    edits.set(model, "_internal_dict", FrozenDict({**config, **shorter.config}))


def prune_shorter(
    subject: Subject,
    plan: Plan,
    rest: Callable[[Subject], PruneReport] | None,
    measured: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Remove the stages that a plan names, then prune the layers of what is left; all or nothing.

    Args:
        subject: The pipeline, whole.
        plan: Names the stages.
        rest: Prunes the layers, given the shorter pipeline's Subject; None leaves them.
        measured: What is known of the effect, for the report.

    Raises:
        UserError: A stage cannot be removed, or the rest cannot be pruned so.
    """
    started = time.perf_counter()
    subject.check(list(subject.graph.layers))
    record = depth_record(subject, plan.removed)
    dense = sum(p.numel() for p in subject.denoiser.parameters())
    with undone_on_error() as edits:
        shorter = shorten(edits, subject, plan.removed)
        if rest is not None:
            report = rest(shorter)
        else:
            report = PruneReport(plan.pattern, BY_OUTPUT, False, 0, replace(plan, entries={}))
            count_parameters(shorter.denoiser, report)
    layered = report.plan.entries
    depth = plan.pattern if isinstance(plan.pattern, Depth) else Depth(len(plan.removed))
    report.pattern = replace(depth, then=of_layers(report.pattern) if layered else None)
    report.plan = replace(report.plan, removed=plan.removed)
    report.parameters["dense"] = dense
    report.depth, report.model = {**record, **(measured or {})}, record["model"]
    if not layered or report.plan.structured:
        report.sparsity = 1 - report.parameters["pruned"] / dense
    info = info_of(subject.pipe)
    attach_info(subject.pipe, replace(info, blocks=_dense_numbers(info.blocks or {}, record["kept"])))
    report.time_s["total"] = time.perf_counter() - started
    return report


def _dense_numbers(before: Mapping[str, Sequence[int]], kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """By list, the numbers in the dense model of the blocks that are kept of those that were there before."""
    return {**before, **{name: [before[name][i] for i in own] if name in before else own for name, own in kept.items()}}


def depth_record(subject: Subject, stages: Sequence[str]) -> dict[str, Any]:
    """What a manifest keeps of the removal of ``stages`` from a denoiser that is still whole; JSON-able."""
    gone, changes = _changes(subject, stages)
    return {
        "removed": list(stages),
        "of": sum(stack.count for stack in subject.stacks),
        "kept": {
            stack.name: [i for i in range(stack.count) if i not in gone.get(stack, ())] for stack in subject.stacks
        },
        "config": {
            prefix: {key: value for key, value in shorter.config.items() if key != "shrunk"}
            for prefix, shorter in changes.items()
        },
        "model": model_hash(subject.denoiser),
    }


def _changes(subject: Subject, stages: Sequence[str]) -> tuple[dict[Stack, set[int]], dict[str, Shorter]]:
    """The numbers of the stages by stack, and what becomes of each model without them."""
    gone = _by_stack(subject, stages)
    try:
        return gone, _shorter(subject, gone)
    except Uncounted as error:
        raise UserError(f"{', '.join(stages)} cannot be removed: {error}") from None


def _by_stack(subject: Subject, stages: Sequence[str]) -> dict[Stack, set[int]]:
    found: dict[Stack, set[int]] = {}
    places = {stack.stage(i): (stack, i) for stack in subject.stacks for i in range(stack.count)}
    for name in stages:
        if name not in places:
            there = f"there are {len(places)} such as {next(iter(places))}" if places else "it has none"
            raise UserError(f"{name} is no stage that can be removed from this {subject.family.denoiser}; {there}")
        stack, i = places[name]
        found.setdefault(stack, set()).add(i)
    return found


def _shorter(subject: Subject, gone: Mapping[Stack, set[int]]) -> dict[str, Shorter]:
    """By prefix of the model, what becomes of it."""
    models = parts_of(subject.denoiser)
    return {
        prefix: shortened(
            models[prefix], subject.family, {stack: lost for stack, lost in gone.items() if stack.model == prefix}
        )
        for prefix in dict.fromkeys(stack.model for stack in gone)
    }
