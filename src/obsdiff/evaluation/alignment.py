"""Reading images: whether they show what was asked for, and how far they are from real ones.

A pipeline's information names its reader (``PipelineInfo.alignment``); one without a reader has none of these figures.
Images of a pipeline that takes no prompts, whose prompts are empty, have no alignment but a Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.reader import digit_features, held_out_features, read_digits, wanted_digits
from obsdiff.evaluation.measures import finite_images


@dataclass(frozen=True)
class Reader:
    """A classifier that reads the images of some pipelines.

    Attributes:
        measure, space: What the alignment and the features of the Fréchet distance are called in reports.
        wanted: The class each prompt asks for, int64 (n,); a ``UserError`` if one asks for none.
        read: The class seen in each of the images (n, c, h, w) in [0, 1], int64 (n,).
        features: Their features (n, d).
        real: The features (m, d) of real images.
    """

    measure: str
    space: str
    wanted: Callable[[Sequence[str]], Tensor]
    read: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    real: Callable[[], Tensor]

    def hits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1.0 where images (n, c, h, w) in [0, 1] show what their prompts ask for, 0.0 elsewhere, (n,).

        An image with pixels that are not finite shows nothing.

        Raises:
            UserError: A prompt asks for nothing that can be read.
        """
        wanted = self.wanted(prompts)
        return ((self.read(images) == wanted) & finite_images(images)).float()

    def frechet(self, images: Tensor) -> float | None:
        """Fréchet distance of images (n, c, h, w) in [0, 1] to real ones.

        None if there are fewer than two images, or one has pixels that are not finite.
        """
        if len(images) < 2 or not bool(finite_images(images).all()):
            return None
        return frechet_distance(self.features(images), self.real())


READERS = {
    "digits": Reader(
        "embedded digit classifier",
        "embedded digit classifier, 64 features, against 360 held-out scans",
        wanted_digits,
        read_digits,
        digit_features,
        held_out_features,
    )
}


def find_reader(alignment: str | None) -> Reader | None:
    """What reads the images of a pipeline; None where nothing does."""
    return None if alignment is None else READERS[alignment]


def check_measurable(prompts: Sequence[str], alignment: str | None) -> None:
    """See, before there are images, that they will be measurable.

    Args:
        prompts: Of the evaluation; all empty where the pipeline takes none.
        alignment: The name of a reader, or None where nothing reads the images.

    Raises:
        UserError: A prompt asks for nothing that the reader can tell.
    """
    if (reader := find_reader(alignment)) is not None and any(prompts):
        reader.wanted(prompts)
