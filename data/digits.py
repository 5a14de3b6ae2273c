"""Lightning data module of the handwritten digits (:mod:`obsdiff.evaluation.digits`)."""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from obsdiff.evaluation.digits import DIGIT_WORDS, HELD_OUT_WORDINGS, TRAIN_WORDINGS, load_digits


class DigitsDataset(Dataset[dict[str, object]]):
    """Pairs of a scan and a prompt for its digit; the wording changes with every access in training."""

    def __init__(self, split: str, wordings: tuple[str, ...]) -> None:
        self.images, self.labels = load_digits(split)
        self.wordings = wordings
        self.shuffle_wordings = split == "train"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        which = int(torch.randint(len(self.wordings), ())) if self.shuffle_wordings else index % len(self.wordings)
        label = int(self.labels[index])
        return {
            "image": self.images[index],
            "label": label,
            "prompt": self.wordings[which].format(DIGIT_WORDS[label]),
        }


class DigitsDataModule(lightning.LightningDataModule):
    """Batches of ``image`` (b, 1, 16, 16), ``label`` (b,) and ``prompt`` (list of b); the last short batch is dropped
    in training.

    Args:
        batch_size: Images per optimizer step and process.
        num_workers: Loader processes; the set is tiny, so 0 is fastest.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        self.train = DigitsDataset("train", TRAIN_WORDINGS)
        self.test = DigitsDataset("test", HELD_OUT_WORDINGS)

    def train_dataloader(self) -> DataLoader[dict[str, object]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[dict[str, object]]:
        return DataLoader(self.test, self.batch_size, num_workers=self.num_workers)
