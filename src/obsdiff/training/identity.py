"""What a run depends on, kept in its checkpoints, so that another run does not go on from them unasked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from obsdiff.callbacks.ema import EMA
from obsdiff.callbacks.find import find
from obsdiff.errors import UserError
from obsdiff.training.options import Optimization

# of data modules: what changes speed only, and what Lightning sets
INDIFFERENT = {
    "num_workers",
    "record_batch_size",
    "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices",
}


def settings_of(module: Any) -> dict[str, Any]:
    """Everything besides the pruned pipeline and the budget that the trained weights depend on, as plain values.

    Args:
        module: The :class:`obsdiff.training.recovery.Recovery`, in its trainer.
    """
    trainer, average = module.trainer, find(module.trainer, EMA)
    found = {f"data.{key}": value for key, value in data_settings(trainer.datamodule).items()}
    found |= {f"ema.{key}": None if average is None else getattr(average, key) for key in EMA_SETTINGS}
    found |= {f"trainer.{key}": getattr(trainer, key) for key in TRAINER_SETTINGS}
    return {**module_settings(module), **_plain(found)}


def module_settings(module: Any) -> dict[str, Any]:
    """Those of them that the module knows by itself."""
    found = {
        "objective": dict(module.weights),
        "teacher_dtype": module.teacher_dtype,
        "prompt_dropout": module.prompt_dropout,
        "seed": module.seed,
    }
    found |= {f"optimization.{key}": value for key, value in vars(module.optimization).items()}
    found |= {f"trained.{key}": value for key, value in vars(module.trained).items() if key != "gradient_checkpointing"}
    return _plain(found)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


ADAPTER_SETTINGS = ("trained.lora_alpha", "trained.include")
EMA_SETTINGS = ("decay", "update_every_n_steps")
TRAINER_SETTINGS = ("accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def data_settings(data: Any) -> dict[str, Any]:
    """Class and plain attributes of a data module; lists of texts by their digest, a recording by its content."""
    if data is None:
        return {}
    found: dict[str, Any] = {"class": f"{type(data).__module__}.{type(data).__qualname__}"}
    for name, value in vars(data).items():
        if name.startswith("_") or name in INDIFFERENT:
            continue
        if isinstance(value, str | int | float | bool | None | Path):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            found[name] = hashlib.sha256("\0".join(value).encode()).hexdigest()[:12]
    if (recording := getattr(data, "trajectories", None)) is not None:
        for place in ("folder", "pipeline"):
            found.pop(place, None)
        found["recording"] = hashlib.sha256(json.dumps(recording.request).encode()).hexdigest()[:12]
    return found


def differences(found: Mapping[str, Any], now: Mapping[str, Any], both: bool = False) -> list[str]:
    """What differs, in words; what only one of them knows differs too, unless ``both`` must know it."""
    return [
        f"{key} ({found.get(key)} there, {now.get(key)} here)"
        for key in ({**found, **now} if not both else found.keys() & now.keys())
        if found.get(key) != now.get(key)
    ]


def check_settings(checkpoint: dict[str, Any], found: Mapping[str, Any], module: Any) -> None:
    """Refuse to go on with other settings than a checkpoint was trained with, unless that is asked for.

    Args:
        checkpoint: If it is asked for, its optimizer and schedule are given the settings of now.
        found: The settings kept in it.
        module: The :class:`obsdiff.training.recovery.Recovery`, in its trainer.

    Raises:
        UserError: Saying what differs.
    """
    if not (changed := differences(found, settings_of(module))):
        return
    said = f"this checkpoint was trained with other settings: {'; '.join(changed)}"
    if not module.resume_changed:
        raise UserError(f"{said}; use the same, or pass --model.resume_changed true to go on with those of now")
    rank_zero_warn(f"{said}; going on with those of now")
    adopt(checkpoint, module.optimization)


def check_adapters(found: Mapping[str, Any], module: Any) -> None:
    """Refuse to evaluate a checkpoint's adapters on other layers, or with another weight.

    Args:
        found: The settings kept in it.
        module: The :class:`obsdiff.training.recovery.Recovery`.

    Raises:
        UserError: Saying what differs.
    """
    if module.trained.lora_rank is None:
        return
    now = {key: value for key, value in module_settings(module).items() if key in ADAPTER_SETTINGS}
    if changed := differences({key: found.get(key, value) for key, value in now.items()}, now):
        raise UserError(f"this checkpoint's adapters were trained with other settings: {'; '.join(changed)}")


def adopt(checkpoint: dict[str, Any], options: Optimization) -> None:
    """Let a checkpoint's optimizer and schedule go on with other ``options``, where they are AdamW and its schedule."""
    for schedule in checkpoint.get("lr_schedulers", []):
        if "base_lrs" in schedule:
            schedule["base_lrs"] = [options.lr for _ in schedule["base_lrs"]]
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            if {"lr", "initial_lr", "betas", "weight_decay"} <= group.keys():
                share = group["lr"] / group["initial_lr"] if group["initial_lr"] else math.nan
                group["lr"] = options.lr * share if math.isfinite(share) else options.lr
                group |= {"initial_lr": options.lr, "betas": tuple(options.betas), "weight_decay": options.weight_decay}
