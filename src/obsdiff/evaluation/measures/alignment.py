"""Whether images show what was asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from obsdiff.evaluation.alignment import NEAR, Reader
from obsdiff.evaluation.extractors import Extractor
from obsdiff.evaluation.measures.base import Batch, Figures, Measure


class Alignment(Measure):
    """Share of images in which a classifier sees what the prompt asks for; also among the five likeliest classes and by
    group of classes, where it has such.

    Args:
        reader: The classifier.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.columns = ("alignment",) if reader.ranked is None else ("alignment", f"alignment_top{NEAR}")

    def rows_of(self, batch: Batch) -> Tensor:
        wanted = self.reader.wanted(batch.prompts)
        near = self.reader.near_hits(batch.images, batch.prompts)
        hits = [self.reader.hits(batch.images, batch.prompts), *([] if near is None else [near])]
        return torch.stack([*hits, wanted.to(hits[0])], 1)

    def figures(self, rows: Tensor) -> Figures:
        found = super().figures(rows[:, :-1])
        if self.reader.groups is not None:
            held: dict[str, list[float]] = {}
            names = self.reader.groups()
            for hit, wanted in zip(rows[:, 0].tolist(), rows[:, -1].long().tolist(), strict=True):
                held.setdefault(names[wanted], []).append(hit)
            found["alignment_groups"] = {
                name: {"n": len(held[name]), "value": sum(held[name]) / len(held[name])} for name in sorted(held)
            }
        return found


class ClipScore(Measure):
    """100 x the cosine of the embeddings of image and prompt, at least 0 (2104.08718 with the weight of torchmetrics).

    With PickScore's weights this is its score up to a factor.

    Args:
        name: What it is called.
        extractor: One that embeds texts too.
    """

    def __init__(self, name: str, extractor: Extractor) -> None:
        super().__init__()
        self.columns, self.extractor = (name,), extractor

    def rows_of(self, batch: Batch) -> Tensor:
        assert self.extractor.texts is not None
        own = batch.features(self.extractor.features)
        return 100 * cosine_similarity(own, self.extractor.texts(batch.prompts)).clamp_min(0)[:, None]
