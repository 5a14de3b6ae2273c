"""Stable Diffusion 3 and 3.5: two streams, joint attention; padding is attended and not masked (families.md 3.3)."""

from obsdiff.models.families.base import TEXT, Family, TextSegment

SD3 = Family(
    denoiser="SD3Transformer2DModel",
    title="Stable Diffusion 3, 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    modulated=True,
    notes=("SD3.5-medium's second attention has heads of its own. In the last block the text's queries reach nothing."),
    encoded=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    conditions=(("encoder_hidden_states", "prompt_embeds"), ("pooled_projections", "pooled_prompt_embeds")),
    text=(
        TextSegment(("tokenizer", "tokenizer_2")),
        TextSegment(("tokenizer_3",), length_argument="max_sequence_length", default_length=256),
    ),
    numbered=("dual_attention_layers",),
    tokens=(
        ("*.norm1_context.*", (TEXT,)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.ff_context.*", (TEXT,)),
    ),
)
