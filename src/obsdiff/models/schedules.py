"""Training noise that follows the pipeline's own sampler."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from obsdiff.diffusion.noising import FlowNoising, Noising, flow_noising, noising_of, shifts_plainly
from obsdiff.errors import UserError
from obsdiff.models.info import call_arguments
from obsdiff.models.latents import patch_of

POSITIONS = 1000  # at which a sampler is asked for its noise levels


def noising_of_pipeline(pipe: Any, size: tuple[int, int]) -> Noising:
    """The noise process of the pipeline's own scheduler: noise levels are drawn as in training and then go through what
    the sampler does to them (dynamic shift, terminal, Karras, exponential or beta levels).

    Args:
        pipe: The pipeline.
        size: Height and width of the latents, on which a dynamic shift depends.

    Raises:
        UserError: It is a scheduler that training cannot follow.
    """
    scheduler = pipe.scheduler
    try:
        alphas, config = getattr(scheduler, "alphas_cumprod", None), scheduler.config
        if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
            if config.get("use_dynamic_shifting"):
                raise ValueError("its shift depends on the size")
            return FlowNoising(float(config.get("flow_shift") or 1.0))  # Sana's and Wan's multistep samplers
        if alphas is not None or (_is_flow(scheduler) and shifts_plainly(scheduler.config)):
            return noising_of(scheduler.config, alphas)
        if not _is_flow(scheduler):
            raise ValueError("it neither matches flows nor diffuses in discrete steps")
        asked = copy.deepcopy(scheduler)
        asked.set_timesteps(POSITIONS, **shift_of_size(pipe, size))
        # what the sampler starts from; all it does then depends on the position between these two ends alone
        levels = torch.linspace(float(scheduler.sigma_max), float(scheduler.sigma_min), POSITIONS)
        return flow_noising(levels, asked.sigmas[:POSITIONS])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"cannot train on images with {type(scheduler).__name__}: {error}; distil on recorded trajectories instead"
        ) from error


def _is_flow(scheduler: Any) -> bool:
    if scheduler.config.get("invert_sigmas"):
        raise ValueError("invert_sigmas turns time around")
    if (steps := int(scheduler.config.get("num_train_timesteps", POSITIONS))) != POSITIONS:
        raise ValueError(f"it counts time to {steps}, training to {POSITIONS}")
    return type(scheduler).__name__.startswith("FlowMatch")


def shift_of_size(pipe: Any, size: tuple[int, int]) -> dict[str, float]:
    """``mu`` as the pipeline itself computes it for latents of ``size``; nothing without a dynamic shift.

    Raises:
        ValueError: The pipeline knows no dynamic shift.
    """
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    modules = [sys.modules[kind.__module__] for kind in type(pipe).__mro__]
    shift = next((module.calculate_shift for module in modules if hasattr(module, "calculate_shift")), None)
    tokens = (size[0] // patch_of(pipe)) * (size[1] // patch_of(pipe))
    fitted = next((module.compute_empirical_mu for module in modules if hasattr(module, "compute_empirical_mu")), None)
    if fitted is not None:  # Flux.2
        return {"mu": float(fitted(tokens, call_arguments(pipe)["num_inference_steps"]))}
    if shift is None:
        raise ValueError(f"{type(pipe).__name__} knows no dynamic shift")
    given = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
    return {"mu": float(shift(tokens, *(config.get(name, default) for name, default in given.items())))}
