"""Genuine ``StableDiffusion3Pipeline`` objects of any small size, with vocabularies learned from a prompt list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
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
        image_size: Pixels per side.
        image_channels: 1 for gray, 3 for RGB.
        latent_channels: Channels of the latents.
        vae_channels: Channels at full resolution and at each halving of it: n of them make latents of
            ``image_size / 2 ** (n - 1)`` per side.
        quant_conv: Whether pointwise layers lie between encoder, latents and decoder; they can take up a whitening.
        clip_width: Width of each of the two CLIP text encoders.
        t5_width: Width of the T5 encoder, at least twice ``clip_width``.
        text_length: Tokens of the CLIP segment.
        t5_length: Tokens of the T5 segment; None as ``text_length``.
        learned_merges: Whether CLIP's merges are learned by frequency; those that only spell the words one after the
            other fail where there are hundreds of words.
    """

    blocks: int = 6
    heads: int = 11
    head_dim: int = 8
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = "rms_norm"
    patch_size: int = 2
    image_size: int = 16
    image_channels: int = 1
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (16, 32)
    quant_conv: bool = False
    clip_width: int = 32
    t5_width: int = 64
    text_length: int = 12
    t5_length: int | None = None
    learned_merges: bool = False

    @property
    def latent_size(self) -> int:
        """Latent pixels per side."""
        return self.image_size // 2 ** (len(self.vae_channels) - 1)


def build_tiny_sd3(sizes: TinySD3, corpus: Sequence[str]) -> Any:
    """A ``StableDiffusion3Pipeline`` with random weights from torch's global generator, float32, on the CPU.

    Args:
        sizes: The widths and depths.
        corpus: Prompts from which the three vocabularies are learned; other words fall into letters.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    clip_tokenizer = _clip_tokenizer(corpus, sizes.text_length, sizes.learned_merges)
    t5_tokenizer = _t5_tokenizer(corpus, sizes.t5_length or sizes.text_length)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=sizes.latent_size,
            patch_size=sizes.patch_size,
            in_channels=sizes.latent_channels,
            out_channels=sizes.latent_channels,
            num_layers=sizes.blocks,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.t5_width,
            caption_projection_dim=sizes.heads * sizes.head_dim,
            pooled_projection_dim=2 * sizes.clip_width,
            pos_embed_max_size=sizes.latent_size // sizes.patch_size,
            dual_attention_layers=sizes.dual_attention_layers,
            qk_norm=sizes.qk_norm,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_autoencoder(sizes),
        text_encoder=_clip_encoder(sizes, clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=_clip_encoder(sizes, clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=_t5_encoder(sizes, t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )


def build_autoencoder(sizes: TinySD3) -> Any:
    """The ``AutoencoderKL`` of such a pipeline, with random weights from torch's global generator, float32."""
    from diffusers import AutoencoderKL

    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        in_channels=sizes.image_channels,
        out_channels=sizes.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=min(8, sizes.vae_channels[0]),
        sample_size=sizes.image_size,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=sizes.quant_conv,
        use_post_quant_conv=sizes.quant_conv,
    )


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _letters(corpus: Sequence[str]) -> str:
    """The alphabet: a to z, and the figures that the corpus has."""
    return LETTERS + "".join(sorted({sign for text in corpus for sign in text if sign in "0123456789"}))


def _words(corpus: Sequence[str]) -> list[str]:
    return sorted({word for text in corpus for word in text.lower().split()})


def _clip_tokenizer(corpus: Sequence[str], length: int, learned: bool) -> Any:
    """Byte-pair encoding that gives each word of the corpus one token: the same for the same corpus, always."""
    from transformers import CLIPTokenizer

    letters = _letters(corpus)
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges = _learned_merges(tuple(_words(corpus))) if learned else _spelling_merges(_words(corpus))
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _spelling_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that spell each word from the left; those of many words cross each other."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        head = symbols[0]
        for symbol in symbols[1:]:
            merges.append((head, symbol))
            head += symbol
    return list(dict.fromkeys(merges))


@cache
def _learned_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges by frequency (Sennrich et al. 2016, arXiv:1508.07909), until every word is one token.

    Pairs of the same frequency go by the alphabet; the trainer of ``tokenizers`` takes them as its hashes fall, which
    gives other tokens in every process.
    """
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    counts = Counter(pair for symbols in spelt for pair in pairwise(symbols))
    merges: list[tuple[str, str]] = []
    while counts:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for symbols in spelt:
            if best[0] not in symbols or best not in pairwise(symbols):
                continue
            counts.subtract(pairwise(symbols))
            symbols[:] = _merged(symbols, best)
            counts.update(pairwise(symbols))
        counts = +counts
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of ``pair``, from the left, as one."""
    found: list[str] = []
    for symbol in symbols:
        if found and (found[-1], symbol) == pair:
            found[-1] += symbol
        else:
            found.append(symbol)
    return found


def _t5_tokenizer(corpus: Sequence[str], length: int) -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -3.0) for word in _words(corpus) if len(word) > 1]
    pieces += [(prefix + letter, -9.0) for prefix in ("▁", "") for letter in _letters(corpus)]
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
