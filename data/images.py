"""Image folders and parquet files with captions, through Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from obsdiff.errors import UserError


class ImageCaptionDataModule(lightning.LightningDataModule):
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
    ) -> None:
        super().__init__()
        self.source = source
        self.image_column = image_column
        self.caption_column = caption_column
        self.size = size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split

    def setup(self, stage: str) -> None:
        from datasets import Image

        table = _load(self.source, self.split)
        for column in (self.image_column, self.caption_column):
            if column not in table.column_names:
                names = ", ".join(table.column_names)
                raise UserError(f"{self.source} has no column {column!r}; its columns are {names}")
        if len(table) < self.batch_size:
            raise UserError(f"{self.source} has {len(table)} images, fewer than one batch of {self.batch_size}")
        self.train = table.cast_column(self.image_column, Image(mode="RGB")).with_transform(self._transform)

    def _transform(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        from torchvision.transforms import v2

        prepare = v2.Compose([v2.Resize(self.size, antialias=True), v2.CenterCrop(self.size), v2.PILToTensor()])
        images = [prepare(image).float() / 127.5 - 1 for image in rows[self.image_column]]
        return {"image": images, "prompt": [str(text) for text in rows[self.caption_column]]}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)


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
