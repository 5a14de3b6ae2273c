"""An exponential moving average of the trained weights that survives pruning in setup, sharding and resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from obsdiff.callbacks.find import find
from obsdiff.errors import UserError
from obsdiff.ranks import full_tensor, local_part, sharded_like


class EMA(lightning.Callback):
    """Averages the trained parameters after every optimizer step; evaluation and export use the average.

    Lightning's own averaging copies the whole module before it is pruned and does not work sharded. Masked weights are
    zero at every step, so their average is exactly zero as well.

    Args:
        decay: Of the average.
        update_every_n_steps: Optimizer steps between two updates.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema.decay is {decay:g}; it must be at least 0 and below 1")
        if update_every_n_steps < 1:
            raise UserError(f"ema.update_every_n_steps is {update_every_n_steps}; it must be at least 1")
        self.decay, self.update_every_n_steps = decay, update_every_n_steps
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    @staticmethod
    def _trained(pl_module: Any) -> dict[str, Tensor]:
        return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}

    def _prepare(self, pl_module: Any) -> None:
        """The average from the checkpoint, or the weights as they are."""
        for name, parameter in self._trained(pl_module).items():
            if name in self._loaded:
                self._average[name] = sharded_like(self._loaded[name], parameter).clone()
            elif name not in self._average:
                self._average[name] = local_part(parameter.detach()).clone()
        self._loaded = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._prepare(pl_module)
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: object) -> None:
        if trainer.global_step > self._step and trainer.global_step % self.update_every_n_steps == 0:
            current = [local_part(parameter.detach()) for parameter in self._trained(pl_module).values()]
            self._update(list(self._average.values()), current, torch.tensor(0))
        self._step = trainer.global_step

    @contextmanager
    def averaged(self, pl_module: Any) -> Iterator[None]:
        """The module with the averaged weights, for as long as the block lasts."""
        self._prepare(pl_module)
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        for name, parameter in self._trained(pl_module).items():
            current, average = local_part(parameter.detach()), self._average[name]
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._average:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._average:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The weights in training stay under ``state_dict``; the average goes under ``ema``, whole."""
        if self._average:
            checkpoint["ema"] = {
                name: full_tensor(_like(self._average[name], parameter)).cpu().clone()
                for name, parameter in self._trained(pl_module).items()
            }

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._loaded = dict(checkpoint.get("ema", {}))


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """This process's part as a sharded tensor again, if the parameter is one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def refuse_averaging(trainer: lightning.Trainer) -> None:
    """Refuse Lightning's own averaging of weights: it copies the module in its setup, before there is a denoiser. And
    two averages, which would swap each other's weights.

    Raises:
        UserError: The trainer has such callbacks.
    """
    if sum(isinstance(callback, EMA) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]  # as below
        raise UserError("the trainer has more than one EMA; give it one")
    kinds = (WeightAveraging, StochasticWeightAveraging)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, kinds):
            raise UserError(
                f"{type(callback).__name__} copies the module before it is pruned, so it would average nothing; use "
                "obsdiff.callbacks.ema.EMA"
            )


@contextmanager
def averaged_weights(trainer: lightning.Trainer, pl_module: Any) -> Iterator[None]:
    """The module with averaged weights if the trainer keeps an average, otherwise as it is."""
    average = find(trainer, EMA)
    if average is None:
        yield
        return
    with average.averaged(pl_module):
        yield
