"""Text encoders and autoencoder out of memory while only the denoiser is needed; they come back from their files.

A released model stays in its pipeline, with its config, dtype and device; its parameters are empty, so that running it
fails. Its hash stays what it was, and saving it brings it back meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obsdiff.errors import UserError
from obsdiff.memory import trim_memory
from obsdiff.models.content import RELEASED, TEXT, component_hash
from obsdiff.models.denoisers import denoisers_of, dtype_of
from obsdiff.models.texts import texts_kept
from obsdiff.models.weightfiles import variant_in


def release(pipe: Any) -> None:
    """Take every model of a pipeline but its denoisers out of memory.

    What was not loaded from a folder of its own, which is still there, stays.
    """
    for name, model in _others(pipe).items():
        if name not in released(pipe) and _folder(model) is not None:
            vars(model)[RELEASED] = component_hash(model)
            _empty(model)
            _save_whole(model, name)


def released(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that are out of memory now, by name."""
    return {name: model for name, model in _others(pipe).items() if RELEASED in vars(model)}


def doubles(pipe: Any) -> dict[str, nn.Module]:
    """Copies of the released models, without weights either, for a second pipeline."""
    found = {}
    for name, model in released(pipe).items():
        vars(model).pop("save_pretrained", None)
        found[name] = deepcopy(model)
        for one in (model, found[name]):
            _save_whole(one, name)
    return found


def share(pipe: Any, other: Any) -> None:
    """Give a pipeline whose models are released those of another one that are the same; the rest come back."""
    for name, model in released(pipe).items():
        theirs = getattr(other, name, None)
        if isinstance(theirs, nn.Module) and component_hash(theirs) == vars(model)[RELEASED]:
            setattr(pipe, name, theirs)
        else:
            _fill(model, name)
            _forget(model)


@contextmanager
def back(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """Inside, these released models of a pipeline are whole.

    Raises:
        UserError: Their files are gone, or changed.
    """
    mine = {name: model for name, model in released(pipe).items() if name in names}
    with ExitStack() as stack:
        for name, model in mine.items():
            stack.enter_context(_whole(model, name))
        yield


@contextmanager
def lent(pipe: Any) -> Iterator[None]:
    """Inside, a pipeline whose models are released can be called as if they were not.

    Text encoders are back while the pipeline encodes prompts, which it does once for the same prompts
    (:func:`obsdiff.models.texts.texts_kept`), the others as long as the block lasts.

    Raises:
        UserError: Their files are gone, or changed.
    """
    away = list(released(pipe))
    encode = getattr(pipe, "encode_prompt", None)
    texts = [name for name in away if encode is not None and any(fnmatchcase(name, kind) for kind in TEXT)]
    if encode is None or not texts:
        with back(pipe, away):
            yield
        return

    @functools.wraps(encode)
    def encoded(*args: Any, **given: Any) -> Any:
        with back(pipe, texts):
            return encode(*args, **given)

    before = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = encoded
    try:
        with texts_kept(pipe), back(pipe, [name for name in away if name not in texts]):
            yield
    finally:
        vars(pipe).pop("encode_prompt", None)
        if before is not None:
            pipe.encode_prompt = before


def _others(pipe: Any) -> dict[str, nn.Module]:
    own = denoisers_of(pipe)
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module) and name not in own}


def _folder(model: nn.Module) -> Path | None:
    """Where a model's files lie."""
    config: Any = getattr(model, "config", None)
    named = getattr(config, "_name_or_path", None)
    return Path(named) if named and (Path(named) / "config.json").is_file() else None


@torch.inference_mode(False)  # what is trained or drawn with later may not be a tensor of Lightning's validation
def _empty(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    trim_memory()


@torch.inference_mode(False)
def _fill(model: nn.Module, name: str) -> None:
    """Load what a released model was.

    Raises:
        UserError: Its files are gone, or changed.
    """
    folder = _folder(model)
    if folder is None:
        raise UserError(f"the files of the {name}, which were loaded before, are gone; bring them back, then go on")
    variant = variant_in(folder.parent)
    kind: Any = type(model)
    try:
        fresh = kind.from_pretrained(
            folder, dtype=dtype_of(model), **({} if variant is None else {"variant": variant})
        ).eval()
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the {name} again from {folder}: {type(error).__name__}: {reason}") from error
    if component_hash(fresh) != vars(model)[RELEASED]:
        raise UserError(f"the {name} in {folder} is not what it was when this run began; bring it back, then go on")
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        mine.data = theirs.data.to(mine.device)


@contextmanager
def _whole(model: nn.Module, name: str) -> Iterator[None]:
    _fill(model, name)
    content = vars(model)[RELEASED]
    _forget(model)
    try:
        yield
    finally:
        vars(model)[RELEASED] = content
        _empty(model)
        _save_whole(model, name)


def _forget(model: nn.Module) -> None:
    for mark in (RELEASED, "save_pretrained"):
        vars(model).pop(mark, None)


def _save_whole(model: nn.Module, name: str) -> None:
    """Let a released model be saved with its weights."""
    kind: Any = type(model)

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(*args: Any, **given: Any) -> Any:
        with _whole(model, name):
            return kind.save_pretrained(model, *args, **given)

    vars(model)["save_pretrained"] = save_pretrained
