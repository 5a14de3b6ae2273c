"""What the validation loop sees of a recovery: images of this process, measured with those of all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from obsdiff.evaluation.evaluate import evaluation_of, remarks_on
from obsdiff.evaluation.references import References
from obsdiff.evaluation.suite import Suite
from obsdiff.ranks import from_all


@dataclass
class Validation:
    """One evaluation after another.

    Attributes:
        refs: The prompts, seeds and images that it compares with.
        suite: The measures.
        figures: Of the last one; empty before.
        shown: The first images (n, c, h, w) of the last one, of all processes; None where none are shown.
    """

    refs: References
    suite: Suite
    figures: dict[str, Any] = field(default_factory=dict)
    shown: Tensor | None = None
    _seen: set[int] = field(default_factory=set)
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def start(self) -> None:
        """Forget what was seen."""
        self._seen, self._kept = set(), {}
        self.suite.start()

    def take(self, numbers: Tensor, images: Tensor, shown: int) -> None:
        """Measure some images (b, c, h, w) of this process by their numbers (b,), and keep those below ``shown``."""
        numbers = numbers.cpu()
        chosen = numbers.tolist()
        self.suite.update(numbers, images, [self.refs.prompts[n] for n in chosen], self.refs.dense.guided[numbers])
        self._seen |= set(chosen)
        self._kept |= {number: image for number, image in zip(chosen, images, strict=True) if number < shown}

    def finish(self) -> dict[str, Any] | None:
        """The figures of all processes' images; None if some were not drawn. All processes call this."""
        seen = set().union(*from_all(self._seen))
        if len(seen) < len(self.refs.prompts):
            return None
        self.figures = self.suite.figures()
        kept = {number: image for part in from_all(self._kept) for number, image in part.items()}
        self.shown = torch.stack([kept[number] for number in sorted(kept)]) if kept else None
        return self.figures

    def report(self) -> dict[str, Any]:
        """The last evaluation as reports hold it, beside the figures of the dense and the freshly pruned pipeline."""
        drawn = {"dense": self.refs.dense, "pruned": self.refs.pruned}
        figures = self.figures  # measuring others forgets nothing of them
        found = evaluation_of(self.suite, self.refs.prompts, self.refs.seeds, drawn)
        stages = {name: found[name] for name in drawn} | {"recovered": figures}
        # the errors of single images are not kept
        return found | stages | {"worst": [], "remarks": remarks_on(stages, found["few"])}
