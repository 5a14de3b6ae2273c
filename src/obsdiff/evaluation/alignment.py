"""Reading images: whether they show what was asked for, and how far they are from real ones.

A pipeline's information names its reader (``PipelineInfo.alignment``); one without a reader has none of these figures.
Images of a pipeline that takes no prompts, whose prompts are empty, have no alignment but a Fréchet distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from obsdiff.embedded.emoji import spell
from obsdiff.embedded.emoji_encoder import emoji_features, ranked_emoji
from obsdiff.embedded.emoji_reader import atlas_features, group_of_emoji, read_emoji, wanted_emoji
from obsdiff.embedded.reader import digit_features, held_out_features, read_digits, wanted_digits
from obsdiff.evaluation.intervals import finite_images

NEAR = 5  # what the near hits are called in reports says so too


@dataclass(frozen=True)
class Reader:
    """A classifier that reads the images of some pipelines.

    Attributes:
        measure, space: What the alignment and the features of the Fréchet distance are called in reports.
        wanted: The class each prompt asks for, int64 (n,); a ``UserError`` if one asks for none.
        read: The class seen in each of the images (n, c, h, w) in [0, 1], int64 (n,).
        features: Their features (n, d).
        real: The features (m, d) of real images.
        ranked: The so many likeliest classes, int64 (n, k), where there are so many classes that near misses count.
        groups: The group of each class, where reports tell them apart.
        spell: A prompt in the words that the pipelines know, and the words it loses by that, where they know few.
        perceives: Whether its features are fine enough for a perceptual distance between two images.
    """

    measure: str
    space: str
    wanted: Callable[[Sequence[str]], Tensor]
    read: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    real: Callable[[], Tensor]
    ranked: Callable[[Tensor, int], Tensor] | None = None
    groups: Callable[[], Sequence[str]] | None = None
    spell: Callable[[str], tuple[str, list[str]]] | None = None
    perceives: bool = False

    def hits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1.0 where images (n, c, h, w) in [0, 1] show what their prompts ask for, 0.0 elsewhere, (n,).

        An image with pixels that are not finite shows nothing.

        Raises:
            UserError: A prompt asks for nothing that can be read.
        """
        wanted = self.wanted(prompts)
        return ((self.read(images) == wanted) & finite_images(images)).float()

    def near_hits(self, images: Tensor, prompts: Sequence[str], k: int = NEAR) -> Tensor | None:
        """The same with what is wanted among the ``k`` likeliest; None where classes are not ranked."""
        if self.ranked is None:
            return None
        near = (self.ranked(images, k) == self.wanted(prompts)[:, None]).any(1)
        return (near & finite_images(images)).float()


READERS = {
    "digits": Reader(
        "embedded digit classifier",
        "embedded digit classifier, 64 features, against 360 held-out scans",
        wanted_digits,
        read_digits,
        digit_features,
        held_out_features,
    ),
    "emoji": Reader(
        "embedded emoji encoder",
        "embedded emoji encoder, 128 features, against the atlas",
        wanted_emoji,
        read_emoji,
        emoji_features,
        atlas_features,
        ranked_emoji,
        group_of_emoji,
        spell,
        perceives=True,
    ),
}


def find_reader(alignment: str | None) -> Reader | None:
    """What reads the images of a pipeline; None where nothing does."""
    return None if alignment is None else READERS[alignment]


def in_known_words(prompts: Sequence[str], alignment: str | None) -> list[str]:
    """The prompts without the words that the pipeline's vocabulary lacks, which a warning names.

    Args:
        prompts: Of any pipeline.
        alignment: The name of its reader, or None.
    """
    reader = find_reader(alignment)
    if reader is None or reader.spell is None:
        return list(prompts)
    spelt = [reader.spell(prompt) for prompt in prompts]
    if lost := list(dict.fromkeys(word for _, words in spelt for word in words)):
        named = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        warnings.warn(f"the pipeline knows no word {named}; prompts are read without", stacklevel=2)
    return [text for text, _ in spelt]


def check_measurable(prompts: Sequence[str], alignment: str | None, measures: Sequence[str] | None = None) -> None:
    """See, before there are images, that they will be measurable.

    Args:
        prompts: Of the evaluation; all empty where the pipeline takes none.
        alignment: The name of a reader, or None where nothing reads the images.
        measures: Those that are named; without alignment among them prompts may ask for anything.

    Raises:
        UserError: A prompt asks for nothing that the reader can tell.
    """
    if measures and "alignment" not in measures:
        return
    if (reader := find_reader(alignment)) is not None and any(prompts):
        reader.wanted(prompts)
