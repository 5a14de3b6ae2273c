"""What evaluations look like: grids into TensorBoard and PNG files, predictions as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from obsdiff.callbacks.find import is_trial
from obsdiff.errors import UserError
from obsdiff.evaluation.sampling import save_images
from obsdiff.files import check_writable

SAMPLES = "samples"


class SampleGrid(lightning.Callback):
    """After each validation: dense, pruned and present images of the same prompts and seeds, one above the other.

    Args:
        shown: Images per row.
    """

    def __init__(self, shown: int = 8) -> None:
        if shown < 1:
            raise UserError(f"shown is {shown}; a grid of samples needs at least 1 image in a row")
        self.shown = shown

    def check_place(self, pl_module: Any) -> None:
        """Refuse a folder where nothing can be written, before any work."""
        check_writable(Path(pl_module.output) / SAMPLES)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        validation = pl_module.validation
        now = None if validation is None else validation.shown
        if now is None or trainer.sanity_checking or is_trial(trainer) or not trainer.is_global_zero:
            return
        grid = image_grid([validation.refs.dense.guided, validation.refs.pruned.guided, now], self.shown)
        save_images(grid[None], [Path(pl_module.output) / SAMPLES / f"step-{trainer.global_step:07d}.png"])
        for logger in trainer.loggers:
            if isinstance(logger, lightning.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_image("dense, pruned, now", grid, trainer.global_step)


def image_grid(rows: list[Tensor], shown: int) -> Tensor:
    """Rows of images (n, c, h, w) as one image (c, H, W), a pixel apart."""
    from torchvision.utils import make_grid

    columns = min(shown, len(rows[0]))
    return make_grid(torch.cat([row[:columns] for row in rows]), nrow=columns, padding=1, pad_value=1.0)


class SampleWriter(lightning.pytorch.callbacks.BasePredictionWriter):
    """``predict`` writes each image as a PNG file, named by its number.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def check_place(self, pl_module: Any) -> None:
        """Refuse a folder where nothing can be written, before any work."""
        check_writable(self.folder)

    def write_on_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, prediction: dict[int, Tensor], *_: object
    ) -> None:
        if prediction and not is_trial(trainer):
            save_images(torch.stack(list(prediction.values())), [self.file(number) for number in prediction])

    def file(self, number: int) -> Path:
        """Where an image lies."""
        return self.folder / f"{number:05d}.png"
