"""What the calls of a pipeline take of memory, counted on the meta device, or on weights that are there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obsdiff.errors import UserError
from obsdiff.evaluation.sampling import as_images
from obsdiff.models.calls import remembered_call
from obsdiff.models.conditioning import Conditioning, asked_for, encode_prompts
from obsdiff.models.denoisers import device_of, parts_of
from obsdiff.models.graph import Site
from obsdiff.models.live import Live, live_in
from obsdiff.models.modes import eval_mode
from obsdiff.models.rows import flattened
from obsdiff.models.subject import Subject
from obsdiff.models.weightless import peaks_of_models
from obsdiff.obs.hessian import activation_matrices, weight_matrices
from obsdiff.obs.observers import OBSERVERS, Observer


@dataclass(frozen=True)
class CallShapes:
    """What is counted of calls with one prompt (of two denoisers, of the larger), in bytes; it grows with the prompts.

    Attributes:
        call: Activations of the denoiser.
        observed: The same with the statistics of all sites added to, whatever those themselves hold.
        text: Activations of the text encoders.
        decode: Of the autoencoder.
        prompt: One encoded prompt, the negative one with it.
        image: One image, float32.
        made: All that the denoiser makes in the call, which a backward pass keeps.
        arguments: What the denoiser is given, and
        sample: of that the latents, which are others in every call.
        waiting: What a call that was broken off between two stages holds of their answers: of stages that run one after
            the other the largest, of others all.
        tokens: By site, the rows of it.
        rows: Of the call: two with guidance.
        operations: Of torch, in the call.
        note: What could not be counted, and why; else "".
    """

    call: int
    observed: int
    text: int
    decode: int
    prompt: int
    image: int
    made: int
    arguments: int
    sample: int
    waiting: int
    tokens: Mapping[str, int]
    rows: int
    operations: int
    note: str = ""


def call_shapes(
    subject: Subject, call: Mapping[str, Any], sites: Sequence[Site], observer: str, drawn: bool
) -> CallShapes:
    """Count the calls of a pipeline, by making one: of one without weights (:mod:`obsdiff.models.weightless`) that
    computes nothing.

    Args:
        subject: The pipeline.
        call: Its call arguments: size, guidance.
        sites: Whose statistics are measured.
        observer: What is accumulated there, a name of :data:`obsdiff.obs.observers.OBSERVERS`.
        drawn: Whether images are drawn and decoded, too.

    Raises:
        UserError: The denoiser does not run without weights.
    """
    pipe = subject.pipe
    named = remembered_call(pipe, call)
    tokens: dict[str, int] = {}
    answered: dict[str, int] = {}
    device = device_of(subject.denoiser)
    seen = _observers(subject, sites, observer, device)

    def see(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = activation_matrices(layer, inputs[0])
        tokens.setdefault(name, rows.shape[1])
        seen[name].add(rows, 1.0)

    def leave(name: str, _: nn.Module, __: tuple[Any, ...], answer: Any) -> None:
        answered[name] = _bytes(answer)

    def lives() -> list[Live]:
        return [live_in(partial(subject.components[name], **arguments)) for name, arguments in named.items()]

    try:
        with eval_mode(pipe):
            hooks = [
                subject.graph.layer(name).register_forward_hook(partial(leave, name)) for name in subject.graph.stages
            ]
            with _removed(hooks):
                plain = lives()
            hooks = [
                subject.graph.layer(site.name).register_forward_pre_hook(partial(see, site.name)) for site in sites
            ]
            with _removed(hooks):
                observed = lives()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"a {subject.family.denoiser} does not run without weights ({reason})") from error
    text, decode, image, note = _around(subject, call, drawn)
    first = next(iter(named.values()))
    return CallShapes(
        max(live.peak for live in plain),
        max(live.peak for live in observed),
        text,
        decode,
        sum(_bytes(value) for value in _encoded(subject, call).embeds.values()),
        image,
        max(live.made for live in plain),
        max(sum(_bytes(value) for value in flattened(arguments).values()) for arguments in named.values()),
        max(_bytes(arguments[subject.family.sample]) for arguments in named.values()),
        max(_waiting(answered, prefix, subject.graph.chains) for prefix in parts_of(subject.denoiser)),
        tokens,
        len(first[subject.family.sample]),
        plain[0].operations,
        note,
    )


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone afterwards."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _observers(subject: Subject, sites: Sequence[Site], observer: str, device: torch.device) -> dict[str, Observer]:
    """Of nothing yet, one for each shape."""
    shapes = {site.name: weight_matrices(subject.graph.layer(site.name)).shape for site in sites}
    found = {key: OBSERVERS[observer].empty(key[1], key[0], device) for key in {(s[0], s[2]) for s in shapes.values()}}
    return {name: found[shape[0], shape[2]] for name, shape in shapes.items()}


def _around(subject: Subject, call: Mapping[str, Any], drawn: bool) -> tuple[int, int, int, str]:
    """Bytes of text encoders and autoencoder for one image, and of that; what could not be counted, else ""."""
    pipe, image, note = subject.pipe, 0, ""
    arguments = {**call, "num_inference_steps": 2} if "num_inference_steps" in call else dict(call)
    with eval_mode(pipe), torch.no_grad(), peaks_of_models(pipe) as peaks:
        try:
            if drawn:
                told = asked_for(pipe, _told(subject)).arguments(pipe._execution_device)
                noise = [torch.Generator().manual_seed(0)]
                (made, *_) = pipe(**told, **arguments, generator=noise, output_type="pt", return_dict=False)
                image = 4 * math.prod(as_images(made).shape[1:])
            else:
                _encoded(subject, call)
        except Exception as error:  # a pipeline of any class
            reason = " ".join(str(error).split())[:120]
            note = f"drawing images is not counted: a {type(pipe).__name__} does not run without weights ({reason})"
        others = {name: peak for name, peak in peaks.items() if name not in subject.components}
    text = max((peak for name, peak in others.items() if name.startswith("text_encoder")), default=0)
    decode = max((peak for name, peak in others.items() if not name.startswith("text_encoder")), default=0)
    return text, decode, image, note


def _encoded(subject: Subject, call: Mapping[str, Any]) -> Conditioning:
    """One prompt, as the denoiser is told it."""
    if subject.conditioning is not None:
        return subject.conditioning[:1]
    return encode_prompts(subject.pipe, _told(subject), call)


def _told(subject: Subject) -> list[str]:
    """A prompt that the pipeline takes."""
    return [subject.family.example]


def _waiting(answered: Mapping[str, int], prefix: str, chains: Collection[str]) -> int:
    """Of one denoiser. Lists inside other blocks are counted whole: those hand answers on, as skip connections do."""
    largest: dict[str, int] = {}
    for name, size in answered.items():
        if name.startswith(prefix):
            of = name.rpartition(".")[0]
            key = of if of in chains and "." not in of.removeprefix(prefix) else name
            largest[key] = max(size, largest.get(key, 0))
    return sum(largest.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
