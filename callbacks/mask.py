"""Zeros stay zeros: masks are re-applied after every optimizer step, and checked."""

from __future__ import annotations

from typing import Any

import lightning
from torch import Tensor, nn

from obsdiff.pruning.masks import apply_masks, nonzero_outside
from obsdiff.ranks import from_all, local_part, sharded_like


class MaskEnforcement(lightning.Callback):
    """Multiplies the pruned weights by their masks right after each optimizer step, in one fused operation.

    Zeroing gradients would not do: momentum and weight decay move weights whose gradient is zero. The masks are checked
    at the end of every epoch and before every checkpoint; a weight that came back stops the run.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._named: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Find the weights as the strategy left them (sharded, on their device) and hook the optimizers."""
        self._collect(pl_module)
        self.apply()
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _collect(self, pl_module: Any) -> None:
        own = dict(pl_module.denoiser.named_parameters())
        self._named = {}
        for name, mask in pl_module.named_masks().items():
            parameter: nn.Parameter = own[name]
            self._named[name] = (local_part(parameter.detach()), sharded_like(mask, parameter))
        self._weights = [weight for weight, _ in self._named.values()]
        self._factors = [kept.to(weight.dtype) for weight, kept in self._named.values()]

    def _after_step(self, *_: object) -> None:
        self.apply()

    def apply(self) -> None:
        """Zero what is masked."""
        apply_masks(self._weights, self._factors)

    def check(self, when: str) -> None:
        """Stop if a masked weight is not exactly zero on any process.

        Raises:
            RuntimeError: It is not.
        """
        broken = nonzero_outside(self._named)
        if everyone := sorted({name for part in from_all(broken) for name in part}):
            raise RuntimeError(f"{len(everyone)} pruned layers, such as {everyone[0]}, are not zero {when}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.check(f"after epoch {trainer.current_epoch}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.check("at the end of training")
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._named:
            self.check(f"at step {trainer.global_step}, before a checkpoint")
