"""A training loader whose order depends on (seed, epoch) alone and that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from obsdiff.errors import UserError
from obsdiff.numbers import check_seed, check_whole
from obsdiff.ranks import keyed_generator, rank, world_size


def check_loading(batch_size: int, num_workers: int, seed: int) -> None:
    """Refuse options that no loader can meet, before anything is read.

    Raises:
        UserError: One is out of range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        check_whole(f"data.{name}", value, least)
    check_seed("data.seed", seed)


def check_enough(count: int, batch_size: int, what: str) -> None:
    """Refuse fewer items than one batch on every process.

    Raises:
        UserError: There are fewer.
    """
    if count < batch_size * world_size():
        raise UserError(
            f"{what} has {count} items, fewer than one batch of {batch_size} on {world_size()} processes; "
            "lower the batch size"
        )


class EpochSampler(DistributedSampler[int]):
    """This process's share of a shuffled epoch; every process gets the same number of whole batches.

    Args:
        count: Items in all.
        batch_size: Items per batch and process.
        seed: Of the shuffling.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        # one of torch's own, so that Lightning leaves it alone on several processes
        super().__init__(range(count), world_size(), rank(), seed=seed, drop_last=True)  # type: ignore[arg-type]  # only its length counts
        self.count, self.batch_size = count, batch_size
        self.skipped = (0, 0)  # in this epoch, so many batches are done already
        self.num_batches = count // (batch_size * world_size())

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=keyed_generator(self.seed, self.epoch))
        own = order[rank() :: world_size()][: self.num_batches * self.batch_size]
        epoch, done = self.skipped
        first = done if epoch == self.epoch else 0
        yield from own[first * self.batch_size :].tolist()

    def __len__(self) -> int:
        return self.num_batches * self.batch_size


class ResumableLoader(DataLoader[Any]):
    """Batches in an order of its own, resumable through Lightning's checkpoints.

    Args:
        dataset: Map-style. If it has ``start_epoch(epoch)``, that is called before each epoch; if it has
            ``check(least)``, that is called before each batch is given out, in this process, with the number of items
            that an epoch is certain to read.
        batch_size: Items per batch and process; the last short batch is dropped.
        seed: Of the shuffling.
        batches_done: Tells how many batches of this epoch are trained on (prefetched ones do not count).
        num_workers: Loader processes.
        what: What the dataset is called in errors.

    Raises:
        UserError: There are fewer items than one batch on every process.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        batches_done: Callable[[], int],
        num_workers: int = 0,
        what: str = "the data set",
    ) -> None:
        count = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        check_enough(count, batch_size, what)
        self.batches_done = batches_done
        super().__init__(
            dataset,
            batch_size,
            sampler=EpochSampler(count, batch_size, seed),
            num_workers=num_workers,
            drop_last=True,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning and torch need no more than this
        start: Any = getattr(self.dataset, "start_epoch", None)
        check: Any = getattr(self.dataset, "check", None)
        assert isinstance(self.sampler, EpochSampler)
        least = len(self.sampler)
        if start is not None:
            start(self.sampler.epoch)
        try:
            for batch in super().__iter__():
                if check is not None:
                    check(least)
                yield batch
        except UserError:
            if check is not None:
                check(least)  # says it in one line; what comes out of a worker holds that worker's traceback
            raise

    def state_dict(self) -> dict[str, int]:
        """Where this epoch stands."""
        assert isinstance(self.sampler, EpochSampler)
        return {"epoch": self.sampler.epoch, "batches_done": self.batches_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        assert isinstance(self.sampler, EpochSampler)
        done = state["batches_done"]
        self.sampler.epoch = state["epoch"]
        self.sampler.skipped = (state["epoch"], done if done < self.sampler.num_batches else 0)


class RecoveryData(lightning.LightningDataModule):
    """Base of data modules for training; what is validated, tested and predicted is the recovery's own evaluation.

    Lightning asks the data module alone for its loaders, although prompts and seeds of an evaluation belong to the run.

    Attributes:
        image_shape: Channels, height and width of the images in its batches; None if they hold no images.
    """

    image_shape: tuple[int, int, int] | None = None

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return module.evaluation_loader()

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()


class SmallData(RecoveryData):
    """A training set that fits in memory, in batches; the last short one is dropped.

    Args:
        train: Map-style.
        what: What it is called in errors.
        batch_size: Items per optimizer step and process.
        num_workers: Loader processes; the set is tiny, so 0 is fastest.
        seed: Of the shuffling.
    """

    def __init__(self, train: Any, what: str, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        check_loading(batch_size, num_workers, seed)
        self.train, self.what = train, what
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def setup(self, stage: str) -> None:
        """See that there is a batch for every process."""
        if stage == "fit":
            check_enough(len(self.train), self.batch_size, self.what)

    def train_dataloader(self) -> ResumableLoader:
        done = batches_done(self.trainer)
        return ResumableLoader(self.train, self.batch_size, self.seed, done, self.num_workers, self.what)


def batches_done(trainer: Any) -> Callable[[], int]:
    """How far Lightning's trainer is in its epoch."""
    return lambda: int(trainer.fit_loop.epoch_loop.batch_progress.current.processed)
