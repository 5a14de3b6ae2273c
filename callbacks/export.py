"""The result of a recovery: written once training has ended."""

from __future__ import annotations

from typing import Any

import lightning

from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.ema import averaged_weights
from obsdiff.callbacks.find import find
from obsdiff.export.recovered import RESULT, write_recovered
from obsdiff.pruning.folder import check_output
from obsdiff.ranks import full_tensor, rank, wait_for_all


class Export(lightning.Callback):
    """Evaluates the recovered pipeline and writes it, with manifest, masks, report and samples, whole or not at all."""

    def __init__(self) -> None:
        self._written = False

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse an output that holds another result, before any work."""
        if stage == "fit":
            check_output(pl_module.output / RESULT, pl_module.overwrite or pl_module.resumed, "--model.overwrite true")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """A run resumed after its last step trains nothing, but its result may be missing."""
        self._write(trainer, pl_module)

    def _write(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._written:
            return
        self._written = True
        budget = find(trainer, Budget)
        loss = trainer.callback_metrics.get("loss")
        with averaged_weights(trainer, pl_module):
            images = pl_module.draw_all()
            state = {name: full_tensor(tensor).cpu() for name, tensor in pl_module.denoiser.state_dict().items()}
        if rank() == 0:
            last, spent = None if loss is None else float(loss), None if budget is None else budget.report()
            write_recovered(pl_module, state, images, trainer.global_step, last, spent)
        wait_for_all()
