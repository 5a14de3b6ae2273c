"""What a recovery may cost, and what was spent: calibration and solving count too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

BACKWARD = 2  # a backward pass costs twice its forward pass, weights and activations once each
STREAMED = 3  # passes of a streamed calibration: recording, measuring, and going on through the pruned stages


@dataclass(frozen=True)
class Cost:
    """What a stage spent, or may spend.

    Attributes:
        steps: Optimizer steps.
        images: Training images (or latents of trajectories) seen, over all processes.
        denoiser_flops: In the denoisers, dense and pruned, over all processes; zeros in dense tensors count in full.
        device_s: Seconds times processes.
        wall_s: Seconds.
    """

    steps: float = 0
    images: float = 0
    denoiser_flops: float = 0.0
    device_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_json(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def calibration_cost(manifest: Mapping[str, Any], flops: int, processes: int) -> dict[str, Cost]:
    """What pruning cost, by stage, from the manifest of a prune.

    Args:
        manifest: ``pruning.json``.
        flops: FLOPs of one dense denoiser call with one image.
        processes: How many worked on it.
    """
    times, settings = manifest.get("time_s", {}), manifest.get("statistics") or {}
    halves = 2 if (settings.get("guidance_scale") or 0) > 1 else 1
    packages = STREAMED if manifest.get("streamed") else manifest.get("packages", 1)
    calls = packages * settings.get("num_prompts", 0) * (settings.get("steps") or 0)
    depth = manifest.get("depth") or {}
    allocation = manifest.get("allocation") or {}
    scan, stages = allocation.get("scan", {}), allocation.get("stages", {})
    own = settings.get("gradients") or settings.get("gates") or {}
    passes = calls if own.get("inputs", True) else 0
    rows = packages * own.get("rows", 0)

    def cost(stage: str, calls: float) -> Cost:
        wall_s = float(times.get(stage, 0.0))
        return Cost(0, 0, calls * halves * flops, wall_s * processes, wall_s)

    costs = {
        "calibration": cost("calibrate", passes + rows / halves + manifest.get("weighing_calls", 0)),
        "allocation": cost("allocate", sum(of.get("denoiser_calls", 0) for of in (scan, stages, depth))),
        "solving": cost("solve", 0),
    }
    if (reconstruction := manifest.get("reconstruction")) is not None:
        costs["reconstruction"] = replace(cost("reconstruct", 0), denoiser_flops=reconstruction["denoiser_flops"])
    return costs


def recording_cost(prompts: int, calls: int, rows: int, flops: int, wall_s: float, processes: int) -> Cost:
    """What recording trajectories cost, also when it was done for an earlier run: it belongs to the method.

    Args:
        prompts, calls: Trajectories, and the denoiser's calls in each.
        rows: Rows per prompt in each call.
        flops: FLOPs of one row.
        wall_s, processes: Seconds it took, and how many waited for it.
    """
    return Cost(0, 0, prompts * calls * rows * flops, wall_s * processes, wall_s)


def step_flops(student: int, teacher: int, jacobian: bool) -> float:
    """Denoiser FLOPs of training on a batch.

    Args:
        student, teacher: FLOPs of one call of each with the batch; teacher 0 if there is none.
        jacobian: Second-order matching: the student's input gradient and its backward pass, and the teacher's.
    """
    plain = (1 + BACKWARD) * student + teacher
    return plain + (BACKWARD * (1 + BACKWARD) * student + BACKWARD * teacher if jacobian else 0)


def fraction_used(limits: Mapping[str, float], before: Cost, now: Cost) -> float:
    """How much of what was left after pruning is spent, of the limit that is nearest, in [0, 1]."""

    def share(name: str, limit: float) -> float:
        already = float(getattr(before, name))
        return (getattr(now, name) - already) / max(limit - already, 1e-12)

    shares = [share(name, limit) for name, limit in limits.items()]
    return min(1.0, max(shares, default=0.0))


def exhausted(limits: Mapping[str, float], spent: Cost, next_step: Cost) -> bool:
    """Whether another step would exceed a limit."""
    after = spent + next_step
    return any(getattr(after, name) > limit * (1 + 1e-9) for name, limit in limits.items())
