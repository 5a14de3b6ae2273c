"""What a recovery spends before it trains: pruning, and recording what it trains on."""

from __future__ import annotations

from obsdiff.allocation.planning import packages_for
from obsdiff.allocation.stage import measures
from obsdiff.costs import Cost, calibration_cost, recording_cost
from obsdiff.evaluation.flops import FlopCounts, denoiser_flops
from obsdiff.models.calling import WHICH
from obsdiff.models.info import call_arguments
from obsdiff.models.rows import NEGATIVE
from obsdiff.models.subject import Subject
from obsdiff.pruning.options import PruningOptions
from obsdiff.pruning.record import Trajectories
from obsdiff.ranks import world_size
from obsdiff.training.stage import Start


def costs_before(start: Start, flops: int, recording: Trajectories | None) -> dict[str, Cost]:
    """By stage, what was spent when training begins.

    Args:
        start: The pruned pipeline, with the dense one.
        flops: FLOPs of one dense denoiser call with one image, as in the calibration.
        recording: What is trained on, if that was recorded.
    """
    costs = calibration_cost(start.manifest, flops, world_size())
    if recording is None:
        return costs
    assert start.teacher is not None  # there while fitting
    return costs | {"recording": _recorded(start.teacher, recording)}


def expected_costs(dense: Subject, options: PruningOptions | None, recording: Trajectories | None) -> dict[str, Cost]:
    """The least that will be spent when training begins, as far as it is known before pruning: calls, not seconds."""
    costs = {}
    if options is not None and measures(options, None):
        settings = options.calibration
        call = call_arguments(dense.pipe, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
        request = {
            "num_prompts": settings.num_prompts,
            "steps": call.get("num_inference_steps"),
            "guidance_scale": call.get("guidance_scale"),
        }
        flops = denoiser_flops(dense, call_arguments(dense.pipe))
        passes = {"packages": packages_for(options, None), "streamed": settings.streamed}
        costs = calibration_cost({**passes, "statistics": request}, flops, world_size())
    return costs | ({} if recording is None else {"recording": _recorded(dense, recording)})


def _recorded(dense: Subject, recording: Trajectories) -> Cost:
    latents = recording.latents
    embeds = {name: t[:1] for name, t in recording.embeds.items() if not name.startswith(NEGATIVE)}
    if recording.denoisers is not None:
        embeds[WHICH] = recording.denoisers[:1]
    flops = FlopCounts(dense.denoiser)(latents[:1, 0], embeds, recording.common)
    count, calls = latents.shape[:2]
    return recording_cost(count, calls, recording.rows, flops, recording.time_s, recording.processes)
