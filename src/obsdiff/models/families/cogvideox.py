"""CogVideoX: all layers read [text, video]; padding is attended."""

from typing import Any

from obsdiff.models.families.base import IMAGE, TEXT, Family, TextSegment


def packed(pipe: Any, latents: Any) -> Any:
    """Latents (n, c, frames, h, w) with the frames first."""
    return latents.transpose(1, 2)


COGVIDEOX = Family(
    denoiser="CogVideoXTransformer3DModel",
    packed=packed,
    title="CogVideoX",
    video=True,
    pipelines=("CogVideoXPipeline",),
    modulated=True,
    notes="Text and video share all weights.",
    text=(TextSegment(("tokenizer",), length_argument="max_sequence_length", default_length=226),),
    tokens=(("*", (TEXT, IMAGE)),),
)
