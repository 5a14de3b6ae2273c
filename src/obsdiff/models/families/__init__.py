"""The denoiser classes that are known, one small file each; ``FAMILIES`` is the table."""

from __future__ import annotations

import inspect

from obsdiff.models.families.aura_flow import AURA_FLOW
from obsdiff.models.families.base import Family, TextSegment
from obsdiff.models.families.chroma import CHROMA
from obsdiff.models.families.cogvideox import COGVIDEOX
from obsdiff.models.families.dit import DIT
from obsdiff.models.families.flux import FLUX
from obsdiff.models.families.flux2 import FLUX2
from obsdiff.models.families.hunyuan_video import HUNYUAN_VIDEO
from obsdiff.models.families.ltx import LTX
from obsdiff.models.families.lumina2 import LUMINA2
from obsdiff.models.families.pixart import PIXART
from obsdiff.models.families.qwen_image import QWEN_IMAGE
from obsdiff.models.families.sana import SANA
from obsdiff.models.families.sd3 import SD3
from obsdiff.models.families.unets import UNET, UNET_CONDITION
from obsdiff.models.families.wan import WAN
from obsdiff.models.families.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    SD3,
    FLUX,
    CHROMA,
    FLUX2,
    QWEN_IMAGE,
    UNET_CONDITION,
    UNET,
    DIT,
    PIXART,
    SANA,
    LUMINA2,
    Z_IMAGE,
    AURA_FLOW,
    WAN,
    LTX,
    COGVIDEOX,
    HUNYUAN_VIDEO,
)

SAMPLES, TIMES = ("hidden_states", "sample", "x"), ("timestep", "timesteps", "t")  # what diffusers calls them


def find_family(denoiser: object, *_: object) -> Family:
    """The row of a denoiser's class (or of a class it is derived from; the first counts where there are two); of a
    class that is not known, what tracing alone can do: unstructured and N:M patterns."""
    names = {base.__name__ for base in type(denoiser).__mro__}
    for family in FAMILIES:
        if family.denoiser in names:
            return family
    forward = getattr(denoiser, "forward", None)
    accepted = {} if forward is None else inspect.signature(forward).parameters
    found = [name for known in SAMPLES for name in accepted if name == known] or ["hidden_states"]
    time = next((name for name in accepted if name in TIMES), "timestep")
    return Family(type(denoiser).__name__, sample=found[0], time=time, known=False)


__all__ = ["FAMILIES", "Family", "TextSegment", "find_family"]
