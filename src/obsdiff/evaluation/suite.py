"""The measures of an evaluation: which there are, which a pipeline has, and what images come to by them.

A measure is named ``KIND`` or ``KIND@EXTRACTOR``; without an extractor the pipeline's own reader is it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import Reader, find_reader
from obsdiff.evaluation.extractors import Extractor, load_extractor
from obsdiff.evaluation.intervals import finite_images
from obsdiff.evaluation.measures.alignment import Alignment, ClipScore
from obsdiff.evaluation.measures.base import Batch, Figures, Measure
from obsdiff.evaluation.measures.distribution import Frechet, KernelDistance, MeanDiscrepancy, PrecisionRecall, Real
from obsdiff.evaluation.measures.fidelity import (
    FeatureDistance,
    PatchSimilarity,
    SquaredError,
    StructuralSimilarity,
)
from obsdiff.evaluation.real import real_of
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.ranks import from_all, world_size

PART = 32  # images that are measured at once: copies of thousands of large ones would fill the memory


@dataclass(frozen=True)
class Parts:
    """What a measure may be made of."""

    reader: Reader | None = None
    extractor: Extractor | None = None
    real: Callable[[], Real] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of measure.

    Attributes:
        make: The measure, from its whole name and its parts.
        needs: What it cannot do without: "dense" images, "prompts", "reader", "extractor", "texts" that the extractor
            embeds, "real" images or at least their statistics, "each" of the real images.
    """

    make: Callable[[str, Parts], Measure]
    needs: frozenset[str]


def _of(*needs: str) -> frozenset[str]:
    return frozenset(needs)


def _distribution(made: Callable[..., Measure], *needs: str) -> Kind:
    return Kind(lambda name, parts: made(name, parts.extractor.features, parts.real), _of("extractor", "real", *needs))  # type: ignore[union-attr]


KINDS: dict[str, Kind] = {
    "mse": Kind(lambda *_: SquaredError(), _of("dense")),
    "ssim": Kind(lambda *_: StructuralSimilarity(), _of("dense")),
    "lpips": Kind(lambda *_: PatchSimilarity.loaded(), _of("dense")),
    "distance": Kind(lambda name, parts: FeatureDistance(name, parts.extractor.features), _of("dense", "extractor")),  # type: ignore[union-attr]
    "alignment": Kind(lambda _, parts: Alignment(parts.reader), _of("prompts", "reader")),  # type: ignore[arg-type]
    "clip_score": Kind(lambda name, parts: ClipScore(name, parts.extractor), _of("prompts", "extractor", "texts")),  # type: ignore[arg-type]
    "frechet": _distribution(Frechet),
    "kid": _distribution(KernelDistance, "each"),
    "precision": _distribution(PrecisionRecall, "each"),
    "cmmd": _distribution(MeanDiscrepancy, "each"),
}
EXTRACTED_BY = {"clip_score": "clip", "cmmd": "clip"}  # where no extractor is named


@dataclass
class Suite:
    """The measures of one evaluation, ready.

    Attributes:
        measures: By name.
        says: What reads the images, by measure.
        skipped: Why a measure that was asked for is not there, by name.
        device: Where several processes exchange what they measured.
    """

    measures: dict[str, Measure]
    says: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _spoilt: set[int] = field(default_factory=set)

    def measure(self, images: Tensor, prompts: Sequence[str], dense: Tensor | None = None) -> Figures:
        """What images come to, all at once and on this process alone.

        Args:
            images: (n, c, h, w) in [0, 1]; pixels that are not finite make every figure None, and are counted.
            prompts: One per image, empty ones for a pipeline that takes none.
            dense: The dense pipeline's images, or None.
        """
        self.start()
        for part in torch.arange(len(images)).split(PART):
            first, last = int(part[0]), int(part[-1]) + 1
            own = None if dense is None else dense[first:last]
            self.update(part, images[first:last], prompts[first:last], own)
        return self.figures(shared=False)

    def values(self) -> dict[str, Tensor]:
        """Of what was measured last, float64 (n,) each, the figures that are means over images.

        NaN of an image whose pixels are not finite.
        """
        found: dict[str, Tensor] = {}
        for name, rows in self._rows(shared=False).items():
            rows[sorted(self._spoilt)] = math.nan
            found |= dict(zip(self.measures[name].columns, rows.T, strict=False))
        return found

    def start(self) -> None:
        """Forget all images."""
        self._spoilt = set()
        for measure in self.measures.values():
            measure.reset()

    def update(self, numbers: Tensor, images: Tensor, prompts: Sequence[str], dense: Tensor | None = None) -> None:
        """Take in some images of this process, by their numbers; :meth:`figures` then speaks of those of all."""
        if not len(images):
            return
        finite = finite_images(images)
        self._spoilt |= set(numbers[~finite].tolist())
        images = torch.where(finite[:, None, None, None], images, torch.zeros_like(images))
        batch = Batch(numbers, images, prompts, dense)
        lacking = {"dense"} if dense is None else set()
        lacking |= set() if any(prompts) else {"prompts"}
        for name, measure in self.measures.items():
            if not KINDS[kind_of(name)].needs & lacking:
                measure.update(batch)

    def figures(self, shared: bool = True) -> Figures:
        """What all images come to, by name.

        Args:
            shared: Each process saw a part, all call this.
        """
        found: Figures = {}
        for name, rows in self._rows(shared).items():
            found |= self.measures[name].figures(rows)
        # processes draw equally many, so that some images were drawn twice
        spoilt = set().union(*from_all(self._spoilt)) if shared else self._spoilt
        return {**dict.fromkeys(found), "not_finite": len(spoilt)} if spoilt else found

    def widths(self) -> dict[str, int]:
        """Features of the measures that are made of their covariance, by name, once images were measured."""
        return {
            name: measure.rows[0].shape[1]
            for name, measure in self.measures.items()
            if isinstance(measure, Frechet) and measure.rows
        }

    def _rows(self, shared: bool) -> dict[str, Tensor]:
        found = {}
        for name, measure in self.measures.items():
            if measure.numbers:
                with measure.to(self.device).sync_context(should_sync=shared and world_size() > 1):
                    found[name] = measure.kept()
        return found


def kind_of(name: str) -> str:
    """The kind of a measure, the first half of its name.

    Raises:
        UserError: There is none.
    """
    kind = name.partition("@")[0]
    if kind not in KINDS:
        raise UserError(
            f"evaluation.measures names {name!r}; choose one of {', '.join(KINDS)}, with @EXTRACTOR where needed"
        )
    return kind


def usual(reader: Reader | None, several: bool) -> list[str]:
    """The measures of a pipeline where none are named.

    Args:
        reader: Of its images, or None.
        several: Whether there is more than one image.
    """
    names = ["mse", "ssim"]
    if reader is not None:
        names += ["distance"] * reader.perceives + ["alignment"]
        names += ["frechet", "kid", "precision"] * several
    return names


def load_suite(alignment: str | None, options: EvaluationOptions, device: torch.device | str = "cpu") -> Suite:
    """The measures that an evaluation asks for, or that the pipeline has, with their extractors loaded.

    One that lacks something is left out, with a warning that says what to fetch; the others go on.

    Args:
        alignment: The name of the pipeline's reader, or None.
        options: Of the evaluation.
        device: Where extractors work.

    Raises:
        UserError: A measure is unknown, or real images cannot be read.
    """
    reader = find_reader(alignment)
    names = list(options.measures or usual(reader, options.num_images > 1))
    extractors: dict[str, Extractor] = {}
    reals: dict[tuple[str | None, bool], Callable[[], Real]] = {}
    suite = Suite({}, device=torch.device(device) if world_size() > 1 else torch.device("cpu"))
    for name in names:
        kind = KINDS[kind_of(name)]
        try:
            parts = _parts_of(name, alignment, options, str(device), extractors, reals)
            suite.measures[name] = kind.make(name, parts)
        except UserError as error:
            suite.skipped[name] = str(error)
            continue
        if parts.extractor is not None:
            suite.says[name] = parts.extractor.says
        elif "reader" in kind.needs and reader is not None:
            suite.says[name] = reader.measure
    for read in reals.values():
        read()  # what cannot be read is said before anything is drawn
    if suite.skipped:
        reasons = dict.fromkeys(suite.skipped.values())
        warnings.warn(f"not measured: {', '.join(suite.skipped)}: {'; '.join(reasons)}", stacklevel=2)
    return suite


def _parts_of(
    name: str,
    alignment: str | None,
    options: EvaluationOptions,
    device: str,
    extractors: dict[str, Extractor],
    reals: dict[tuple[str | None, bool], Callable[[], Real]],
) -> Parts:
    """What a measure is made of; what several need is loaded once and kept in ``extractors`` and ``reals``.

    Raises:
        UserError: Something is missing; says what.
    """
    kind, reader = KINDS[kind_of(name)], find_reader(alignment)
    if "reader" in kind.needs and reader is None:
        raise UserError(
            "alignment needs a classifier of the pipeline's images, and there is none; clip_score works for any"
        )
    if "extractor" not in kind.needs:
        return Parts(reader)
    chosen = name.partition("@")[2] or EXTRACTED_BY.get(kind_of(name)) or alignment
    if chosen is None:
        raise UserError(f"{name} needs an extractor: {name}@inception, {name}@dinov2, {name}@clip ...")
    if chosen not in extractors:
        extractors[chosen] = load_extractor(chosen, options.extractors.get(chosen), device)
    extractor = extractors[chosen]
    if "texts" in kind.needs and extractor.texts is None:
        raise UserError(f"{name} needs an extractor that embeds texts, such as clip")
    if "real" not in kind.needs:
        return Parts(reader, extractor)
    read = real_of(name, extractor, options, "each" in kind.needs)
    return Parts(reader, extractor, reals.setdefault((chosen, "@" in name), read))
