"""The result of a recovery: written once training has ended."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_warn

from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.ema import averaged_weights
from obsdiff.callbacks.find import find, is_trial
from obsdiff.errors import UserError
from obsdiff.export.recovered import REPORT, RESULT, write_recovered
from obsdiff.files import check_folder, check_writable
from obsdiff.ranks import full_tensor, rank, wait_for_all


class Export(lightning.Callback):
    """Evaluates the recovered pipeline and writes it, with manifest, masks, report and samples, whole or not at all."""

    def check_place(self, pl_module: Any) -> None:
        """Refuse an output that holds another result, before any work."""
        replace, place = pl_module.overwrite or pl_module.resumed, pl_module.output / RESULT
        check_folder(place, REPORT, "a recovered run", replace=replace, hint="--model.overwrite true")
        check_writable(place)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Once the last checkpoint is written; also of a resumed run that had nothing left to train."""
        if is_trial(trainer):
            return
        budget = find(trainer, Budget)
        loss = trainer.callback_metrics.get("loss")
        with averaged_weights(trainer, pl_module):  # to the end: on a CPU the state is the weights themselves
            images = _drawn(pl_module)
            state = {name: full_tensor(tensor).cpu() for name, tensor in pl_module.denoiser.state_dict().items()}
            if rank() == 0:
                last, spent = None if loss is None else float(loss), None if budget is None else budget.report()
                report = write_recovered(pl_module, state, images, trainer.global_step, last, spent)
                if images is not None and "not_finite" in report["evaluation"]["recovered"]:
                    rank_zero_warn(
                        "images are not finite, so the report has no figures of them; the weights are written"
                    )
        wait_for_all()


def _drawn(module: Any) -> Any:
    """The evaluation's images, or None: a finished recovery is not lost because it cannot be measured."""
    try:
        return module.draw_all()
    except UserError as error:
        rank_zero_warn(f"the result is written without figures: {error}")
        return None
