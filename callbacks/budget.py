"""Stop exactly where the budget ends, and know what was spent."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning

from obsdiff.costs import Cost, exhausted, fraction_used
from obsdiff.errors import UserError
from obsdiff.ranks import broadcast_numbers


class Budget(lightning.Callback):
    """Counts what pruning and training cost and stops training before a limit is exceeded.

    A limit that is None does not limit. Calibration and solving count in full; the cosine schedule ends with it. What
    is spent is what the first process's clock and batches say, on every process: schedule and end are the same on all.

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
        for name, limit in self.limits.items():
            if not 0 < limit < math.inf:
                raise UserError(f"budget.{name} is {limit:g}; it must be a positive number, or left out for no limit")
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
        self.check(self.before, "already cost")
        self._marked = time.perf_counter()
        self._apply(trainer, pl_module, at_step=True)

    def check(self, before: Cost, verb: str) -> None:
        """Refuse limits that what comes before training does not leave anything of.

        Args:
            before: What that costs.
            verb: "already cost", or "will cost" if it is yet to be done.

        Raises:
            UserError: A limit is no larger.
        """
        for name, limit in self.limits.items():
            if (spent := getattr(before, name)) >= limit:
                raise UserError(f"the budget of {limit:g} {name} is less than what pruning {verb} ({spent:.4g})")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        images: float = trainer.world_size * len(batch["latents"] if "latents" in batch else batch["image"])
        flops = trainer.world_size * pl_module.batch_flops
        steps = trainer.global_step - self.recovery.steps
        spent = now - self._marked
        if self.limits.keys() - {"steps"}:  # steps are the same everywhere; clocks are not, and batches need not be
            images, flops, spent = broadcast_numbers([images, flops, spent], pl_module.device)
        cost = Cost(steps, images, flops, spent * trainer.world_size, spent)
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
