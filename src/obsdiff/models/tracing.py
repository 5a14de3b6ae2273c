"""What one call of a denoiser shows: which layers run, in which order, and which of them read the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from obsdiff.errors import UserError
from obsdiff.models.graph import prunable, stages_of, walk
from obsdiff.models.modes import eval_mode
from obsdiff.models.nested import tensors_in

_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, ArithmeticError)


@dataclass(frozen=True)
class Trace:
    """One call of a denoiser.

    Attributes:
        stages: In the order of execution; those that did not run are left out.
        reads: Layers by the memory they read, in the order of execution: the first layer names the input.
        vectors: Layers that read one vector per sample (no token or pixel axis), such as modulations.
        told: Linear layers anywhere, once a stage has begun, and modulations in front of them, that read equal vectors,
            in the order of execution.
        times: How often each layer ran.
        chains: The lists of stages that run one after the other, and of which each reads nothing of the earlier ones
            but what the one before it returned.
        repeats: Whether a stage ran more than once.
    """

    stages: tuple[str, ...]
    reads: tuple[tuple[str, ...], ...]
    vectors: frozenset[str]
    told: tuple[tuple[str, ...], ...]
    times: Mapping[str, int]
    chains: frozenset[str]
    repeats: bool


class _Memory:
    """Numbers for tensors, equal for the same memory.

    Holds weakly on to their storages: values are let go with the last tensor, and no other storage takes the place.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._held: list[StorageWeakRef] = []

    def __call__(self, x: Tensor) -> int:
        # by storage, as tensors on the meta device have no address
        storage = x.untyped_storage()
        key = (storage._cdata, x.storage_offset(), tuple(x.shape), x.stride())
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._held.append(StorageWeakRef(storage))
        return self._numbers[key]


@torch.no_grad()
def trace(denoiser: nn.Module, call: Mapping[str, Mapping[str, Any]], in_front: Sequence[str] = ()) -> Trace:
    """Call a denoiser and watch its stages and layers.

    Args:
        denoiser: The model, or a module that holds several.
        call: The arguments of one call by the name of the model in ``denoiser`` ("" for itself).
        in_front: Names of modulations before all stages, as shell-style patterns.

    Raises:
        UserError: The call fails.
    """
    memory, stages = _Memory(), stages_of(denoiser)
    layers: dict[str, nn.Module] = {
        name: module for _, name, module in walk(stages, denoiser) if isinstance(module, nn.Linear | nn.Conv2d)
    }
    reads: dict[int, list[str]] = {}
    vectors: set[str] = set()
    times = dict.fromkeys(layers, 0)
    visits: list[tuple[str, set[int], set[int]]] = []  # stage, what it read, what it returned
    told: list[tuple[Tensor, list[str]]] = []

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        times[name] += 1
        if isinstance(module, nn.Linear) and x.dim() < 3:
            vectors.add(name)
        if times[name] == 1 and prunable(module):
            reads.setdefault(memory(x), []).append(name)

    def hear(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name not in layers:
            times[name] = times.get(name, 0) + 1
        model = "" if "" in call else f"{name.partition('.')[0]}."  # two denoisers are told apart
        begun = any(stage.startswith(model) for stage, _, _ in visits)
        if x.dim() == 2 and (begun or any(fnmatchcase(name, rule) for rule in in_front)):
            same = [n for y, n in told if _equal(x, y) and n[0].startswith(model)]
            known = next(iter(same), None)
            if known is None:
                told.append((x, known := []))
            if name not in known:
                known.append(name)

    def enter(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visits.append((name, {memory(x) for x in tensors_in([args, kwargs])}, set()))

    def leave(name: str, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
        next(out for at, _, out in reversed(visits) if at == name).update(memory(x) for x in tensors_in(output))

    with _hooks() as handles:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(partial(see, name), with_kwargs=True))
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Linear) and ".bases." not in f".{name}":
                handles.append(module.register_forward_pre_hook(partial(hear, name), with_kwargs=True))
        for name in stages:
            module = denoiser.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        run(denoiser, call)
    order = tuple(dict.fromkeys(name for name, _, _ in visits))
    return Trace(
        order,
        tuple(map(tuple, reads.values())),
        frozenset(vectors),
        tuple(tuple(n) for _, n in told),
        times,
        frozenset(_chains(visits)),
        len(order) < len(visits),
    )


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two vectors are the same (zeros say nothing); without values, whether they could be."""
    return x.shape == y.shape and (x.is_meta or (torch.equal(x, y) and bool(x.any())))


def run(denoiser: nn.Module, call: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The answers of the models in ``denoiser`` to one call each.

    Raises:
        UserError: A call fails.
    """
    answers = []
    with eval_mode(denoiser):
        for name, arguments in call.items():
            model = denoiser.get_submodule(name)
            try:
                answers.append(model(**arguments))
            except _FAILURES as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"a call of this {type(model).__name__} fails ({type(error).__name__}: {reason}); undo what was "
                    "changed in it, or load the pipeline again"
                ) from error
    return answers


def _is_chain(visits: Sequence[tuple[str, set[int], set[int]]]) -> bool:
    """What is no output of the stage before must be known to the first stage: conditions common to all stages."""
    if not visits or len({name for name, _, _ in visits}) < len(visits):
        return False
    common = set(visits[0][1])
    for (_, _, before), (_, read, _) in pairwise(visits):
        if not read <= before | common or not read & before:
            return False
    return True


def _chains(visits: Sequence[tuple[str, set[int], set[int]]]) -> Iterator[str]:
    """Names of the lists whose stages run one after the other, and are a chain."""
    lists: dict[str, list[int]] = {}
    for i, (name, _, _) in enumerate(visits):
        lists.setdefault(name.rpartition(".")[0], []).append(i)
    for name, at in lists.items():
        if at == list(range(at[0], at[0] + len(at))) and _is_chain([visits[i] for i in at]):
            yield name


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def dead_layers(denoiser: nn.Module, call: Mapping[str, Mapping[str, Any]], layers: Sequence[str]) -> list[str]:
    """Layers whose outputs reach no output of the denoiser (the last text path of Qwen-Image): free to delete.

    Each layer's output is moved along a random direction by an amount of its own; where the answer's gradient by that
    amount is exactly zero, nothing depends on the layer. No gradient of a weight is made, and none goes further back
    than the first of the layers.

    Args:
        denoiser, call: As for :func:`trace`.
        layers: The layers in question; each must run.
    """
    generator = torch.Generator().manual_seed(0)
    amounts: dict[str, Tensor] = {}

    def move(name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        if name not in amounts:
            amounts[name] = torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
        direction = torch.randn(output.shape, generator=generator).to(output)
        return output + amounts[name] * direction

    frozen = [p for p in denoiser.parameters() if p.requires_grad]
    with _hooks() as handles, torch.enable_grad():
        for name in layers:
            handles.append(denoiser.get_submodule(name).register_forward_hook(partial(move, name)))
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            outputs = [x for answer in run(denoiser, call) for x in tensors_in(_plain(answer)) if x.requires_grad]
            total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
            named = list(amounts.items())
            if not isinstance(total, Tensor):  # no output depends on any of them
                return list(amounts)
            gradients = torch.autograd.grad(total, [amount for _, amount in named], allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
    return [name for (name, _), g in zip(named, gradients, strict=True) if g is None or float(g) == 0]


def _plain(answer: Any) -> Any:
    return dict(answer) if isinstance(answer, Mapping) else answer
