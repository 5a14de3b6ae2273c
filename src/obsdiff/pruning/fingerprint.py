"""What a calibration depends on, by content: stores of it are keyed by this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.content import DECODING, TEXT, component_hashes, model_hash, tensor_bytes
from obsdiff.models.subject import Subject
from obsdiff.obs.timesteps import ALPHA_MAX, ALPHA_MIN, WEIGHTINGS


@dataclass(frozen=True)
class Settings:
    """Everything about a calibration that its numbers depend on, besides model and prompts.

    Attributes:
        call: The pipeline's call arguments (steps, guidance, size).
        seed: Noise seed; each prompt draws from a seed of its own.
        weighting: Timestep weights, see :mod:`obsdiff.obs.timesteps`.
        tokens: Tokens of each sequence to use at each call, drawn at random; None uses all.
        batch_size: Prompts per pipeline call; changes nothing but speed and memory, and what int8 rounds away.
    """

    call: Mapping[str, Any]
    seed: int = 0
    weighting: str = "log_decrease"
    tokens: int | None = None
    batch_size: int = 4


def fingerprint_of(subject: Subject, prompts: Sequence[str] | Conditioning, settings: Settings) -> dict[str, Any]:
    """What the statistics depend on; equal fingerprints mean equal numbers up to rounding."""
    pipe, denoiser = subject.pipe, subject.denoiser
    if getattr(pipe, "scheduler", None) is None:
        raise UserError(f"this {type(pipe).__name__} has no scheduler, so it cannot be run; give it one")
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    size = ("height", "width", "max_sequence_length")
    named = {"num_inference_steps", "guidance_scale", *size}
    return {
        "model": model_hash(denoiser),
        "components": component_hashes(pipe, (*DECODING, "scheduler", *(TEXT if encoded(prompts) else ()))),
        "prompts": prompts_hash(prompts),
        "num_prompts": len(prompts),
        "sampler": [
            type(pipe.scheduler).__name__,
            hashlib.sha256(json.dumps(scheduler, sort_keys=True, default=str).encode()).hexdigest(),
        ],
        "steps": settings.call.get("num_inference_steps"),
        "guidance_scale": settings.call.get("guidance_scale"),
        "size": [settings.call.get(key) for key in size],
        "call": {key: value for key, value in settings.call.items() if key not in named},
        "seed": settings.seed,
        "weighting": settings.weighting,
        "alpha": [ALPHA_MIN, ALPHA_MAX] if settings.weighting in WEIGHTINGS else None,  # else the text says all
        "tokens": settings.tokens,
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
    }


def encoded(prompts: Sequence[str] | Conditioning) -> bool:
    """Whether the text encoders have done their part."""
    return isinstance(prompts, Conditioning)


def prompts_hash(prompts: Sequence[str] | Conditioning) -> str:
    """SHA-256 of prompts, or of what they were encoded to and of the masks of padding."""
    if not isinstance(prompts, Conditioning):
        return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    digest = hashlib.sha256()
    masks = {"text_mask": prompts.text_mask, "negative_text_mask": prompts.negative_text_mask}
    for name, value in (*sorted(prompts.embeds.items()), *masks.items()):
        _add(digest, name, value)
    if not prompts.embeds:
        _add(digest, "count", len(prompts))
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    """One call argument: a tensor, a list of them, an image, or anything that says what it is."""
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _add(digest, f"{name}.{i}", inner)
    elif hasattr(value, "tobytes"):
        digest.update(f"{name} {type(value).__name__} {value.size}\n".encode())
        digest.update(value.tobytes())
    elif value is not None:
        digest.update(f"{name} {value!r}\n".encode())


def conditioning_hash(pipe: Any, prompts: Sequence[str] | Conditioning) -> str:
    """SHA-256 of what the denoiser is told: prompts together with the pipeline's tokenizers and text encoders."""
    if encoded(prompts):
        return prompts_hash(prompts)
    others = tuple(name for name in pipe.components if not any(fnmatchcase(name, rule) for rule in TEXT))
    return hashlib.sha256(json.dumps([prompts_hash(prompts), component_hashes(pipe, others)]).encode()).hexdigest()
