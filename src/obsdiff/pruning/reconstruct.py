"""Reconstruction: one stage after the other is trained to give what the dense stage gives, before anything else is.

Stage s reads what the pruned stages before it make of a recorded call, x̂, and its kept weights are trained by Adam to
minimise ``Σ_k ‖f̂_s(x̂)_k − f_s(x)_k‖² / ‖f_s(x)_k‖²`` over the tensors k that the stage gives, f_s(x) being the dense
stage on dense inputs: errors of earlier stages are taken up where they can be (BRECQ, 2102.05426, and block-wise
tuning of pruned language models, EBFT 2402.12419, with the pruned prefix as the source of inputs). Before that, or in
its place, its layers are solved again in closed form (:mod:`obsdiff.pruning.closed_form`). What was pruned stays
pruned.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from obsdiff.diffusion.distill import feature_loss
from obsdiff.models.content import component_hash, tensor_bytes
from obsdiff.models.denoisers import parts_of
from obsdiff.models.modes import eval_mode
from obsdiff.models.nested import copied_to, each_tensor, tensors_in
from obsdiff.models.replay import MadeCall, Reached, answering, passing_stages
from obsdiff.progress import track
from obsdiff.pruning.closed_form import RIDGE, STEPS, TOLERANCE, Given, Stage, solve_again
from obsdiff.pruning.finished import Finished, StageError
from obsdiff.pruning.masks import apply_masks
from obsdiff.pruning.options import ReconstructionOptions

HELD_OUT = 5  # every so many-th call is not trained on: it says whether training helped
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A pruned denoiser and the dense one.

    Attributes:
        pruned: Changed in place.
        dense: The same model before pruning.
        stages: Names of its blocks, in the order of execution, and what each was called in ``dense``.
        masks: Bool by layer (True = kept) of weights that stay zero elsewhere.
        chains: Lists of stages in which each reads of the others only the one before it
            (:class:`obsdiff.models.tracing.Trace`).
        sites: Names of layers that read tokens, in the order of execution; those of one tensor together.
        lost: By layer of ``dense`` the outputs (int64) that the pruned layer has no more.
        still: Layers that nothing changes.
    """

    pruned: nn.Module
    dense: nn.Module
    stages: Mapping[str, str]
    masks: Mapping[str, Tensor]
    chains: frozenset[str] = frozenset()
    sites: Sequence[Sequence[str]] = ()
    lost: Mapping[str, Tensor] = field(default_factory=dict)
    still: frozenset[str] = frozenset()

    def stage(self, name: str) -> Stage:
        """One of its stages, and all that is said of layers inside, by their names there."""
        sites = [list(_inside(name, dict.fromkeys(site))) for site in self.sites]
        before = self.stages[name]
        return Stage(
            self.pruned.get_submodule(name),
            self.dense.get_submodule(before),
            [site for site in sites if site],
            _inside(name, self.masks),
            _inside(before, self.lost),
            list(_inside(name, dict.fromkeys(self.still))),
        )


@dataclass(frozen=True)
class Call:
    """A recorded call of some rows.

    Attributes:
        denoiser: Of two denoisers, the name of the one that is asked; else "".
        arguments: By name.
        rows: How many.
    """

    denoiser: str
    arguments: Mapping[str, Any]
    rows: int


def reconstruct(
    models: Pair,
    calls: Sequence[Call],
    options: ReconstructionOptions,
    *,
    seed: int = 0,
    store: Path | None = None,
    quiet: bool = True,
) -> dict[str, StageError]:
    """Solve the stages of a pruned denoiser again in their order, train them, or one after the other, in place.

    What does not lower a stage's error on held-out calls is taken back.

    Args:
        models: The pruned denoiser, and what it is to be like.
        calls: Recorded along the dense pipeline's way, at least two.
        options: Whether to solve, steps of Adam for each stage, one call each, and their learning rate.
        seed: Of the order of the calls.
        store: Folder to keep finished stages in; those that it holds of the same models, calls and settings are not
            done again.
        quiet: No progress bar.

    Returns:
        By stage, its error before and after.
    """
    denoiser, dense, stages = models.pruned, models.dense, models.stages
    finished = None if store is None else Finished(store, _key(models, calls, options, seed), list(stages))
    found = {}
    with eval_mode(denoiser), eval_mode(dense):
        way = _Way(models, calls, options.closed_form)
        for name, before in track(stages.items(), len(stages), "reconstructing", quiet):
            stage = models.stage(name)
            if finished is not None and (error := finished.load(name, stage.pruned)) is not None:
                found[name] = error
                continue
            started = time.perf_counter()
            examples, checks = divided([example for example in way.examples(name, before) if example is not None])
            if examples and checks:  # of two denoisers, a stage answers the calls of its own
                error = _improve(stage, examples, checks, options, seed)
                found[name] = replace(error, time_s=time.perf_counter() - started)
                if finished is not None:
                    finished.save(name, stage.pruned, found[name])
    return found


def divided(calls: Sequence[T]) -> tuple[list[T], list[T]]:
    """Those of one denoiser that are learned from, and those that are held out."""
    return [call for at, call in enumerate(calls) if at % HELD_OUT], list(calls[::HELD_OUT])


def _key(models: Pair, calls: Sequence[Call], options: ReconstructionOptions, seed: int) -> str:
    """SHA-256 of all that the stages' weights depend on."""
    hashes = [[component_hash(part) for part in parts_of(model).values()] for model in (models.pruned, models.dense)]
    known = [hashes, dict(models.stages), asdict(options), seed, sorted(models.still)]
    if options.closed_form:
        known += [list(map(list, models.sites)), RIDGE, STEPS, TOLERANCE]
    digest = hashlib.sha256(json.dumps(known).encode())

    def add(tensor: Tensor) -> str:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
        return ""

    for name, entries in (*sorted(models.masks.items()), *sorted(models.lost.items())):
        digest.update(name.encode())
        add(entries)
    for call in calls:  # what is no tensor in the arguments, and the names of all
        digest.update(repr((call.denoiser, call.rows, each_tensor(dict(call.arguments), add))).encode())
    return digest.hexdigest()


class Example(NamedTuple):
    """A call of a stage: what the pruned prefix gives it, what the dense stage answers on the dense way, and if it is
    asked for what that is given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[Tensor]
    dense: Given | None = None


class _Way:
    """What the stages of both models are given and answer in recorded calls, one stage after the other."""

    def __init__(self, models: Pair, calls: Sequence[Call], both: bool = False) -> None:
        self._models, self._both = models, both
        self._stages = {models.pruned: list(models.stages), models.dense: list(models.stages.values())}
        self._calls = {model: [_made(model, call) for call in calls] for model in self._stages}
        self._passing = {
            model: passing_stages(model, stages, models.chains, self._calls[model])
            for model, stages in self._stages.items()
        }

    def examples(self, name: str, before: str) -> list[Example | None]:
        """Of each call: what a stage is given by the pruned prefix as it is now, and what the dense stage, which is
        called ``before``, answers on the dense way; None if the call does not pass it."""
        given = self._seen(self._models.pruned, name, given=True, answers=False)
        wanted = self._seen(self._models.dense, before, given=self._both, answers=True)
        return [
            None
            if own is None or like is None
            else Example(*own.given, list(tensors_in(like.answer)), like.given if self._both else None)
            for own, like in zip(given, wanted, strict=True)
        ]

    def _seen(self, model: nn.Module, stage: str, given: bool, answers: bool) -> list[_Look | None]:
        stages = self._stages[model]
        found: list[_Look | None] = []
        before = stages[: stages.index(stage)]
        with torch.no_grad(), answering(model, before) as replay, _looking(model, stage, given, answers) as looks:
            for call in self._calls[model]:
                looks.clear()
                if call.passes([stage]):
                    replay.run(call)
                    call.answers |= {stage: looks[0].answer} if looks and answers else {}  # it stays as it is
                    call.forget(stages, self._passing[model])
                found.append(looks[0] if looks else None)
        return found


class _Look(NamedTuple):
    given: Given = ((), {})
    answer: Any = None


@contextmanager
def _looking(model: nn.Module, stage: str, given: bool, answers: bool) -> Iterator[list[_Look]]:
    """What a stage is given, and what it answers, as far as that is asked for; nothing runs after that."""
    looks: list[_Look] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        looks.append(_Look(copied_to((args, kwargs), "cpu") if given else ((), {})))  # a stage may write into them
        if not answers:
            raise Reached

    def leave(_: nn.Module, __: tuple[Any, ...], answer: Any) -> None:
        looks[-1] = looks[-1]._replace(answer=copied_to(answer, "cpu"))
        raise Reached

    module = model.get_submodule(stage)
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        yield looks
    finally:
        for handle in handles:
            handle.remove()


def _inside(stage: str, values: Mapping[str, T]) -> dict[str, T]:
    """What is said of layers inside a stage, by their names there."""
    start = f"{stage}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _made(model: nn.Module, call: Call) -> MadeCall:
    asked, prefix = (model.get_submodule(call.denoiser), f"{call.denoiser}.") if call.denoiser else (model, "")
    return MadeCall(asked, prefix, dict(call.arguments))


def _improve(
    stage: Stage,
    examples: Sequence[Example],
    checks: Sequence[Example],
    options: ReconstructionOptions,
    seed: int,
) -> StageError:
    """Solve and train one stage as asked, and take back of that what does not help."""
    before = error = _error(stage.pruned, checks)
    passes = 0
    ways: list[Callable[[], int | None]] = []
    if options.closed_form:
        ways.append(lambda: solve_again(stage, lambda: (_on_device(stage, example) for example in examples)))
    if options.steps:
        ways.append(lambda: _train(stage, examples, options, seed))
    for way in ways:
        state = copy.deepcopy(stage.pruned.state_dict())
        passes += way() or 0
        if (after := _error(stage.pruned, checks)) < error:
            error = after
        else:
            stage.pruned.load_state_dict(state)
    return StageError(before, error, passes=passes)


def _on_device(stage: Stage, example: Example) -> tuple[Given, Given]:
    assert example.dense is not None
    given, dense = copied_to(((example.args, example.kwargs), example.dense), next(stage.pruned.parameters()).device)
    return given, dense


def _train(stage: Stage, examples: Sequence[Example], options: ReconstructionOptions, seed: int) -> None:
    named = stage.pruned.named_parameters()
    trained = [p for name, p in named if p.is_floating_point() and name.rpartition(".")[0] not in stage.still]
    weights: list[Tensor] = [stage.pruned.get_parameter(f"{layer}.weight") for layer in stage.masks]
    factors = [mask.to(weight) for mask, weight in zip(stage.masks.values(), weights, strict=True)]
    optimizer = torch.optim.Adam(trained, options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(seed)
    with _trainable(trained):
        for _ in range(options.steps):
            loss = _loss(stage.pruned, examples[int(torch.randint(len(examples), (), generator=generator))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                apply_masks(weights, factors)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters, and as it was afterwards."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _loss(stage: nn.Module, example: Example) -> Tensor:
    """Of one call; examples wait in the host's memory."""
    device = next(stage.parameters()).device
    args, kwargs, wanted = each_tensor(tuple(example[:3]), lambda tensor: tensor.to(device))
    return feature_loss(list(tensors_in(stage(*args, **kwargs))), wanted, robust=False)


@torch.no_grad()
def _error(stage: nn.Module, examples: Sequence[Example]) -> float:
    return sum(float(_loss(stage, example)) for example in examples) / len(examples)
