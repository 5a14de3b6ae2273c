"""What a recovery holds at each of its moments: arithmetic on sizes, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from obsdiff.peaks import Moment

FACTOR, FOUND = 4, 1  # bytes of a mask's entry: as it multiplies weights, and as it was read


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a recovery holds.

    Attributes:
        process: Of the process before anything is loaded.
        whole: The dense pipeline.
        dense: Its denoiser.
        others: Text encoders and autoencoder.
        student: The denoiser to be trained, as it is loaded, and
        training: as it trains, adapters included.
        teacher: The dense denoiser, where it runs in steps; else 0.
        masked: Entries of weights that are held by masks.
        converted: Of the result's denoiser, what is in another dtype than in training, and
        anew: what is that or merged: the rest is shared with the one that trained.
        average: Of the trained weights; 0: none is kept.
        step: The most that a step makes: activations, gradients, moments, and what the optimizer makes.
        moments: What of that the optimizer keeps.
        gradients: Those of a step, which stay until the next one's backward pass.
        encoding: The autoencoder's activations of a batch of images; 0 where trajectories are trained on.
        recording: Recorded trajectories.
        shard: Those of a batch that is recorded.
        images: Of the evaluation, as it is kept.
        drawing: Activations of a batch of it.
        recorded: Activations of a batch that is recorded; 0: nothing is.
    """

    process: int
    whole: int
    dense: int
    others: int
    student: int
    training: int
    teacher: int = 0
    masked: int = 0
    converted: int = 0
    anew: int = 0
    average: int = 0
    step: int = 0
    moments: int = 0
    gradients: int = 0
    encoding: int = 0
    recording: int = 0
    shard: int = 0
    images: int = 0
    drawing: int = 0
    recorded: int = 0


def moments_of(sizes: Sizes, pruning: Sequence[Moment], released: bool, on_host: bool) -> Iterator[Moment]:
    """The moments of a recovery.

    Args:
        sizes: What there is.
        pruning: Those of the one-shot stage; none where it is done.
        released: Whether text encoders and autoencoder leave memory while the denoiser trains.
        on_host: Whether the device is the host.
    """
    process = {"process": sizes.process}
    if sizes.recorded:
        held = {"weights": sizes.whole, "activations": sizes.recorded}
        yield Moment("recording", held, process | {"recording": 2 * sizes.shard})  # its calls, and as one
    host = process | {"recording": sizes.recording}
    for moment in pruning:
        yield Moment(moment.name, moment.device, {**moment.host, "recording": sizes.recording})
    both = {"dense denoiser": sizes.dense, "denoiser": sizes.student, "other parts": sizes.others}
    found = host | {"masks": FOUND * sizes.masked}
    yield Moment("opening both pipelines", both, found)
    if sizes.drawing:
        yield Moment("drawing references", both | {"activations": sizes.drawing}, found | {"images": sizes.images})
    factors = FACTOR * sizes.masked if on_host else (FACTOR + FOUND) * sizes.masked
    parts = {"denoiser": sizes.training, "teacher": sizes.teacher, "masks' factors": factors, "average": sizes.average}
    parts |= {} if released else {"other parts": sizes.others}
    found |= {"images": sizes.images}
    encoding = sizes.moments + sizes.gradients + sizes.encoding  # before the step itself
    yield Moment("training", parts | {"step": max(sizes.step, encoding)}, found)
    between = parts | {"moments": sizes.moments, "gradients": sizes.gradients}
    yield Moment("writing a checkpoint", between, found | {"its average": sizes.average})
    if sizes.drawing:
        drawing = {"activations": sizes.drawing, "other parts": sizes.others}
        yield Moment("validating", between | drawing, found)
    copied = {} if on_host else {"state": sizes.training}
    # its file is open until it has taken the trained weights; parts that had left come back afterwards
    opened = sizes.converted + sizes.student + (0 if released else sizes.others)
    written = {"written pipeline": max(opened, sizes.anew + sizes.others)}
    yield Moment("writing the result", between, found | copied | written)
