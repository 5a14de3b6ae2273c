"""Diffusers models whose layers have fewer heads and neurons than their class would give them.

This file needs only torch and diffusers. obsdiff writes a copy of it beside the weights of every structurally pruned
model, so that ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` works where obsdiff is not
installed. ``Shrunk<Class>`` exists for every model class of diffusers; its config is that of the class plus
``shrunk``:

    {"layers": {"transformer_blocks.1.ff.net.2": [out_features, in_features], ...},
     "attributes": {"transformer_blocks.1.attn": {"heads": 6, ...}, ...}}
"""

# mypy: ignore-errors
# (its base classes are only known at run time, and it must stay readable where it is copied to)

import functools
import inspect

import diffusers
from torch import nn

PREFIX = "Shrunk"


def apply_shapes(model, shrunk):
    """Give the named linear layers their sizes and the named modules their attributes; the weights are new."""
    for name, (out_features, in_features) in shrunk["layers"].items():
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        new = nn.Linear(
            in_features,
            out_features,
            bias=old.bias is not None,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, new)
    for name, attributes in shrunk["attributes"].items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)


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
