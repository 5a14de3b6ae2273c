"""CogVideoX: all layers read [text, video]; padding is attended."""

from obsdiff.models.families.base import IMAGE, TEXT, Family, TextSegment

COGVIDEOX = Family(
    denoiser="CogVideoXTransformer3DModel",
    title="CogVideoX",
    pipelines=("CogVideoXPipeline",),
    notes="Text and video share all weights.",
    text=(TextSegment(("tokenizer",), length_argument="max_sequence_length", default_length=226),),
    tokens=(("*", (TEXT, IMAGE)),),
)
