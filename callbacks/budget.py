"""Stop exactly where the budget ends, and know what was spent."""

from __future__ import annotations

import time
from typing import Any

import lightning

from obsdiff.costs import Cost, exhausted, fraction_used
from obsdiff.errors import UserError


class Budget(lightning.Callback):
    """Counts what pruning and training cost and stops training before a limit is exceeded.

    A limit that is None does not limit. Calibration and solving count in full; the cosine schedule ends with it.

    Args:
        steps: Optimizer steps.
        images: Training images (or latents), over all processes.
        denoiser_flops: FLOPs in the denoisers.
        device_s: Seconds times processes.
        wall_s: Seconds.
    """

    def __init__(
        self,
        steps: int | None = None,
        images: int | None = None,
        denoiser_flops: float | None = None,
        device_s: float | None = None,
        wall_s: float | None = None,
    ) -> None:
        given = {
            "steps": steps,
            "images": images,
            "denoiser_flops": denoiser_flops,
            "device_s": device_s,
            "wall_s": wall_s,
        }
        self.limits = {name: float(limit) for name, limit in given.items() if limit is not None}
        if wrong := [name for name, limit in self.limits.items() if not limit > 0]:
            raise UserError(f"budget {wrong[0]} is {self.limits[wrong[0]]:g}; it must be positive")
        self.recovery = Cost()
        self._before: dict[str, Cost] = {}
        self._step_cost = Cost()
        self._marked = 0.0

    @property
    def before(self) -> Cost:
        """What pruning cost."""
        return sum(self._before.values(), Cost())

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        self._marked = time.perf_counter()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Refuse a budget that pruning has used up already."""
        self._before = pl_module.cost_before()
        for name, limit in self.limits.items():
            if (spent := getattr(self.before, name)) >= limit:
                raise UserError(f"the budget of {limit:g} {name} is less than what pruning already cost ({spent:.4g})")
        self._marked = time.perf_counter()
        self._apply(trainer, pl_module, at_step=True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        images = trainer.world_size * len(batch["latents"] if "latents" in batch else batch["image"])
        steps = trainer.global_step - self.recovery.steps
        spent = now - self._marked
        cost = Cost(steps, images, images * pl_module.flops_per_image(), spent * trainer.world_size, spent)
        self._marked = now
        self.recovery = self.recovery + cost
        each = trainer.accumulate_grad_batches  # a step is only worth starting if all its batches fit
        self._step_cost = Cost(1, images * each, cost.denoiser_flops * each, cost.device_s * each, cost.wall_s * each)
        self._apply(trainer, pl_module, at_step=steps > 0)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Evaluating is not recovering: its time does not count."""
        self._marked = time.perf_counter()

    def _apply(self, trainer: lightning.Trainer, pl_module: Any, at_step: bool) -> None:
        spent = self.before + self.recovery
        pl_module.budget_fraction = fraction_used(self.limits, self.before, spent)
        if at_step and exhausted(self.limits, spent, self._step_cost):
            trainer.should_stop = True

    def report(self) -> dict[str, Any]:
        """``limit`` and ``used`` by stage."""
        used = {**self._before, "recovery": self.recovery}
        return {"limit": self.limits, "used": {stage: cost.to_json() for stage, cost in used.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {"recovery": self.recovery.to_json(), "step": self._step_cost.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recovery, self._step_cost = Cost(**state_dict["recovery"]), Cost(**state_dict["step"])
