"""Diffusers models whose tensors are smaller than their class would make them.

This file needs only torch and diffusers. obsdiff writes a copy of it beside the weights of every structurally pruned
model, so that ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` works where obsdiff is not
installed. ``Shrunk<Class>`` exists for every model class of diffusers; its config is that of the class plus
``shrunk``:

    {"tensors": {"transformer_blocks.1.ff.net.2.weight": [64, 48], ...},
     "attributes": {"transformer_blocks.1.attn": {"heads": 6, ...}, ...}}

The attribute ``selected`` of a norm, ``[[0, 2, 5], 64]``, lets it give only the channels of these units of 64, after
it has normalised all of them. The attribute ``basis`` of a linear layer, ``"bases.0"``, lets it read what that linear
module of the model makes of its input; layers that read the same input share one.
"""

# mypy: ignore-errors
# (its base classes are only known at run time, and it must stay readable where it is copied to)

import functools
import inspect

import diffusers
import torch
from torch import nn

PREFIX = "Shrunk"


def apply_shapes(model, shrunk):
    """Give the named tensors their sizes and the named modules their attributes; the weights are new."""
    tensors = {}
    for name, shape in shrunk.get("layers", {}).items():  # as written until November 2026: linear layers alone
        tensors[f"{name}.weight"] = shape
        if model.get_submodule(name).bias is not None:
            tensors[f"{name}.bias"] = shape[:1]
    tensors.update(shrunk.get("tensors", {}))
    readers = {attributes["basis"]: name for name, attributes in shrunk["attributes"].items() if "basis" in attributes}
    for basis in sorted(readers, key=lambda name: (len(name), name)):  # in order, whatever the order in the file
        add_basis(model, basis, model.get_submodule(readers[basis]).weight)
    for name, shape in tensors.items():
        owner, _, tensor = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, tensor)
        setattr(module, tensor, nn.Parameter(torch.zeros(shape, device=old.device, dtype=old.dtype)))
        fit_sizes(module)
    for name, attributes in shrunk["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            if attribute == "selected":
                select(module, *value)
            elif attribute == "basis":
                project(module, value, model.get_submodule(value))
            else:
                setattr(module, attribute, value)


def sizes_of(module):
    """What a module's attributes must say, by the shape of its weight."""
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.Linear):  # adapters are made for what a layer truly reads, before it is projected
        read = module.projection[0].weight.shape[1] if hasattr(module, "projection") else shape[1]
        return {"in_features": read, "out_features": shape[0]}
    if isinstance(module, nn.Conv2d):
        groups = shape[0] if module.groups > 1 and shape[1] == 1 else module.groups  # depthwise ones follow
        return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0]}
    there = {"normalized_shape": shape, "dim": torch.Size(shape)}  # LayerNorm and the RMSNorms
    return {name: value for name, value in there.items() if hasattr(module, name)}


def fit_sizes(module):
    """Let a module's attributes agree with the shape of its weight."""
    for name, value in sizes_of(module).items():
        setattr(module, name, value)


@functools.cache
def channels_of(units, size, device):
    """Indices of the channels of units of ``size`` channels each."""
    return torch.tensor([unit * size + i for unit in units for i in range(size)], device=device)


@functools.cache
def selecting_class(base):
    """The subclass of a norm that gives only chosen channels."""

    class Selecting(base):
        def forward(self, *args, **kwargs):
            whole = super().forward(*args, **kwargs)
            units, size = self.selected
            return whole[..., channels_of(tuple(units), size, whole.device)]

    Selecting.__name__ = Selecting.__qualname__ = "Selecting" + base.__name__
    return Selecting


def select(norm, units, size):
    """Let a norm give only the channels of these ``units`` of ``size`` channels each."""
    if not hasattr(norm, "selected"):
        norm.__class__ = selecting_class(type(norm))
    norm.selected = [list(units), size]


def add_basis(model, name, like):
    """Give a model the linear module ``name``, a basis, unless it has it; its size comes later."""
    owner, _, child = name.rpartition(".")
    if not hasattr(model, owner):
        model.add_module(owner, nn.Module())
    if not hasattr(model.get_submodule(owner), child):
        basis = nn.Linear(1, 1, bias=False, device=like.device, dtype=like.dtype)
        model.get_submodule(owner).add_module(child, basis)


@functools.cache
def projecting_class(base):
    """The subclass of a linear layer that reads what a basis makes of its input."""

    class Projecting(base):
        def forward(self, x):
            return super().forward(self.projection[0](x))

    Projecting.__name__ = Projecting.__qualname__ = "Projecting" + base.__name__
    return Projecting


def project(layer, name, basis):
    """Let a layer read what ``basis``, the module ``name`` of its model, makes of its input."""
    layer.__class__ = projecting_class(type(layer))
    layer.basis = name
    layer.projection = [basis]  # in a list, so that it is not registered (and saved) with every layer
    fit_sizes(layer)


@functools.cache
def shrunk_class(base):
    """The subclass of a diffusers model class that takes ``shrunk`` and builds the smaller layers."""

    class Shrunk(base):
        def __init__(self, *args, shrunk=None, **kwargs):
            super().__init__(*args, **kwargs)
            if shrunk is None:
                raise ValueError(f"{type(self).__name__} needs 'shrunk' in its config: which sizes each layer has")
            self.register_to_config(shrunk=shrunk)
            apply_shapes(self, shrunk)

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            if kwargs.get("ignore_mismatched_sizes"):
                raise ValueError("ignore_mismatched_sizes would replace pruned weights by random ones; load without it")
            return super().from_pretrained(*args, **kwargs)

    # diffusers reads the names of config entries off this signature
    parameters = [
        parameter
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    extra = inspect.Parameter("shrunk", inspect.Parameter.KEYWORD_ONLY, default=None)
    Shrunk.__init__.__signature__ = inspect.Signature([*parameters, extra])
    Shrunk.__name__ = Shrunk.__qualname__ = PREFIX + base.__name__
    Shrunk.__module__ = "obsdiff_shrunk"
    return Shrunk


def __getattr__(name):
    if name.startswith(PREFIX) and hasattr(diffusers, name[len(PREFIX) :]):
        return shrunk_class(getattr(diffusers, name[len(PREFIX) :]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
