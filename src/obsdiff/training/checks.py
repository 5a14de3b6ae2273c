"""What can be refused of a recovery before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter

from obsdiff.callbacks.find import is_trial
from obsdiff.data.loader import RecoveryData
from obsdiff.errors import UserError
from obsdiff.export.recovered import RESULT
from obsdiff.files import check_apart, check_writable
from obsdiff.numbers import check_seed, check_whole
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.training.objectives import TERMS
from obsdiff.training.optimizers import check_optimizer
from obsdiff.training.options import Objective, Optimization, Trained
from obsdiff.training.sharding import check_mesh
from obsdiff.training.stage import PRUNED, RECONSTRUCTION, REFERENCES, SENSITIVITY, STATISTICS

SCHEDULES = ("cosine", "constant")
FROZEN_DTYPES = ("float32", "bfloat16")


def check(holds: bool, name: str, value: object, wanted: str) -> None:
    """Refuse the ``value`` of the option ``name`` unless it ``holds`` (a comparison, so that NaN never does).

    Raises:
        UserError: Saying what is ``wanted``.
    """
    if not holds:
        raise UserError(f"{name} is {value}; it must be {wanted}")


def check_objective(objective: Objective) -> dict[str, float]:
    """The weights that are not zero.

    Raises:
        UserError: There is none, or one is negative or not finite; or no such dtype.
    """
    check_dtype("model.objective.teacher_dtype", objective.teacher_dtype)
    given = {name: weight for name, weight in vars(objective).items() if name in TERMS}
    weights = {name: float(weight) for name, weight in given.items() if weight}
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise UserError(
            "model.objective needs at least one positive weight, none negative, all finite, not "
            + ", ".join(f"{name}: {weight:g}" for name, weight in given.items())
        )
    return weights


def check_trained(trained: Trained) -> None:
    """Refuse a LoRA that cannot be, and frozen weights of a dtype that is none, or that are not only read.

    Raises:
        UserError: Naming the option.
    """
    if (rank := trained.lora_rank) is not None:
        check(rank >= 1, "model.trained.lora_rank", rank, "at least 1, or left out to train the weights themselves")
    check(0 < trained.lora_alpha < math.inf, "model.trained.lora_alpha", trained.lora_alpha, "a positive number")
    check_dtype("model.trained.frozen_dtype", trained.frozen_dtype)
    if trained.frozen_dtype is not None and trained.lora_rank is None:
        raise UserError("model.trained.frozen_dtype is for the weights that a LoRA is on; give model.trained.lora_rank")


def check_dtype(name: str, dtype: str | None) -> None:
    """Refuse what is no dtype to keep frozen weights in.

    Raises:
        UserError: Naming the option.
    """
    check(dtype is None or dtype in FROZEN_DTYPES, name, dtype, " or ".join(FROZEN_DTYPES))


def check_optimization(options: Optimization) -> None:
    """Refuse what the optimizer or its schedule cannot do.

    Raises:
        UserError: Naming the option.
    """
    where = "model.optimization"
    check(0 < options.lr < math.inf, f"{where}.lr", options.lr, "a positive number")
    check(0 <= options.weight_decay < math.inf, f"{where}.weight_decay", options.weight_decay, "0 or a positive number")
    betas = tuple(options.betas)
    fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    check(fits, f"{where}.betas", list(betas), "two numbers, at least 0 and below 1")
    check(options.warmup_steps >= 0, f"{where}.warmup_steps", options.warmup_steps, "at least 0")
    if options.schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {options.schedule!r}; choose {' or '.join(SCHEDULES)}")
    check_optimizer(options)


def check_evaluation(options: EvaluationOptions) -> None:
    """Refuse an evaluation that cannot be drawn.

    Raises:
        UserError: Naming the option.
    """
    where = "model.evaluation"
    check_whole(f"{where}.num_images", options.num_images, 0)
    check_whole(f"{where}.batch_size", options.batch_size)
    check_seed(f"{where}.seed", options.seed)
    check_seed(f"{where}.seed + num_images", options.seed + options.num_images)


def check_limits(trainer: Any) -> None:
    """Refuse a trainer that would train nothing, or never come to the end of an epoch.

    Raises:
        UserError: Naming the option.
    """
    for name in ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval"):
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name} is 0, so nothing would be trained; it must be positive, or left out")


def check_trainer(trainer: Any, weights: Mapping[str, float]) -> None:
    """Refuse a trainer that would prune and then train nothing.

    Args:
        trainer: Lightning's, with its data module.
        weights: Of the losses.

    Raises:
        UserError: Naming what stops it.
    """
    check_mesh(trainer.strategy, trainer.world_size, weights)
    if trainer.state.fn != "fit":
        return
    check_limits(trainer)
    if trainer.overfit_batches and isinstance(trainer.datamodule, RecoveryData):
        raise UserError("trainer.overfit_batches does not work with obsdiff's data; use trainer.limit_train_batches")
    if "denoise" in weights and hasattr(trainer.datamodule, "trajectories"):
        raise UserError(
            "objective denoise needs images, and "
            f"{type(trainer.datamodule).__name__} has none; choose another data module, or distil alone"
        )
    batch_size = getattr(trainer.datamodule, "batch_size", 1)
    check(not isinstance(batch_size, int) or batch_size >= 1, "data.batch_size", batch_size, "at least 1")


def check_interval(trainer: Any) -> None:
    """Refuse a number of batches between two validations that no epoch has, once the data module is set up.

    Raises:
        UserError: Naming both numbers.
    """
    every = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is None or not isinstance(every, int) or isinstance(every, bool):
        return
    if not isinstance(trainer.datamodule, RecoveryData):
        return
    if every > (batches := len(trainer.datamodule.train_dataloader())):
        raise UserError(
            f"trainer.val_check_interval is {every}, and an epoch has {batches} batches; lower it, or count over all "
            "epochs with --trainer.check_val_every_n_epoch null"
        )


def check_places(trainer: Any, module: Any) -> None:
    """Refuse an output whose parts cannot be written, before anything is recorded, pruned or drawn.

    Args:
        trainer: Lightning's; its callbacks know where they write (``check_place``).
        module: The :class:`obsdiff.training.recovery.Recovery`.

    Raises:
        UserError: Naming the place.
    """
    if is_trial(trainer) or trainer.state.fn not in ("fit", "predict"):
        return
    for callback in trainer.callbacks:
        predicts = isinstance(callback, BasePredictionWriter)
        if hasattr(callback, "check_place") and predicts == (trainer.state.fn == "predict"):
            callback.check_place(module)
    if trainer.state.fn != "fit":
        return
    for logger in trainer.loggers:
        if folder := getattr(logger, "log_dir", None):
            check_writable(Path(folder))
    if (module.output / REFERENCES).is_dir():
        raise UserError(f"{module.output / REFERENCES} is a folder, and a file is written there; move it away")
    if hasattr(trainer.datamodule, "trajectories"):
        for part in (PRUNED, STATISTICS, SENSITIVITY, RECONSTRUCTION, RESULT):
            check_apart(**{"data.folder": trainer.datamodule.folder, "model.output": module.output / part})
