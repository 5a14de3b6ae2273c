"""The optimizer of a recovery: AdamW, or another class by its path."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from obsdiff.errors import UserError
from obsdiff.training.options import Optimization
from obsdiff.training.precision import adam_epsilon

ADAMW = "torch.optim.AdamW"
OPTION, ARGUMENTS = "model.optimization.optimizer", "model.optimization.arguments"
OURS = ("weight_decay", "betas")  # what other optimizers may do without


def optimizer_of(options: Optimization, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``options`` name, over ``parameters`` of one dtype.

    Raises:
        UserError: There is none such, or it refuses its arguments.
    """
    kind, own = optimizer_class(options), dict(options.arguments or {})
    given: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, "betas": options.betas}
    given = {key: value for key, value in given.items() if key in _accepted(kind)}
    if kind is torch.optim.AdamW:
        given["eps"] = adam_epsilon(parameters[0].dtype)
        if not own.keys() & {"fused", "foreach"}:
            given["foreach"] = True
    return _made(kind, parameters, {**given, **own})


def check_optimizer(options: Optimization) -> None:
    """Refuse an optimizer that cannot be made, before anything is loaded.

    Raises:
        UserError: Naming the option.
    """
    optimizer_of(options, [nn.Parameter(torch.zeros(1))])


def optimizer_class(options: Optimization) -> type[torch.optim.Optimizer]:
    """The class that ``options`` name.

    Raises:
        UserError: There is no such class, it is no optimizer, or has no place for what the other options say.
    """
    path = options.optimizer or ADAMW
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{OPTION} is {path}, which cannot be imported ({reason}); name a class, such as {ADAMW}"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"{OPTION} is {path}, which is no torch optimizer; name a class, such as {ADAMW}")
    accepted, default = _accepted(kind), Optimization()
    for key in OURS:
        if key not in accepted and (asked := getattr(options, key)) != getattr(default, key):
            raise UserError(f"model.optimization.{key} is {asked}, and {path} has none; leave it out")
    for key in options.arguments or {}:
        if key in ("params", "lr", *OURS):
            raise UserError(f"{ARGUMENTS} has {key}; give it as model.optimization.{key}")
        if key not in accepted:
            raise UserError(
                f"{ARGUMENTS} has {key}, which {path} does not take; it takes {', '.join(sorted(accepted))}"
            )
    return kind


def schedule_of(
    optimizer: torch.optim.Optimizer, options: Optimization, done: Callable[[int], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then cosine or constant.

    Args:
        optimizer: Whose rate it sets.
        options: The schedule and its warm-up.
        done: The share of the run that is behind at an optimizer step; above 1 at its end.
    """

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(done(step), 1.0))) if options.schedule == "cosine" else 1.0
        return min(1.0, (step + 1) / max(options.warmup_steps, 1)) * cosine

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _accepted(kind: type[torch.optim.Optimizer]) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"params"}


def _made(
    kind: type[torch.optim.Optimizer], parameters: Iterable[nn.Parameter], given: dict[str, Any]
) -> torch.optim.Optimizer:
    make: Any = kind
    try:
        made: torch.optim.Optimizer = make(parameters, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{kind.__name__} cannot be made with {given}: {reason}; see {ARGUMENTS}") from error
    return made
