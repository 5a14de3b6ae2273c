"""Prompts encoded once, with a mask of the tokens that are not padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.families import Family, find_family
from obsdiff.models.info import info_of
from obsdiff.models.modes import eval_mode

ENCODE_BATCH = 32


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each prompt; one row per prompt throughout, on the CPU.

    Attributes:
        embeds: The pipeline's call arguments that replace the prompts (or hold them): tensors whose first dimension is
            prompts, or lists with one entry each; anything else goes to all of them.
        text_mask: Bool (prompts, text tokens), True = a real token; None if padding is unknown.
        negative_text_mask: The same for the negative prompt (bool (text tokens,)).
        count: Prompts, where ``embeds`` is empty: images of a pipeline that is told nothing.
    """

    embeds: dict[str, Any]
    text_mask: Tensor | None = None
    negative_text_mask: Tensor | None = None
    count: int | None = None

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
        rows = (len(value) for value in self.embeds.values() if _by_row(value))
        return next(rows, int(self.count or 0))

    def __getitem__(self, part: slice) -> Conditioning:
        """Some of the prompts."""
        return self._of(itemgetter(part), len(range(*part.indices(len(self)))))

    def rows(self, numbers: list[int]) -> Conditioning:
        """The prompts of these numbers."""
        return self._of(lambda v: v[numbers] if isinstance(v, Tensor) else [v[n] for n in numbers], len(numbers))

    def _of(self, rows: Callable[[Any], Any], count: int) -> Conditioning:
        return Conditioning(
            {name: rows(value) if _by_row(value) else value for name, value in self.embeds.items()},
            None if self.text_mask is None else rows(self.text_mask),
            self.negative_text_mask,
            count,
        )

    def arguments(self, device: Any) -> dict[str, Any]:
        """The pipeline's call arguments for all prompts, tensors on ``device``."""
        return {name: _on(value, device) for name, value in self.embeds.items()} or {"batch_size": len(self)}


def _by_row(value: Any) -> bool:
    return isinstance(value, Tensor | list)


def _on(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on(inner, device) for inner in value] if isinstance(value, list) else value


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


def told_nothing(pipe: Any, prompts: str | None = None) -> bool:
    """Whether a pipeline draws without being told what.

    Args:
        pipe: The pipeline.
        prompts: A prompt set that was named for it.

    Raises:
        UserError: It draws without prompts, and one was named.
    """
    if find_family(*denoisers_of(pipe).values()).input != "nothing":
        return False
    if prompts is not None:
        raise UserError(f"this {type(pipe).__name__} draws without prompts; leave {prompts} out")
    return True


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> Conditioning:
    """What the pipeline makes of ``prompts`` before it denoises (negative prompt "", as when a user gives none).

    Where the family's row says what ``encode_prompt`` returns, the text encoders run once over all prompts; otherwise
    the prompts go to the pipeline as they are, batch by batch, and :mod:`obsdiff.models.texts` remembers what they
    become.

    Args:
        pipe: The pipeline.
        prompts: The prompts; numbers or names of classes for a pipeline that takes classes. A pipeline that is told
            nothing draws as many images.
        call: The pipeline's call arguments, for the sequence length.
    """
    check_prompts(prompts)
    family = find_family(*denoisers_of(pipe).values())
    if family.input != "prompt":
        return asked_for(pipe, prompts)
    tokenizers = [name for segment in family.text for name in segment.tokenizers]
    if tokenizers and all(getattr(pipe, name, None) is None for name in tokenizers):
        raise UserError(
            f"this {type(pipe).__name__} has none of its tokenizers ({', '.join(tokenizers)}), so prompts cannot be "
            "encoded; keep them, or give the embeds as a Conditioning"
        )
    embeds = _encoded(pipe, family, prompts, call) if family.encoded else asked_for(pipe, prompts).embeds
    if not family.text:
        return Conditioning(embeds)
    return Conditioning(embeds, token_mask(pipe, family, prompts, call), token_mask(pipe, family, [""], call)[0])


def asked_for(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """``prompts`` as a user of the pipeline gives them: texts, classes by number or name, or only how many there are.

    Raises:
        UserError: There is no such class, or the pipeline takes no prompts.
    """
    kind = find_family(*denoisers_of(pipe).values()).input
    if kind == "class_labels":
        return Conditioning({"class_labels": [_class_label(pipe, prompt) for prompt in prompts]})
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "image" in accepted and accepted["image"].default is inspect.Parameter.empty:
        raise UserError(
            f"a {type(pipe).__name__} is told an image beside each prompt; give it with the embeds as a Conditioning"
        )
    if kind == "prompt" and "prompt" in accepted:
        return Conditioning({"prompt": list(prompts)})
    if any(prompts):
        raise UserError(f"{info_of(pipe).source} draws without prompts; leave {next(filter(None, prompts))!r} out")
    return Conditioning({}, count=len(prompts))


def _encoded(pipe: Any, family: Family, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the text encoders give, by the pipeline's call argument."""
    accepted = inspect.signature(pipe.encode_prompt).parameters
    extra: dict[str, Any] = {key: value for key, value in call.items() if key in accepted}
    extra |= {key: None for key in ("prompt_2", "prompt_3") if key in accepted}
    parts: list[tuple[Tensor, ...]] = []
    with eval_mode(pipe):
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            encoded = pipe.encode_prompt(prompt=batch, do_classifier_free_guidance=True, **extra)
            parts.append(tuple(tensor.cpu() for tensor in encoded))
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(family.encoded)}


def _class_label(pipe: Any, prompt: str) -> int:
    """The number of a class that is given by number or name."""
    names: Any = getattr(pipe, "labels", None) or {}
    if prompt in names:
        return int(names[prompt])
    try:
        return int(prompt)
    except ValueError:
        raise UserError(
            f"{prompt!r} is no class of this {type(pipe).__name__}; its prompts are class numbers"
            + (f" or names such as {next(iter(names))!r}" if names else "")
        ) from None


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
