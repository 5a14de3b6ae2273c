"""One callback asking for another."""

from __future__ import annotations

from typing import Any, TypeVar

C = TypeVar("C")


def is_trial(trainer: Any) -> bool:
    """Whether this is a ``fast_dev_run``, which writes nothing."""
    return bool(trainer.fast_dev_run)


def find(trainer: Any, kind: type[C]) -> C | None:
    """The trainer's first callback of this kind, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
