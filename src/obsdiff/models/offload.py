"""Weights that rest in host memory, for pipelines that are larger than the device: on it is the block that runs.

The offloading of diffusers and accelerate takes a block from the device as soon as it has answered. Here it stays until
another one runs, since a streamed calibration asks the same block call after call, and solves its layers then.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from obsdiff.models.denoisers import denoisers_of, parts_of
from obsdiff.models.graph import stages_of


class Turn(ModelHook):
    """Before a module runs, all it is given is on the device; and where it takes turns, its weights are there, and
    those of whichever ran before are not.

    Attributes:
        execution_device: Where it runs; pipelines ask for this name.
    """

    def __init__(self, turns: Turns, takes: bool) -> None:
        self.execution_device, self._turns, self._takes = turns.device, turns, takes

    def __deepcopy__(self, _: Any) -> ModelHook:
        return ModelHook()  # copies are made without weights, to count what they do

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._takes:
            self._turns.give(module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class Turns:
    """Which one of several modules has its weights on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None

    def give(self, module: nn.Module) -> None:
        """Let it be this one; the one before goes first, so that the device never holds two."""
        if self._there is module:
            return
        if self._there is not None:
            self._there.to("cpu")
            self._there = None
        module.to(self.device)
        self._there = module


def offload(pipe: Any, device: torch.device | str) -> Any:
    """Let a pipeline in host memory run on a device that need not hold it.

    Text encoders, autoencoder and the denoiser's blocks are on the device one at a time, the rest of the denoiser
    always. Every call moves all blocks once, so that large batches are worth their memory.

    Args:
        pipe: In host memory; changed in place. ``pipe.remove_all_hooks()`` undoes it.
        device: Where to run.
    """
    turns = Turns(torch.device(device))
    taking = turns_of(pipe)
    for module in taking:
        add_hook_to_module(module, Turn(turns, takes=True))
    inside = {id(part) for module in taking for part in module.modules()}
    for model in denoisers_of(pipe).values():
        for part in model.modules():
            if id(part) not in inside:
                part._apply(lambda tensor: tensor.to(turns.device), recurse=False)
        add_hook_to_module(model, Turn(turns, takes=False))
    return pipe


def is_offloaded(denoiser: nn.Module) -> bool:
    """Whether a denoiser's blocks take turns on a device."""
    return any(isinstance(getattr(model, "_hf_hook", None), Turn) for model in parts_of(denoiser).values())


def turns_of(pipe: Any) -> list[nn.Module]:
    """The modules of a pipeline that take turns: blocks of its denoisers, and all other models."""
    own = denoisers_of(pipe)
    others = [part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in own]
    return others + [model.get_submodule(stage) for model in own.values() for stage in stages_of(model)]
