"""Weights that rest in host memory, for pipelines that are larger than the device: on it is the block that runs.

Or they rest in a file, for pipelines that host memory hardly holds, and in it is the block that runs.

The offloading of diffusers and accelerate takes a block from the device as soon as it has answered. Here it stays until
another one runs, since a streamed calibration asks the same block call after call, and solves its layers then.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from obsdiff.errors import UserError
from obsdiff.files import check_space
from obsdiff.memory import trim_memory
from obsdiff.models.denoisers import denoisers_of, parts_of
from obsdiff.models.families import find_family
from obsdiff.models.graph import stages_of
from obsdiff.ranks import world_size
from obsdiff.spill import Shelf


class Turn(ModelHook):
    """Before a module runs: its weights are brought to the device, and all it is given.

    Attributes:
        execution_device: Where it runs; pipelines ask for this name.
        bring: Brings it there.
        shelf: The file that the weights rest in; None: they rest in host memory.
    """

    def __init__(self, turns: Turns, bring: Callable[[nn.Module], object]) -> None:
        self.execution_device, self.shelf, self.bring = turns.device, turns.shelf, bring

    def __deepcopy__(self, _: Any) -> ModelHook:
        return ModelHook()  # copies are made without weights, to count what they do

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.bring(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class Turns:
    """Which one of several modules has its weights on the device.

    Attributes:
        device: Where it runs.
        shelf: The file that all weights rest in, to be read and written at any time, where the device is the host;
            None: they rest in host memory, and only what is on the device can be worked on.
    """

    def __init__(self, device: torch.device, shelf: Shelf | None = None) -> None:
        self.device, self.shelf = device, shelf
        self._there: nn.Module | None = None

    def give(self, module: nn.Module) -> None:
        """Let it be this one; the one before goes first, so that the device never holds two."""
        if self._there is module:
            return
        if self.shelf is not None:
            self.shelf.drop()
        elif self._there is not None:
            self._there.to("cpu")
            self._there = None
        try:
            module.to(self.device)
        except RuntimeError:  # no memory: none of it stays
            module.to("cpu")
            raise
        self._there = module

    def lend(self, part: nn.Module) -> None:
        """Bring a part of one of them, beside whichever is there; it goes with its module."""
        part.to(self.device)


@torch.inference_mode(False)  # as in obsdiff.models.released
def offload(pipe: Any, device: torch.device | str, folder: Path | str | None = None) -> Any:
    """Let a pipeline run on a device, or with a memory, that need not hold it.

    Text encoders, autoencoder and the denoiser's blocks are there one at a time, the rest of the denoiser always. Every
    call moves (or reads) all blocks once, so that large batches are worth their memory. On a device other than the host
    its calibration is :func:`obsdiff.stream`.

    Args:
        pipe: Changed in place; all of it goes to host memory, or to the disk. ``pipe.remove_all_hooks()`` and
            ``pipe.to(...)`` undo the former; weights on a disk stay there until they are replaced or copied.
        device: Where to run.
        folder: On whose disk the weights rest, in a file without a name that is gone with them, for a ``device`` that
            is the host. The system reads them as they are used; all else is as with weights in memory. None: they rest
            there.

    Raises:
        UserError: It is offloaded already, weights on a disk are wanted by another device, or cannot be written (some
            may be there then; they are what they were).
    """
    if folder is not None and torch.device(device).type != "cpu":
        raise UserError(f"weights rest on a disk for runs on the cpu; on {device} leave the folder out")
    models = denoisers_of(pipe)
    if any(hasattr(module, "_hf_hook") for model in models.values() for module in model.modules()):
        raise UserError("this pipeline is offloaded already; call pipe.remove_all_hooks() first")
    pipe.to("cpu")
    taking, shelf = turns_of(pipe), None
    if folder is not None:
        resting = [tensor for module in taking for tensor in (*module.parameters(), *module.buffers())]
        check_space(Path(folder), world_size() * sum(tensor.nbytes for tensor in resting))
        shelf = Shelf(Path(folder))
        for tensor in resting:
            tensor.data = shelf.mapped(tensor)
        trim_memory()
    turns = Turns(torch.device(device), shelf)
    for module in taking:
        add_hook_to_module(module, Turn(turns, turns.give))
    inside = {id(part) for module in taking for part in module.modules()}
    for model in models.values():
        for name, part in model.named_modules():
            if id(part) not in inside:
                part._apply(lambda tensor: tensor.to(turns.device), recurse=False)
            elif any(fnmatchcase(name, rule) for rule in find_family(model).shared):
                add_hook_to_module(part, Turn(turns, turns.lend))
        add_hook_to_module(model, Turn(turns, lambda _: None))  # the pipeline asks it where to run
    return pipe


def turns_of(pipe: Any) -> list[nn.Module]:
    """The modules of a pipeline that take turns: blocks of its denoisers, and all other models."""
    own = denoisers_of(pipe)
    others = [part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in own]
    return others + [block for model in own.values() for block in blocks_of(model)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser."""
    apart = find_family(model).apart
    return [model.get_submodule(s) for s in stages_of(model) if not any(fnmatchcase(s, rule) for rule in apart)]


def bring(module: nn.Module) -> None:
    """Give a block its turn, as running it would; of a model that is not offloaded, nothing."""
    if isinstance(hook := getattr(module, "_hf_hook", None), Turn):
        hook.bring(module)


def turn_of(denoiser: nn.Module) -> Turn | None:
    """What makes a denoiser's blocks take turns, if they do."""
    hooks = (getattr(model, "_hf_hook", None) for model in parts_of(denoiser).values())
    return next((hook for hook in hooks if isinstance(hook, Turn)), None)


def shelf_of(denoiser: nn.Module) -> Shelf | None:
    """The file that its weights rest in, if they do."""
    return None if (turn := turn_of(denoiser)) is None else turn.shelf


def is_offloaded(denoiser: nn.Module) -> bool:
    """Whether a denoiser's blocks take turns on a device, and cannot be worked on elsewhere."""
    return (turn := turn_of(denoiser)) is not None and turn.shelf is None


def refuse_offloaded(denoiser: nn.Module, what: str) -> None:
    """Refuse to do what needs all weights in one place.

    Raises:
        UserError: The denoiser is offloaded.
    """
    if is_offloaded(denoiser):
        raise UserError(
            f"{what} needs the denoiser whole, and its blocks take turns on the device; calibrate with "
            "obsdiff.stream (--calibration.streamed true), or call pipe.remove_all_hooks() and pipe.to(...)"
        )
