"""The denoiser's calls as the pipeline itself makes them: recorded, never rebuilt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning, encode_prompts
from obsdiff.models.denoisers import denoisers_of, device_of, dtype_of
from obsdiff.models.families import Family, find_family
from obsdiff.models.info import call_arguments
from obsdiff.models.modes import eval_mode
from obsdiff.models.released import lent

SIDE = 256  # pixels along a side of the recorded call, where the pipeline's information names no size
FRAMES = 9  # of videos: 4k + 1 and 8k + 1
STEPS = 4  # enough to reach the second of two denoisers


_KEPT = "obsdiff_calls"  # on the pipeline: its recorded calls


class _Recorded(Exception):
    """All denoisers have been called; the pipeline need not go on."""


def record_call(
    pipe: Any,
    family: Family,
    components: Mapping[str, nn.Module],
    conditioning: Conditioning | None,
    call: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The arguments of the first call of each denoiser in a run of the pipeline that is broken off then.

    Args:
        pipe: The pipeline; its denoisers do not run. Where it has two, the first one's answers are zeros until the
            second one is asked.
        family: Its row.
        components: Its denoisers by their name in the pipeline.
        conditioning: What to tell it, one prompt; None: an empty one, through its own text encoders.
        call: The pipeline's other arguments: steps, size, guidance.

    Raises:
        UserError: The pipeline cannot be run so.
    """
    check_plain_pipeline(pipe, family)
    if getattr(pipe, "scheduler", None) is None:
        raise UserError(f"this {type(pipe).__name__} has no scheduler, so it cannot be run; give it one")
    found: dict[str, dict[str, Any]] = {}
    try:
        with eval_mode(pipe), torch.no_grad(), lent(pipe), ExitStack() as stubs:
            for name, module in components.items():
                stubs.enter_context(_noted(name, module, family, found, len(components)))
            told = encode_prompts(pipe, [family.example], call) if conditioning is None else conditioning
            arguments = {**call, **told[:1].arguments(pipe._execution_device)}
            pipe(**arguments, generator=torch.Generator().manual_seed(0))
    except _Recorded:
        return found
    except UserError:
        raise
    except Exception as error:  # a pipeline of any class, with any of its parts missing
        reason = " ".join(str(error).split())[:200]
        hint = "" if conditioning is not None else "; if its text encoders are gone, give the embeds as a Conditioning"
        raise UserError(
            f"cannot run this {type(pipe).__name__} to see its denoiser's call: {type(error).__name__}: {reason}{hint}"
        ) from error
    raise UserError(f"this {type(pipe).__name__} ran without calling its {' and '.join(components)}")


@contextmanager
def _noted(
    name: str, module: nn.Module, family: Family, found: dict[str, dict[str, Any]], wanted: int
) -> Iterator[None]:
    """Puts a denoiser's first call into ``found`` instead of running it."""
    forward = module.forward

    @functools.wraps(forward)
    def note(*args: Any, **kwargs: Any) -> Any:
        given = arguments_of(module, args, kwargs)
        found.setdefault(name, given | {"return_dict": False})
        if len(found) == wanted:
            raise _Recorded
        return (torch.zeros_like(given[family.sample]),)

    own = "forward" in vars(module)  # someone's replacement stays
    module.forward = note
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def remembered_call(
    pipe: Any, call: Mapping[str, Any] | None = None, conditioning: Conditioning | None = None
) -> dict[str, dict[str, Any]]:
    """:func:`record_call`, remembered with the pipeline: the arguments of one call of each denoiser by its name, on its
    device and in its dtype as they are now.

    Args:
        pipe: The pipeline.
        call: Its call arguments; None: a short run at a small size.
        conditioning: What to tell it, if its own text encoders are not there; remembered too.
    """
    components = denoisers_of(pipe)
    model = next(iter(components.values()))
    device, dtype = device_of(model), dtype_of(model)
    kept = vars(pipe).setdefault(_KEPT, {})
    if conditioning is not None:
        kept.setdefault("conditioning", conditioning[:1])
    wanted = small_call(pipe, len(components)) if call is None else dict(call)
    key = repr((list(components), sorted(wanted.items())))
    if key not in kept:
        found = record_call(pipe, find_family(model), components, kept.get("conditioning"), wanted)
        kept[key] = dtype, found
    then, found = kept[key]
    here: dict[str, dict[str, Any]] = moved(found, device, then, dtype)
    return here


def check_plain_pipeline(pipe: Any, family: Family) -> None:
    """Refuse pipelines that need an image beside the prompt, or that perturb the attention of extra rows.

    Args:
        pipe: The pipeline.
        family: The row of its denoiser; its ``pipelines`` may do as they like.

    Raises:
        UserError: Saying which to use.
    """
    kind = type(pipe)
    if set(family.pipelines) & {base.__name__ for base in kind.__mro__} and not hasattr(pipe, "pag_attn_processors"):
        return
    accepted = inspect.signature(kind.__call__).parameters
    more = [name for name in _MORE if name in accepted]
    if not (more or hasattr(pipe, "pag_attn_processors")) or not family.pipelines:
        return
    stems = {name: name.removesuffix("Pipeline") for name in family.pipelines}
    plain = max(stems, key=lambda name: kind.__name__.startswith(stems[name]) * len(stems[name]))
    what = ", ".join(more) if more else "perturbed attention"
    raise UserError(
        f"a {kind.__name__} asks its denoiser about more than prompts ({what}); measure and prune with the plain "
        f"pipeline of the same parts, {plain}.from_pipe(pipe, dtype=pipe.dtype), and save either; of a folder, "
        f"{plain}.from_pretrained(folder, dtype=...)"
    )


# arguments of pipelines that work on something given
_MORE = ("image", "video", "mask_image", "control_image", "control_video", "controlnet_conditioning_scale", "strength")


def small_call(pipe: Any, denoisers: int) -> dict[str, Any]:
    """Call arguments of a short run at a small size."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted = call_arguments(pipe)
    side = min(SIDE, _own_side(pipe))
    small = {"height": side, "width": side, "num_frames": FRAMES}
    sizes = {key: min(wanted.get(key, value), value) for key, value in small.items()}
    steps = {} if denoisers == 1 else {"num_inference_steps": STEPS}  # of one, the first call is all that is made
    extra = {"use_resolution_binning": False}
    return {key: value for key, value in {**wanted, **sizes, **steps, **extra}.items() if key in accepted}


def _own_side(pipe: Any) -> int:
    """Pixels along a side of what the pipeline makes by itself, as far as its denoiser says."""
    config: Any = next(iter(denoisers_of(pipe).values())).config
    own = config.get("sample_size")
    return own * int(getattr(pipe, "vae_scale_factor", 8)) if isinstance(own, int) and own > 0 else SIDE


def arguments_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the denoiser's signature."""
    if not args:
        return dict(kwargs)
    return dict(inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments)


def moved(value: Any, device: torch.device, old: torch.dtype, new: torch.dtype) -> Any:
    """Arguments on another device; tensors of the dtype ``old`` become ``new``, times and numbers keep theirs."""
    if isinstance(value, Tensor):
        return value.to(device, new if value.dtype == old and value.dim() > 1 else value.dtype)
    if isinstance(value, dict):
        return {key: moved(inner, device, old, new) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(inner, device, old, new) for inner in value)
    return value
