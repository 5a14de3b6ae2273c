"""The denoiser classes that are known, one small file each; ``FAMILIES`` is the table."""

from __future__ import annotations

import inspect

from torch import nn

from obsdiff.models.families.base import Family, TextSegment
from obsdiff.models.families.sd3 import SD3

FAMILIES: tuple[Family, ...] = (SD3,)

SAMPLES, TIMES = ("hidden_states", "sample", "x"), ("timestep", "timesteps", "t")  # what diffusers calls them


def find_family(denoiser: object, *_: object) -> Family:
    """The row of a denoiser's class (or of a class it is derived from; the first counts where there are two); of a
    class that is not known, what tracing alone can do: unstructured and N:M patterns."""
    names = {base.__name__ for base in type(denoiser).__mro__}
    for family in FAMILIES:
        if family.denoiser in names:
            return family
    accepted = inspect.signature(denoiser.forward).parameters if isinstance(denoiser, nn.Module) else {}
    found = [name for known in SAMPLES for name in accepted if name == known] or ["hidden_states"]
    time = next((name for name in accepted if name in TIMES), "timestep")
    return Family(type(denoiser).__name__, sample=found[0], time=time, known=False)


__all__ = ["FAMILIES", "Family", "TextSegment", "find_family"]
