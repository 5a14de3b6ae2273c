"""Qwen-Image: two streams; padding is masked, and its mask is None where nothing is padded."""

from typing import Any

from obsdiff.models.families.base import TEXT, Family


def packed(pipe: Any, latents: Any) -> Any:
    """Latents of one frame (n, c, 1, h, w) as tokens of 2 x 2, (n, h / 2 · w / 2, 4 c)."""
    image = latents.squeeze(2)
    return pipe._pack_latents(image, *image.shape)


QWEN_IMAGE = Family(
    denoiser="QwenImageTransformer2DModel",
    title="Qwen-Image",
    video=True,
    pipelines=("QwenImagePipeline",),
    modulated=True,
    notes="In the last block the text's queries, output and feed-forward network reach nothing.",
    time_scale=1 / 1000,
    packed=packed,
    guidance="calls",
    mask="encoder_hidden_states_mask",
    tokens=(
        ("*.txt_mod.*", (TEXT,)),
        ("*.attn.add_?_proj", (TEXT,)),
        ("*.attn.to_add_out", (TEXT,)),
        ("*.txt_mlp.*", (TEXT,)),
    ),
)
