"""How long a prune will take, from shapes and how fast the device multiplies."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from obsdiff.obs.refit import STEPS
from obsdiff.pruning.memory_plan import SWEEPS, Shapes, Solving

# Shares of the speed of a large float32 product, measured on the preset of ``obsdiff bench prune``
FORWARD, STATISTICS, SWEEP, REFIT, FACTOR = 0.5, 0.7, 0.075, 0.45, 0.11
OPERATION_S = 12e-6  # of Python and torch around each of a call's operations
SIDE = 1024  # of the product that is timed


@dataclass(frozen=True)
class TimePlan:
    """Seconds by stage.

    Attributes:
        calibrate_s: Of all passes.
        scan_s: Of a sensitivity scan, without its solves.
        solve_s: Of all solves, a scan's included.
        draw_s: Of the images of an evaluation.
    """

    calibrate_s: float
    scan_s: float
    solve_s: float
    draw_s: float

    @property
    def total_s(self) -> float:
        """All of them."""
        return self.calibrate_s + self.scan_s + self.solve_s + self.draw_s


def products_per_s(device: torch.device | str) -> float:
    """FLOP/s of a square float32 product on a device, the best of three."""
    a = torch.ones(SIDE, SIDE, device=device)
    best = 0.0
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for it
        best = max(best, 2 * SIDE**3 / (time.perf_counter() - started))
    return best


def time_plan(
    shapes: Shapes,
    solving: Solving,
    *,
    speed: float,
    call_flops: float,
    operations: int,
    passes: int,
    prompts: int,
    batch_size: int,
    steps: int,
    images: int,
    image_batch: int,
    scan_passes: float = 0.0,
    levels: int = 1,
) -> TimePlan:
    """How long it takes.

    Forward passes by their FLOPs; statistics half a product of each input with itself; of each Hessian a Cholesky
    factor (n³ / 3), a sweep (R n²) and a refit (2 R n² a step).

    Args:
        shapes, solving: As for memory.
        speed: FLOP/s of a product (:func:`products_per_s`).
        call_flops: Of a call with one prompt, guidance included.
        operations: Of torch, in a call.
        passes: Of the calibration.
        prompts, batch_size, steps: Of a pass.
        images, image_batch: Of the evaluation, by each of two pipelines.
        scan_passes: What a scan runs, in calls with one prompt.
        levels: Patterns at which a scan solves each layer.
    """

    def calls_s(count: float, batch: float) -> float:
        return count * call_flops / (speed * FORWARD) + count / max(batch, 1) * operations * OPERATION_S

    products = solve = 0.0
    for site in shapes.sites if solving.measured else ():
        n, total = site.columns, site.weights // max(site.columns, 1)
        if solving.gram:
            products += prompts * steps * site.tokens * site.groups * n * n * (1 + 128 / n)
        if not site.rows or not solving.gram:
            continue
        factor = site.groups * n**3 / 3 / FACTOR if solving.method in SWEEPS or site.cut else 0.0
        sweep = total * n * n / SWEEP if solving.method in SWEEPS else 0.0
        refits = 2 * STEPS / 2 * total * n * n / REFIT if solving.refits else 0.0
        again = 1 + (levels if scan_passes else 0)
        solve += factor * min(again, 2) + again * (sweep + refits)
    hooks = 10 * len(shapes.sites) * OPERATION_S * passes * prompts * steps / max(batch_size, 1)
    calibrate_s = passes * calls_s(prompts * steps, batch_size) + products / (speed * STATISTICS) + hooks
    measured = solving.measured and not solving.reused
    return TimePlan(
        calibrate_s if measured else 0.0,
        calls_s(scan_passes, 16),
        solve / speed,
        calls_s(2 * images * steps, image_batch),
    )
