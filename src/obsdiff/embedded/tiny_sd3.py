"""Genuine ``StableDiffusion3Pipeline`` objects of any small size, with vocabularies learned from a prompt list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TinySD3:
    """Sizes of a small SD3 pipeline.

    Attributes:
        blocks: Transformer blocks; the last one is context-free, as in SD3.
        heads: Attention heads.
        head_dim: Channels of a head; the width is heads * head_dim.
        dual_attention_layers: Blocks with a second, image-only attention (SD3.5-medium).
        qk_norm: Normalisation of queries and keys, "rms_norm" as SD3.5 or None as SD3.
        patch_size: Latent pixels per token side.
        image_size: Pixels per side; the latents have half.
        latent_channels: Channels of the latents.
        vae_channels: Channels at full and at half resolution.
        clip_width: Width of each of the two CLIP text encoders.
        t5_width: Width of the T5 encoder, at least twice ``clip_width``.
        text_length: Tokens of each text segment (CLIP and T5).
    """

    blocks: int = 6
    heads: int = 11
    head_dim: int = 8
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = "rms_norm"
    patch_size: int = 2
    image_size: int = 16
    latent_channels: int = 4
    vae_channels: tuple[int, int] = (16, 32)
    clip_width: int = 32
    t5_width: int = 64
    text_length: int = 12


def build_tiny_sd3(sizes: TinySD3, corpus: Sequence[str]) -> Any:
    """A ``StableDiffusion3Pipeline`` with random weights from torch's global generator, float32, on the CPU.

    Args:
        sizes: The widths and depths.
        corpus: Prompts from which the three vocabularies are learned; other words fall into letters.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    clip_tokenizer = _clip_tokenizer(corpus, sizes.text_length)
    t5_tokenizer = _t5_tokenizer(corpus, sizes.text_length)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=sizes.image_size // 2,
            patch_size=sizes.patch_size,
            in_channels=sizes.latent_channels,
            out_channels=sizes.latent_channels,
            num_layers=sizes.blocks,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.t5_width,
            caption_projection_dim=sizes.heads * sizes.head_dim,
            pooled_projection_dim=2 * sizes.clip_width,
            pos_embed_max_size=sizes.image_size // 2 // sizes.patch_size,
            dual_attention_layers=sizes.dual_attention_layers,
            qk_norm=sizes.qk_norm,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=sizes.vae_channels,
            layers_per_block=1,
            latent_channels=sizes.latent_channels,
            norm_num_groups=min(8, sizes.vae_channels[0]),
            sample_size=sizes.image_size,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=_clip_encoder(sizes, clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=_clip_encoder(sizes, clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=_t5_encoder(sizes, t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _words(corpus: Sequence[str]) -> list[str]:
    return sorted({word for text in corpus for word in text.lower().split()})


def _clip_tokenizer(corpus: Sequence[str], length: int) -> Any:
    """Byte-pair encoding whose merges spell the corpus's words from the left: the same for the same corpus, always."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    merges: list[tuple[str, str]] = []
    for word in _words(corpus):
        symbols = [*word[:-1], word[-1] + "</w>"]
        head = symbols[0]
        for symbol in symbols[1:]:
            merges.append((head, symbol))
            head += symbol
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _t5_tokenizer(corpus: Sequence[str], length: int) -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -3.0) for word in _words(corpus) if len(word) > 1]
    pieces += [(prefix + letter, -9.0) for prefix in ("▁", "") for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def _clip_encoder(sizes: TinySD3, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.clip_width,
            intermediate_size=2 * sizes.clip_width,
            projection_dim=sizes.clip_width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=sizes.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def _t5_encoder(sizes: TinySD3, tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.t5_width,
            d_kv=sizes.t5_width // 4,
            num_heads=4,
            d_ff=2 * sizes.t5_width,
            num_layers=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    ).eval()
