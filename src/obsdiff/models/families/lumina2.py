"""Lumina 2: grouped queries; time runs backwards and the pipeline negates the output.

Its layers read packed sequences (real text, then image, then filler), so padding is masked in the text refiner alone.
"""

from obsdiff.models.families.base import TEXT, Family

LUMINA2 = Family(
    denoiser="Lumina2Transformer2DModel",
    title="Lumina 2",
    pipelines=("Lumina2Pipeline",),
    modulated=True,
    notes="A unit of heads is one head of keys and values with all query heads that read it.",
    time_scale=-1 / 1000,
    time_offset=1.0,
    sign=-1,
    guidance="calls",
    mask="encoder_attention_mask",
    tokens=(("context_refiner.*", (TEXT,)),),
)
