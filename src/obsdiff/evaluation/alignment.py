"""Reading images: whether they show what was asked for, and how far they are from real ones.

A pipeline's information names its reader (``PipelineInfo.alignment``); one without a reader has none of these figures.
Images of a pipeline that takes no prompts, whose prompts are empty, have no alignment but a Fréchet distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.emoji import spell
from obsdiff.embedded.emoji_encoder import emoji_features, ranked_emoji
from obsdiff.embedded.emoji_reader import atlas_features, group_of_emoji, read_emoji, wanted_emoji
from obsdiff.embedded.reader import digit_features, held_out_features, read_digits, wanted_digits
from obsdiff.evaluation.measures import finite_images

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

    def by_group(self, images: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, int]] | None:
        """Share of hits and number of images for each group that prompts ask for, by name; None without groups."""
        if self.groups is None:
            return None
        groups, hits = self.groups(), self.hits(images, prompts).tolist()
        held: dict[str, list[float]] = {}
        for wanted, hit in zip(self.wanted(prompts).tolist(), hits, strict=True):
            held.setdefault(groups[wanted], []).append(hit)
        return {group: (sum(held[group]) / len(held[group]), len(held[group])) for group in sorted(held)}

    def perceptual(self, dense: Tensor, images: Tensor) -> float | None:
        """Mean cosine distance of the features of images (n, c, h, w) in [0, 1] to those of the dense ones, in [0, 2].

        None if there are no images, one has pixels that are not finite, or the features are too coarse for it.
        """
        if not self.perceives or not len(images) or not bool((finite_images(dense) & finite_images(images)).all()):
            return None
        return float(1 - cosine_similarity(self.features(dense), self.features(images)).mean())

    def frechet(self, images: Tensor) -> float | None:
        """Fréchet distance of images (n, c, h, w) in [0, 1] to real ones.

        None if there are fewer than two images, or one has pixels that are not finite.
        """
        if len(images) < 2 or not bool(finite_images(images).all()):
            return None
        return frechet_distance(self.features(images), self.real())


def compare_alignment(reader: Reader, dense: Tensor, pruned: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """The alignment of dense and pruned images (n, c, h, w) in [0, 1] of the same prompts, as reports give it.

    Returns:
        ``measure``; ``dense`` and ``pruned``: shares of hits. Where the reader ranks classes, ``dense_top5`` and
        ``pruned_top5`` as well; where it has groups, ``groups``: by name the same shares and ``n``.
    """
    found: dict[str, Any] = {"measure": reader.measure}
    drawn = {"dense": dense, "pruned": pruned}
    for name, images in drawn.items():
        found[name] = float(reader.hits(images, prompts).mean())
    for name, images in drawn.items():
        if (near := reader.near_hits(images, prompts)) is not None:
            found[f"{name}_top{NEAR}"] = float(near.mean())
        for group, (share, n) in (reader.by_group(images, prompts) or {}).items():
            found.setdefault("groups", {}).setdefault(group, {"n": n})[name] = share
    return found


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
