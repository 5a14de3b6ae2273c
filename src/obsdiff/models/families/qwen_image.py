"""Qwen-Image: two streams; padding is masked, and its mask is None where nothing is padded."""

from obsdiff.models.families.base import TEXT, Family

QWEN_IMAGE = Family(
    denoiser="QwenImageTransformer2DModel",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    notes="In the last block the text's queries, output and feed-forward network reach nothing.",
    time_scale=1 / 1000,
    guidance="calls",
    mask="encoder_hidden_states_mask",
    tokens=(("*.attn.add_?_proj", (TEXT,)), ("*.attn.to_add_out", (TEXT,)), ("*.txt_mlp.*", (TEXT,))),
)
