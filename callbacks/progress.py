"""How far a run is, in steps of its budget, instead of Lightning's epochs."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, ProgressBar

from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.find import find
from obsdiff.progress import Progress, duration

MEASURED = {"mse": "MSE to dense {:.3g}", "alignment": "alignment {:.1%}", "frechet": "Fréchet {:.2f}"}
REFRESH_S = 0.5  # reading the loss waits for the device, so not at every step


class BudgetProgress(ProgressBar):
    """Steps of the budget (or the share of it that is used, where steps are not what limits), loss and time left.

    On a terminal a bar, otherwise a line every few seconds; each evaluation is one line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._shown: Progress | None = None
        self._refreshed = self._evaluating = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What the module prints, between the bars."""
        self._say(" ".join(str(arg) for arg in args))

    def _say(self, text: str) -> None:
        if self._shown is not None:
            self._shown.say(text)
        elif self._enabled:
            print(text, file=sys.stderr)

    def _open(self, what: str, total: float, done: float = 0, counted: str | None = None) -> None:
        self._close()
        if self._enabled:
            self._shown = Progress(what, total, done, counted).__enter__()

    def _close(self, error: BaseException | None = None) -> None:
        if self._shown is not None:
            self._shown.__exit__(None if error is None else type(error), error, None)
            self._shown = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        done, total, counted = used_of_budget(trainer, pl_module)
        self._open("training", total, done, counted)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: object) -> None:
        now = time.monotonic()
        if self._shown is not None and now - self._refreshed >= REFRESH_S:
            self._refreshed = now
            self._update(trainer, pl_module)

    def _update(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._shown is not None:
            done, _, counted = used_of_budget(trainer, pl_module)
            self._shown.update(done, counted, ", ".join(_figures(trainer.progress_bar_metrics)))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._update(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close(exception)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._evaluating = time.monotonic()
        if trainer.state.fn == "validate":
            self._open("validating", sum(trainer.num_val_batches))
        elif not trainer.sanity_checking:
            self._update(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        if trainer.state.fn == "validate" and self._shown is not None:
            self._shown.update(batch_idx + 1)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._close()
            return
        found = {key.removeprefix("val/"): v for key, v in trainer.callback_metrics.items() if key.startswith("val/")}
        known = [form.format(float(found[key])) for key, form in MEASURED.items() if key in found]
        if not trainer.sanity_checking and (figures := known or _figures(found)):
            took = duration(time.monotonic() - self._evaluating)
            self._say(f"step {trainer.global_step:,}: {', '.join(figures)} (measured in {took})")

    def on_test_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._open("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        if self._shown is not None:
            self._shown.update(batch_idx + 1)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._close()

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._open("drawing", sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        if self._shown is not None:
            self._shown.update(batch_idx + 1)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._close()


class RateAndBudget(LearningRateMonitor):
    """Logs the learning rate, the used share of the budget (``budget/used``), and what was spent of each limit."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: object) -> None:
        budget = find(trainer, Budget)
        if budget is None:
            return
        spent = budget.before + budget.recovery
        values = {name: float(getattr(spent, name)) for name in budget.limits}
        pl_module.log_dict({f"budget/{name}": v for name, v in {"used": pl_module.budget_fraction, **values}.items()})


class ShortSummary(ModelSummary):
    """One line in place of Lightning's table: how much of the model is trained."""

    @staticmethod
    def summarize(
        summary_data: Any, total_parameters: int, trainable_parameters: int, model_size: float, *_: Any, **__: Any
    ) -> None:
        print(
            f"training: {trainable_parameters:,} of {total_parameters:,} parameters ({model_size:,.1f} MB)",
            file=sys.stderr,
        )


def used_of_budget(trainer: lightning.Trainer, pl_module: Any) -> tuple[float, float, str]:
    """How far training is: done, total (infinite if nothing limits it), and the count as text.

    In optimizer steps where only they are limited, otherwise in shares of the budget that pruning left.
    """
    steps, budget = trainer.global_step, find(trainer, Budget)
    limits = {} if budget is None else budget.limits
    most = min(limits.get("steps", math.inf), _most_steps(trainer))
    if set(limits) <= {"steps"}:
        return steps, most, f"{steps:,}/{most:,.0f} steps" if math.isfinite(most) else f"{steps:,} steps"
    return max(float(pl_module.budget_fraction), steps / most), 1.0, f"{steps:,} steps"


def _most_steps(trainer: lightning.Trainer) -> float:
    return float(trainer.estimated_stepping_batches)


def _figures(found: Any) -> list[str]:
    return [f"{name} {float(value):.4g}" for name, value in found.items()]
