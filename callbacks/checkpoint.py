"""Checkpoints that are there when they are needed, and are good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from obsdiff.callbacks.find import is_trial
from obsdiff.errors import UserError


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
            try:
                self._save_checkpoint(trainer, path)
            except OSError as error:
                raise UserError(
                    f"cannot write {path} at step {trainer.global_step}: {error.strerror or error}; the checkpoint "
                    "before it is intact, free some space and go on with --ckpt_path last"
                ) from error
            self.last_model_path = path
