"""Lightning data module of the captioned emoji (:mod:`obsdiff.embedded.emoji`)."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from obsdiff.data.loader import SmallData
from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, TILE, TRAIN_WORDINGS, caption, load_emoji


class EmojiDataset(Dataset[dict[str, object]]):
    """Pairs of a picture and a caption: every picture with every wording, pictures running fastest."""

    def __init__(self, wordings: tuple[str, ...], pictures: range | None = None) -> None:
        emoji = load_emoji()
        self.images, self.names = emoji.images(), emoji.names
        self.pictures = pictures or range(len(self.names))
        self.wordings = wordings

    def __len__(self) -> int:
        return len(self.pictures) * len(self.wordings)

    def __getitem__(self, index: int) -> dict[str, object]:
        turn, place = divmod(index, len(self.pictures))
        label = self.pictures[place]
        wording = self.wordings[(turn + place) % len(self.wordings)]
        return {"image": self.images[label], "label": label, "prompt": caption(wording, self.names[label])}


class EmojiDataModule(SmallData):
    """Batches of ``image`` (b, 3, 32, 32), ``label`` (b,) and ``prompt`` (list of b).

    Args:
        batch_size, num_workers, seed: See :class:`obsdiff.data.loader.SmallData`.
    """

    image_shape = (3, TILE, TILE)

    def __init__(self, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(EmojiDataset(TRAIN_WORDINGS), "the emoji", batch_size, num_workers, seed)

    def images(self) -> Tensor:
        """All pictures, (n, 3, 32, 32) in [-1, 1]."""
        images: Tensor = self.train.images
        return images


class EmojiWithHeldOut(EmojiDataModule):
    """The same with pictures under held-out wordings for validation, for pretraining (a recovery brings its own).

    Args:
        batch_size, num_workers, seed: As above.
        num_validation: Pictures of the validation, spread evenly over the atlas.
    """

    def __init__(self, batch_size: int = 128, num_workers: int = 0, seed: int = 0, num_validation: int = 48) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.num_validation = num_validation

    def val_dataloader(self) -> DataLoader[dict[str, object]]:
        every = max(len(self.train.names) // self.num_validation, 1)
        pictures = range(0, len(self.train.names), every)[: self.num_validation]
        return DataLoader(EmojiDataset(HELD_OUT_WORDINGS[:1], pictures), min(self.num_validation, 64))
