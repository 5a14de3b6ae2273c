"""Image folders and parquet files with captions, through Hugging Face datasets."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from obsdiff.data.captions import captions_in, check_text
from obsdiff.data.loader import (
    RecoveryData,
    ResumableLoader,
    batches_done,
    check_enough,
    check_loading,
)
from obsdiff.data.pixels import Undecodable, decode
from obsdiff.errors import UserError
from obsdiff.numbers import check_whole
from obsdiff.paths import user_path
from obsdiff.ranks import keyed_generator

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
DATASET = re.compile(r"[\w.-]+/[\w.-]+:[\w.-]+")  # with a split
CORRUPT_SAMPLE = 20  # images seen before their unusable share says anything
UNSEEN, GOOD, NO_IMAGE, NO_CAPTION = range(4)
FLIPPED = 1  # sets the draw of mirrored images apart from that of captions
IMAGE_COLUMNS = ("image", "img")


class CaptionedImages(Dataset[dict[str, Any]]):
    """Decoded images with captions; one without a usable image or caption is replaced by the next that has both.

    What was found out about each item lies in memory that loader processes share, so that :meth:`check` counts for
    all of them.

    Args:
        table: A ``datasets.Dataset`` whose image column is not decoded.
        image_column, caption_column: Its columns. Of a list of captions one is drawn, by seed, epoch and item. Without
            a caption column images come alone.
        shape: Channels, height and width (equal) of the images.
        max_corrupt: Share of unusable items among those seen above which reading stops.
        what: What the data set is called in errors.
        seed: Of the draws of captions and of mirrored images.
        flip: Mirror half of the images, others in each epoch.
    """

    def __init__(
        self,
        table: Any,
        image_column: str,
        caption_column: str | None,
        shape: tuple[int, int, int],
        max_corrupt: float,
        what: str,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        self.table, self.image_column, self.caption_column = table, image_column, caption_column
        self.shape, self.max_corrupt, self.what, self.seed, self.flip = shape, max_corrupt, what, seed, flip
        self.found = torch.full((len(table),), UNSEEN, dtype=torch.uint8).share_memory_()
        self.epoch = 0
        self._reported = 0

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for at in range(index, index + len(self)):
            item = self._read(at % len(self))
            if item is not None:
                return item
        raise UserError(f"{self.what} holds no usable image with a caption")

    @property
    def corrupt(self) -> list[int]:
        """Numbers of the items that were found unusable so far."""
        return (self.found > GOOD).nonzero().flatten().tolist()

    def start_epoch(self, epoch: int) -> None:
        """Draw the captions of this epoch from now on."""
        self.epoch = epoch

    def look(self, count: int) -> None:
        """Read ``count`` items, evenly spread, and :meth:`check` them."""
        count = min(count, len(self))
        for i in range(count):
            self._read(i * len(self) // count)
        self.check(count)

    def check(self, least: int) -> None:
        """Warn of unusable items, each time their number has doubled.

        Args:
            least: How many are certain to be seen; before that (or before ``CORRUPT_SAMPLE`` of them) their share says
                nothing.

        Raises:
            UserError: Their share is above ``max_corrupt``, or there are no others.
        """
        bad = int((self.found > GOOD).sum())
        if bad == 0:
            return
        counts = self.found.bincount(minlength=4).tolist()
        seen = len(self) - counts[UNSEEN]
        kinds = ((NO_IMAGE, "no image that can be decoded"), (NO_CAPTION, "no caption"))
        why = ", ".join(f"{counts[kind]} with {name}" for kind, name in kinds if counts[kind])
        found = f"{bad} of {seen} images of {self.what} cannot be used ({why}, such as number {self.corrupt[0]})"
        enough = seen >= min(least, CORRUPT_SAMPLE)
        if bad == len(self):
            raise UserError(f"{found}, none is left; mend the data set")
        if enough and bad > self.max_corrupt * seen:
            raise UserError(f"{found}, more than the {self.max_corrupt:.0%} of data.max_corrupt; mend the data set")
        if bad >= 2 * self._reported:
            self._reported = bad
            warnings.warn(f"{found}; the next usable one is taken instead", stacklevel=2)

    def _read(self, at: int) -> dict[str, Any] | None:
        """Item ``at``, or None; either is noted."""
        row = self.table[at]
        captions = [] if self.caption_column is None else captions_in(row[self.caption_column])
        image: Tensor | None = None
        missing = self.caption_column is not None and not captions
        if not missing:
            try:
                image = decode(row[self.image_column], self.shape[1], self.shape[0])
            except Undecodable:
                image = None
        self.found[at] = NO_CAPTION if missing else NO_IMAGE if image is None else GOOD
        if image is None:
            return None
        if self.flip and torch.rand((), generator=keyed_generator(self.seed, self.epoch, at, FLIPPED)) < 0.5:
            image = image.flip(-1)
        if self.caption_column is None:
            return {"image": image}
        drawn = 0
        if len(captions) > 1:
            drawn = int(torch.randint(len(captions), (), generator=keyed_generator(self.seed, self.epoch, at)))
        return {"image": image, "prompt": captions[drawn]}


class ImageCaptionDataModule(RecoveryData):
    """Batches of ``image`` (b, channels, size, size) in [-1, 1] and ``prompt`` (list of b).

    How images become pixels says :func:`obsdiff.data.pixels.decode`.

    Args:
        source: A folder of images (with ``metadata.jsonl`` or ``.csv`` naming file_name and the caption; in the latter
            datasets takes "NA" and the like for no caption), a parquet file, or a Hugging Face dataset "owner/name".
        image_column: Column of the images; default: image or img, whichever is there.
        caption_column: Column of the captions: texts, or lists of texts, of which each epoch draws one.
        size: Pixels per side: the shorter side is resized to it, then the middle is cut out.
        batch_size: Images per optimizer step and process.
        num_workers: Loader processes.
        split: Which split to train on.
        max_corrupt: Share of images that cannot be decoded or have no caption, skipped and reported; above it training
            stops. A few are looked at before anything else is done.
        seed: Of the shuffling.
        channels: 3 (RGB) or 1 (grey), as the pipeline's autoencoder takes.
    """

    def __init__(
        self,
        source: str,
        image_column: str | None = None,
        caption_column: str = "caption",
        size: int = 512,
        batch_size: int = 8,
        num_workers: int = 2,
        split: str = "train",
        max_corrupt: float = 0.05,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        super().__init__()
        check_loading(batch_size, num_workers, seed)
        check_whole("data.size", size)
        if channels not in (1, 3):
            raise UserError(f"data.channels is {channels}; it must be 1 (grey) or 3 (RGB)")
        if not (math.isfinite(max_corrupt) and 0 <= max_corrupt <= 1):
            raise UserError(f"data.max_corrupt is {max_corrupt:g}; it must be in [0, 1]")
        for name, value in (("source", source), ("split", split)):
            if not value:
                raise UserError(f"data.{name} is empty; name one")
        self.image_shape = (channels, size, size)
        self.source = str(user_path(source, "data.source")) if source.startswith("~") else source
        self.split = split
        self.image_column = image_column
        self.caption_column: str | None = caption_column
        self.flip = False
        self.size, self.batch_size, self.num_workers = size, batch_size, num_workers
        self.max_corrupt, self.seed = max_corrupt, seed

    def setup(self, stage: str) -> None:
        """Open the data set and look at a few images, for training only."""
        if stage != "fit":
            return
        others = () if self.caption_column is None else (self.caption_column,)
        table = load_table(self.source, self.split, self.image_column, *others)
        images, captions = image_column_of(table.column_names, self.image_column), self.caption_column
        if captions is not None:
            check_text(table.features.arrow_schema.field(captions).type, captions, self.source)
        check_enough(len(table), self.batch_size, self.source)
        assert self.image_shape is not None
        self.train = CaptionedImages(
            table, images, captions, self.image_shape, self.max_corrupt, self.source, self.seed, self.flip
        )
        self.train.look(CORRUPT_SAMPLE)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(
            self.train, self.batch_size, self.seed, batches_done(self.trainer), self.num_workers, self.source
        )


class ImageDataModule(ImageCaptionDataModule):
    """Batches of ``image`` (b, channels, size, size) in [-1, 1], for pipelines that are told nothing (DDPM).

    Args:
        source: A folder of images, a parquet file, or a Hugging Face dataset "owner/name" or "owner/name:split"
            (default split: train).
        image_column: Column of the images; default: image or img, whichever is there.
        size: Pixels per side: the shorter side is resized to it, then the middle is cut out.
        batch_size: Images per optimizer step and process.
        num_workers: Loader processes.
        seed: Of the shuffling and of the mirroring.
        channels: 3 (RGB) or 1 (grey), as the denoiser takes.
        flip: Mirror half of the images, others in each epoch.
    """

    def __init__(
        self,
        source: str,
        image_column: str | None = None,
        size: int = 32,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
        channels: int = 3,
        flip: bool = False,
    ) -> None:
        name, _, split = source.rpartition(":") if DATASET.fullmatch(source) else (source, "", "train")
        loading: Any = {"size": size, "batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        super().__init__(name, image_column, split=split, channels=channels, **loading)
        self.caption_column, self.flip = None, flip


def image_column_of(columns: Sequence[str], named: str | None) -> str:
    """The column of the images: the one that was named, else image or img, whichever is there."""
    return named or next((name for name in IMAGE_COLUMNS if name in columns), IMAGE_COLUMNS[0])


def load_table(source: str, split: str, image_column: str | None, *columns: str) -> Any:
    """A ``datasets.Dataset`` whose image column is not decoded.

    Args:
        source: A folder of images, a parquet file, or a Hugging Face dataset "owner/name".
        split: Which split.
        image_column: Column of the images; None: image or img, whichever is there.
        columns: Others that must be there.

    Raises:
        UserError: It cannot be loaded, or lacks a column, or what should be images is not.
    """
    from datasets import Image

    table = _load(source, split)
    image_column = image_column_of(table.column_names, image_column)
    for column in (image_column, *columns):
        if column not in table.column_names:
            names = ", ".join(table.column_names)
            raise UserError(f"{source} has no column {column!r}; its columns are {names}")
    kind = table.features.arrow_schema.field(image_column).type
    try:
        return table.cast_column(image_column, Image(decode=False))
    except Exception as error:  # datasets and arrow raise several kinds
        raise UserError(f"column {image_column!r} of {source} holds {kind}, not images") from error


def _load(source: str, split: str) -> Any:
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_dir():
            return load_dataset("imagefolder", data_dir=str(path), split=split)
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split=split)
        return load_dataset(source, split=split)
    except Exception as error:  # datasets and the hub client raise many kinds
        if path.is_dir() and (empty := [name for name in METADATA if _is_empty(path / name)]):
            raise UserError(f"{path / empty[0]} is empty; give each image a file_name and a caption in it") from error
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"cannot load images from {source[:200]}, split {split}: {reason}") from error


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size
