"""Lightning data module of the handwritten digits (:mod:`obsdiff.embedded.digits`)."""

from __future__ import annotations

from torch.utils.data import DataLoader, Dataset

from obsdiff.data.loader import SmallData
from obsdiff.embedded.digits import DIGIT_WORDS, HELD_OUT_WORDINGS, IMAGE_SIZE, TRAIN_WORDINGS, load_digits


class DigitsDataset(Dataset[dict[str, object]]):
    """Pairs of a scan and a prompt for its digit: every scan with every wording in training, else one wording each."""

    def __init__(self, split: str, wordings: tuple[str, ...]) -> None:
        self.images, self.labels = load_digits(split)
        self.wordings = wordings
        self.wordings_per_scan = len(wordings) if split == "train" else 1

    def __len__(self) -> int:
        return len(self.labels) * self.wordings_per_scan

    def __getitem__(self, index: int) -> dict[str, object]:
        scan = index // self.wordings_per_scan
        label = int(self.labels[scan])
        prompt = self.wordings[index % len(self.wordings)].format(DIGIT_WORDS[label])
        return {"image": self.images[scan], "label": label, "prompt": prompt}


class DigitsDataModule(SmallData):
    """Batches of ``image`` (b, 1, 16, 16), ``label`` (b,) and ``prompt`` (list of b).

    Args:
        batch_size, num_workers, seed: See :class:`obsdiff.data.loader.SmallData`.
    """

    image_shape = (1, IMAGE_SIZE, IMAGE_SIZE)

    def __init__(self, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(DigitsDataset("train", TRAIN_WORDINGS), "the digits", batch_size, num_workers, seed)


class DigitsWithHeldOut(DigitsDataModule):
    """The same with the held-out scans for validation, for pretraining (a recovery brings its own evaluation)."""

    def val_dataloader(self) -> DataLoader[dict[str, object]]:
        return DataLoader(DigitsDataset("test", HELD_OUT_WORDINGS), self.batch_size, num_workers=self.num_workers)
