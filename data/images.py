"""Image folders and parquet files with captions, through Hugging Face datasets."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from obsdiff.data.loader import RecoveryData, ResumableLoader, batches_done
from obsdiff.errors import UserError

CORRUPT_SAMPLE = 20  # images seen before their unreadable share says anything


class CaptionedImages(Dataset[dict[str, Any]]):
    """Decoded images with captions; one that cannot be decoded is replaced by the next that can, and counted.

    Args:
        table: A ``datasets.Dataset`` whose image column is not decoded.
        image_column, caption_column: Its columns.
        size: Pixels per side.
        max_corrupt: Share of unreadable images among those seen above which reading stops.
        what: What the data set is called in errors.
    """

    def __init__(
        self, table: Any, image_column: str, caption_column: str, size: int, max_corrupt: float, what: str
    ) -> None:
        self.table, self.image_column, self.caption_column = table, image_column, caption_column
        self.size, self.max_corrupt, self.what = size, max_corrupt, what
        self.seen: set[int] = set()
        self.corrupt: set[int] = set()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for at in range(index, index + len(self)):
            row = self.table[at % len(self)]
            self.seen.add(at % len(self))
            image = self._decode(row[self.image_column])
            if image is not None:
                return {"image": image, "prompt": str(row[self.caption_column])}
            self._count(at % len(self))
        raise UserError(f"{self.what} holds no readable image")

    def _decode(self, content: dict[str, Any]) -> Tensor | None:
        from PIL import Image, UnidentifiedImageError
        from torchvision.transforms import v2

        prepare = v2.Compose([v2.Resize(self.size, antialias=True), v2.CenterCrop(self.size), v2.PILToTensor()])
        try:
            with Image.open(BytesIO(content["bytes"]) if content["bytes"] else content["path"]) as image:
                pixels: Tensor = prepare(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):  # what Pillow raises for damaged files
            return None
        return pixels.float() / 127.5 - 1

    def _count(self, index: int) -> None:
        """Report an unreadable image the first time; stop when there are too many."""
        if index not in self.corrupt:
            self.corrupt.add(index)
            found = f"{len(self.corrupt)} of {len(self.seen)} images of {self.what} cannot be read"
            if len(self.seen) >= CORRUPT_SAMPLE and len(self.corrupt) > self.max_corrupt * len(self.seen):
                raise UserError(f"{found}, more than the {self.max_corrupt:.0%} of data.max_corrupt; mend the data set")
            warnings.warn(f"{found}; the next readable one is used instead", stacklevel=2)


class ImageCaptionDataModule(RecoveryData):
    """Batches of ``image`` (b, 3, size, size) in [-1, 1] and ``prompt`` (list of b).

    Args:
        source: A folder of images (with ``metadata.csv`` or ``.jsonl`` naming file_name and the caption), a parquet
            file, or a Hugging Face dataset "owner/name".
        image_column: Column of the images.
        caption_column: Column of the captions.
        size: Pixels per side: the shorter side is resized to it, then the middle is cut out.
        batch_size: Images per optimizer step and process.
        num_workers: Loader processes.
        split: Which split to train on.
        max_corrupt: Share of unreadable images that is skipped and reported; above it training stops.
        seed: Of the shuffling.
    """

    def __init__(
        self,
        source: str,
        image_column: str = "image",
        caption_column: str = "caption",
        size: int = 512,
        batch_size: int = 8,
        num_workers: int = 2,
        split: str = "train",
        max_corrupt: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.split = source, split
        self.image_column, self.caption_column = image_column, caption_column
        self.size, self.batch_size, self.num_workers = size, batch_size, num_workers
        self.max_corrupt, self.seed = max_corrupt, seed
        if not 0 <= max_corrupt <= 1:
            raise UserError(f"data.max_corrupt is {max_corrupt:g}; it must be in [0, 1]")

    def setup(self, stage: str) -> None:
        """Open the data set, for training only."""
        if stage != "fit":
            return
        from datasets import Image

        table = _load(self.source, self.split)
        for column in (self.image_column, self.caption_column):
            if column not in table.column_names:
                names = ", ".join(table.column_names)
                raise UserError(f"{self.source} has no column {column!r}; its columns are {names}")
        table = table.cast_column(self.image_column, Image(decode=False))
        columns = (self.image_column, self.caption_column)
        self.train = CaptionedImages(table, *columns, self.size, self.max_corrupt, self.source)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(
            self.train, self.batch_size, self.seed, batches_done(self.trainer), self.num_workers, self.source
        )


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
        raise UserError(f"cannot load images from {source}: {' '.join(str(error).split())[:200]}") from error
