"""Prompts encoded once, with a mask of the tokens that are not padding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.families import Family, find_family
from obsdiff.models.modes import eval_mode
from obsdiff.models.wiring import denoiser_of

ENCODE_BATCH = 32


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each prompt; first dimension = prompts throughout, on the CPU.

    Attributes:
        embeds: The pipeline's call arguments that replace the prompts.
        text_mask: Bool (prompts, text tokens), True = a real token; None if padding is unknown.
        negative_text_mask: The same for the negative prompt (bool (text tokens,)).
    """

    embeds: dict[str, Tensor]
    text_mask: Tensor | None = None
    negative_text_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse masks that do not fit the embeds.

        Raises:
            UserError: They do not.
        """
        text, negative = self.text_mask, self.negative_text_mask
        if (text is None) is not (negative is None):
            raise UserError("prompts are masked without their negative prompt, or it alone; give both masks or none")
        if text is None or negative is None:
            return
        embeds = self.embeds.get("prompt_embeds")
        there = text.shape if embeds is None else embeds.shape[:2]
        if text.dtype != torch.bool or text.shape != there or negative.shape != there[1:]:
            raise UserError(
                f"the text encoders give {there[0]} prompts of {there[1]} tokens, the mask of padding is for "
                f"{' x '.join(map(str, text.shape))} and the negative one for {' x '.join(map(str, negative.shape))} "
                "(bool is needed); set max_sequence_length to what the text encoders give, or leave the masks out"
            )

    def __len__(self) -> int:
        return len(next(iter(self.embeds.values())))


def check_prompts(prompts: Sequence[str] | Conditioning) -> None:
    """Refuse what is no non-empty list of prompts.

    Raises:
        UserError: Saying what it is.
    """
    if isinstance(prompts, Conditioning):
        return
    if isinstance(prompts, str | bytes):
        raise UserError(
            f"prompts are one string, {str(prompts)[:40]!r}; give a list of them, such as [{prompts!r:.44}]"
        )
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts are a {type(prompts).__name__}; give a list of strings")
    if len(prompts) == 0:
        raise UserError("no calibration prompts; give at least one")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {i} is {str(prompt)[:40]!r}, a {type(prompt).__name__}; prompts are strings")


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> Conditioning:
    """Run the text encoders once over ``prompts`` (negative prompt "", as when a user gives none).

    Args:
        pipe: The pipeline.
        prompts: The prompts.
        call: The pipeline's call arguments, for the sequence length.
    """
    check_prompts(prompts)
    family = find_family(denoiser_of(pipe))
    tokenizers = [name for segment in family.text for name in segment.tokenizers]
    if all(getattr(pipe, name, None) is None for name in tokenizers):
        raise UserError(
            f"this {type(pipe).__name__} has none of its tokenizers ({', '.join(tokenizers)}), so prompts cannot be "
            "encoded; keep them, or give the embeds as a Conditioning"
        )
    accepted = inspect.signature(pipe.encode_prompt).parameters
    extra = {key: value for key, value in call.items() if key in accepted}
    extra |= {key: None for key in ("prompt_2", "prompt_3") if key in accepted}
    parts: list[tuple[Tensor, ...]] = []
    with eval_mode(pipe):
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            encoded = pipe.encode_prompt(prompt=batch, do_classifier_free_guidance=True, **extra)
            parts.append(tuple(tensor.cpu() for tensor in encoded))
    embeds = {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(family.embeds)}
    if not family.text:
        return Conditioning(embeds)
    return Conditioning(embeds, token_mask(pipe, family, prompts, call), token_mask(pipe, family, [""], call)[0])


def segment_lengths(pipe: Any, family: Family, call: Mapping[str, Any]) -> list[int]:
    """Tokens of each text segment in the denoiser's prompt sequence."""
    lengths = []
    for segment in family.text:
        tokenizer = getattr(pipe, segment.tokenizers[0], None)
        if segment.length_argument is not None:
            lengths.append(int(call.get(segment.length_argument, segment.default_length)))
        else:
            lengths.append(segment.default_length if tokenizer is None else int(tokenizer.model_max_length))
    return lengths


def token_mask(pipe: Any, family: Family, prompts: Sequence[str], call: Mapping[str, Any]) -> Tensor:
    """Bool (prompts, text tokens): which positions hold a real token for any of their tokenizers.

    The tokens of a segment whose text encoders are all absent are zeros: padding, all of them. Where an encoder is
    there and its tokenizer is not, nothing is known of padding: all tokens of that segment count.
    """
    masks = []
    for segment, length in zip(family.text, segment_lengths(pipe, family, call), strict=True):
        found = torch.zeros(len(prompts), length, dtype=torch.bool)
        for name in segment.tokenizers:
            if getattr(pipe, name.replace("tokenizer", "text_encoder"), None) is None:
                continue
            tokenizer = getattr(pipe, name, None)
            if tokenizer is None:
                found[:] = True
                continue
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            found |= tokens.attention_mask.bool()
        masks.append(found)
    return torch.cat(masks, dim=1)
