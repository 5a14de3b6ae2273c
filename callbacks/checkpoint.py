"""Checkpoints that are there when they are needed, and are good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from obsdiff.callbacks.find import is_trial
from obsdiff.errors import UserError
from obsdiff.files import check_writable, whole_file
from obsdiff.ranks import rank, wait_for_all

BEFORE = "last-before.ckpt"  # the one before, for the moment in which a folder takes its place


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their target and renamed.

    Lightning writes to the system's temporary folder; where that is another disk, putting the file in place is a copy
    that a kill or a full disk leaves half done, over the checkpoint before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, whole or not at all; other than local files go Lightning's way."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own word for a failed write, which it hides
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date, replaced in one piece: every so many steps, at the end, and on an exception.

    Not for errors that the user can mend, such as a gradient that became NaN: the last good checkpoint stays then. And
    not between the batches of one step, whose gradients a checkpoint does not hold.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimizer steps between two.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 100) -> None:
        super().__init__(dirpath=dirpath, save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps)

    def check_place(self, pl_module: Any) -> None:
        """Refuse a folder where nothing can be written, before any work."""
        check_writable(Path(str(self.dirpath)))

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Have all checkpoints of this run written whole, those of other callbacks too."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            self._keep(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._keep(trainer)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        between_steps = progress.processed % trainer.accumulate_grad_batches == 0
        if trainer.training and between_steps and not isinstance(exception, UserError):
            self._keep(trainer)

    def _keep(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step > 0 and not is_trial(trainer) and self._last_global_step_saved != trainer.global_step:
            path = str(Path(str(self.dirpath)) / "last.ckpt")
            before = Path(path).exists()
            try:
                self._save_whole(trainer, Path(path))
            except UserError as error:
                kept = (
                    "the checkpoint before it is intact, go on from it with --ckpt_path last"
                    if before
                    else ("there is none before it, the pruned pipeline is kept")
                )
                raise UserError(f"at step {trainer.global_step}: {error}; {kept}") from error
            self.last_model_path = path

    def _save_whole(self, trainer: lightning.Trainer, path: Path) -> None:
        """Save a checkpoint; of a folder of shards too the one before stays until the new one is complete."""
        if not isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            self._save_checkpoint(trainer, str(path))
            return
        part, before = path.with_name(f"{path.name}.part"), path.with_name(BEFORE)
        if rank() == 0:
            _remove(part)
        wait_for_all()
        self._save_checkpoint(trainer, str(part))
        wait_for_all()
        if rank() == 0:
            if path.exists() and (part.is_dir() or path.is_dir()):
                _remove(before)
                path.rename(before)
            os.replace(part, path)
            _remove(before)
        wait_for_all()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
