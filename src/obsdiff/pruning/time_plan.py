"""How long a prune will take, from shapes and how fast the device multiplies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obsdiff.costs import STREAMED
from obsdiff.obs.refit import STEPS
from obsdiff.pruning.memory_plan import SWEEPS, sums
from obsdiff.pruning.memory_shapes import Batches, Shapes, Solving

# Shares of the speed of a large float32 product, measured on the preset of ``obsdiff bench prune``
FORWARD, STATISTICS, SWEEP, REFIT, FACTOR = 0.5, 0.7, 0.075, 0.45, 0.11
OPERATION_S = 12e-6  # of Python and torch around each of a call's operations
HOOK_OPERATIONS = 10  # of adding a call to the statistics of one site
SCAN_ROWS = 16  # prompts in a call of a scan, in the mean
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


@dataclass(frozen=True)
class Speed:
    """How fast the denoiser and solves are.

    Attributes:
        products_per_s: FLOP/s of a product (:func:`products_per_s`).
        call_flops: Of a call with one prompt, guidance included.
        operations: Of torch, in a call.
    """

    products_per_s: float
    call_flops: float
    operations: int

    def calls_s(self, count: float, batch: float) -> float:
        """Seconds for calls with ``count`` prompts in all, so many at a time."""
        computing = count * self.call_flops / (self.products_per_s * FORWARD)
        return computing + count / max(batch, 1) * self.operations * OPERATION_S


@dataclass(frozen=True)
class Amount:
    """How much there is to do.

    Attributes:
        prompts, steps: Of a calibration pass; an evaluation has as many steps.
        images: Of the evaluation, by each of two pipelines.
        scan_calls: What a scan runs, in calls with one prompt.
        levels: Patterns at which it solves each layer.
    """

    prompts: int
    steps: int
    images: int
    scan_calls: float = 0.0
    levels: int = 1


def time_plan(
    shapes: Shapes, solving: Solving, batches: Batches, speed: Speed, amount: Amount, processes: int = 1
) -> TimePlan:
    """How long it takes: forward passes by their FLOPs; statistics the upper triangle of a product of each input with
    itself; of each Hessian a Cholesky factor (n³ / 3), a sweep (R n²) and a refit (2 R n² a step, half of the steps
    that it may take).

    Several processes share a calibration by batches, images one by one, and solves by rounds (:func:`in_rounds`); that
    each of them computes as fast as one does alone, and that nothing has to be sent, is assumed.
    """
    products = 0.0
    calls, passes = amount.prompts * amount.steps, STREAMED if batches.recorded else len(batches.packages)
    again = 1 + (amount.levels if amount.scan_calls else 0)
    costs: dict[str, float] = {}
    for site in shapes.sites if solving.measured and solving.gram else ():
        n, rows = site.columns, site.groups * sum(site.rows)
        products += 2 * calls * site.tokens * site.groups * sums(site, solving)
        if not site.rows:
            continue
        swept = solving.method in SWEEPS
        factor = site.groups * n**3 / 3 / FACTOR if swept or site.cut else 0.0
        sweep = rows * n * n / SWEEP if swept else 0.0
        refits = STEPS * rows * n * n / REFIT if solving.refits else 0.0
        costs[site.name] = factor * min(again, 2) + again * (sweep + refits)
    solve = sum(in_rounds([costs[name] for name in names if name in costs], processes) for names in batches.packages)
    hooks = HOOK_OPERATIONS * len(shapes.sites) * OPERATION_S * calls / max(batches.prompts, 1)
    calibrate_s = passes * (speed.calls_s(calls, batches.prompts) + hooks)
    calibrate_s += products / (speed.products_per_s * STATISTICS)
    calibrate_s *= largest_share(amount.prompts, batches.prompts, processes)
    drawn = -(-amount.images // processes)
    return TimePlan(
        calibrate_s if solving.measured and not solving.reused else 0.0,
        speed.calls_s(amount.scan_calls, SCAN_ROWS) / processes,
        solve / speed.products_per_s,
        speed.calls_s(2 * drawn * amount.steps, min(batches.images, drawn)),
    )


def largest_share(count: int, batch: int, processes: int) -> float:
    """Of work that is dealt out in batches, the share of the process that has most."""
    units = -(-count // max(batch, 1))
    return -(-units // processes) / units if units else 1.0


def in_rounds(costs: Sequence[float], processes: int) -> float:
    """What work costs that is done in rounds of one item for each process, the dearest first, as single weights are
    (:func:`obsdiff.ranks.solved_in_turn`): a round costs what its dearest item does."""
    return sum(sorted(costs, reverse=True)[::processes])
