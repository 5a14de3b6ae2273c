"""Stacks of blocks that a model's config counts: which of them can be left out so that the class alone builds the rest.

Nothing is listed per class. A model is built without weights from its own config with another count, and compared with
what the class builds from the config as it is: if nothing differs but the missing blocks, the config says it all, and
every loader takes the shorter model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from obsdiff.errors import brief
from obsdiff.models.denoisers import parts_of
from obsdiff.models.families.base import Family

_PLAIN = (bool, int, float, str, type(None))
_PASSING = ("training", "gradient_checkpointing")  # attributes that are of a run, not of a class
Looks = Mapping[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]]


class Uncounted(Exception):
    """Why a class cannot build what is left of a stack."""


@dataclass(frozen=True)
class Stack:
    """Blocks of one ModuleList whose number its model's config gives.

    Attributes:
        name: Of the list.
        model: Prefix of the names in its model; "" where there is one denoiser.
        key: Entry of the config.
        count: Blocks.
    """

    name: str
    model: str
    key: str
    count: int

    def stage(self, i: int) -> str:
        """The name of the block at ``i``."""
        return f"{self.name}.{i}"


def stacks_of(denoiser: nn.Module, family: Family, stages: Sequence[str], chains: Collection[str]) -> tuple[Stack, ...]:
    """The stacks from which blocks can be left out, in the order of execution.

    Args:
        denoiser: The model, or a module that holds several.
        family: Its row.
        stages: Its stages.
        chains: Lists whose stages read of each other only what the one before returned.
    """
    found = []
    for name in dict.fromkeys(stage.rpartition(".")[0] for stage in stages):
        prefix, model = next((p, m) for p, m in parts_of(denoiser).items() if name.startswith(p))
        blocks = denoiser.get_submodule(name)
        whole = [f"{name}.{child}" for child, _ in blocks.named_children()]
        if name not in chains or whole != [stage for stage in stages if stage.rpartition(".")[0] == name]:
            continue
        config: Mapping[str, Any] = getattr(model, "config", {})
        for key in [k for k, v in config.items() if type(v) is int and v == len(whole) and v > 1]:
            stack = Stack(name, prefix, key, len(whole))
            if any(_fits(model, family, stack, i) for i in range(stack.count)):
                found.append(stack)
                break
    return tuple(found)


def _fits(model: nn.Module, family: Family, stack: Stack, i: int) -> bool:
    try:
        shortened(model, family, {stack: {i}})
    except Uncounted:
        return False
    return True


@dataclass(frozen=True)
class Shorter:
    """What becomes of a model without some blocks.

    Attributes:
        config: Entries of its config that change, with their new values.
        follow: (module, attribute, value) of what blocks and model hold of their number, by the new names.
    """

    config: dict[str, Any]
    follow: tuple[tuple[str, str, Any], ...]


def shortened(model: nn.Module, family: Family, gone: Mapping[Stack, Collection[int]]) -> Shorter:
    """What a model's config must say without some blocks.

    Args:
        model: As it is.
        family: Its row.
        gone: Numbers of the blocks to leave out, by stack; all of this model.

    Raises:
        Uncounted: The class would build something else, or nothing.
    """
    config: dict[str, Any] = dict(getattr(model, "config", {}))
    changes: dict[str, Any] = {stack.key: stack.count - len(lost) for stack, lost in gone.items()}
    if empty := [stack.name for stack, lost in gone.items() if len(lost) >= stack.count]:
        raise Uncounted(f"{empty[0]} would hold none")
    kept = {stack: [i for i in range(stack.count) if i not in lost] for stack, lost in gone.items()}
    for key in family.numbered:
        if len(gone) == 1 and config.get(key):
            (stays,) = kept.values()
            changes[key] = [stays.index(i) for i in config[key] if i in stays]
    whole, unread = _looks_of(type(model), config), set[str]()
    if (shrunk := config.get("shrunk")) is not None:
        changes["shrunk"], unread = _renamed(shrunk, kept)
    short = _looks_of(type(model), config | changes)
    names = {old: None if old in unread else _new_name(old, kept) for old in whole}
    if unread and "bases" not in short:
        names["bases"] = None
    expected = {new: whole[old] for old, new in names.items() if new is not None}
    if other := sorted(expected.keys() ^ short.keys()):
        raise Uncounted(f"{type(model).__name__} builds {other[0] or 'the model'} otherwise when it is shorter")
    follow = []
    for new, (kind, attributes, tensors) in short.items():
        old_kind, old_attributes, old_tensors = expected[new]
        if (kind, tensors) != (old_kind, old_tensors):
            raise Uncounted(f"{type(model).__name__} builds {new or 'the model'} otherwise when it is shorter")
        for name in attributes.keys() | old_attributes.keys():
            if (value := attributes.get(name)) != (before := old_attributes.get(name)):
                if not _is_number_of(new, before, value, kept):
                    raise Uncounted(f"{type(model).__name__} gives {new or 'the model'} another {name} when shorter")
                follow.append((new, name, value))
    return Shorter(changes, tuple(follow))


def _is_number_of(module: str, before: Any, value: Any, kept: Mapping[Stack, Sequence[int]]) -> bool:
    """Whether a value that changed is the number of a module's block, or of the model the count."""
    if type(before) is not int or type(value) is not int:
        return False
    for stack, stays in kept.items():
        inside = module.startswith(f"{_own(stack)}.")
        block = int(module.removeprefix(f"{_own(stack)}.").partition(".")[0]) if inside else None
        if block is not None and before - value == stays[block] - block:  # some count from 1000
            return True
        if module == "" and (before, value) == (stack.count, len(stays)):
            return True
    return False


def _own(stack: Stack) -> str:
    """A stack's name in its model."""
    return stack.name.removeprefix(stack.model)


def _new_name(name: str, kept: Mapping[Stack, Sequence[int]]) -> str | None:
    """What a module or tensor of a model is called without the blocks that go; None: it goes."""
    for stack, stays in kept.items():
        if name.startswith(f"{_own(stack)}."):
            block, dot, rest = name.removeprefix(f"{_own(stack)}.").partition(".")
            return f"{_own(stack)}.{stays.index(int(block))}{dot}{rest}" if int(block) in stays else None
    return name


def _renamed(shrunk: Mapping[str, Any], kept: Mapping[Stack, Sequence[int]]) -> tuple[dict[str, Any], set[str]]:
    """The ``shrunk`` entry of a config (:mod:`obsdiff.models.obsdiff_shrunk`) without the blocks that go, and without
    bases that no layer reads any more; and the names of these."""
    renamed = {
        key: {new: value for old, value in described.items() if (new := _new_name(old, kept)) is not None}
        for key, described in shrunk.items()
    }
    read = {attributes["basis"] for attributes in renamed["attributes"].values() if "basis" in attributes}
    tensors = renamed.get("tensors", {})
    unread = {base for n in tensors if n.startswith("bases.") and (base := n.removesuffix(".weight")) not in read}
    left = {name: shape for name, shape in tensors.items() if name.removesuffix(".weight") not in unread}
    return renamed | {"tensors": left}, unread


def _looks_of(kind: Any, config: Mapping[str, Any]) -> Looks:
    """What a class builds from a config, as far as it can be compared."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    return _built(kind, json.dumps(own, sort_keys=True, default=str), _Given(own))


class _Given:
    """A config beside the text that it is known by: equal to any other."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Given)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=16)
def _built(kind: Any, text: str, given: _Given) -> Looks:
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            model = kind.from_config(dict(given.config))
    except Exception as error:  # whatever a constructor makes of numbers that it was not made for
        raise Uncounted(f"{kind.__name__} cannot be built so: {brief(error)}") from error
    looks = {}
    for name, module in model.named_modules():
        attributes = {
            key: value
            for key, value in vars(module).items()
            if key not in _PASSING and not key.startswith("_") and _is_plain(value)
        }
        tensors = {
            key: tuple(tensor.shape)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        looks[name] = type(module).__name__, attributes, tensors
    return looks


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(inner, _PLAIN) for inner in value)
    return isinstance(value, _PLAIN)
