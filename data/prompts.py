"""Prompt sets: embedded ones by name, caption files, Hugging Face datasets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from obsdiff.data.captionfiles import KINDS, read_captions
from obsdiff.data.captions import MAX_LENGTH, captions_in, check_text, choose_column
from obsdiff.embedded import digits, emoji
from obsdiff.errors import UserError
from obsdiff.numbers import check_seed, check_whole

EMBEDDED: dict[str, Callable[[], list[str]]] = {
    "digits-train": lambda: digits.digit_prompts(digits.TRAIN_WORDINGS),
    "digits-heldout": lambda: digits.digit_prompts(digits.HELD_OUT_WORDINGS),
    "emoji-train": lambda: emoji.emoji_prompts(emoji.TRAIN_WORDINGS),
    "emoji-heldout": lambda: emoji.emoji_prompts(emoji.HELD_OUT_WORDINGS),
}


def load_prompts(source: str, column: str | None = None, num: int | None = None, seed: int = 0) -> list[str]:
    """The prompts called ``source``, without leading and trailing space; empty ones are left out.

    Args:
        source: "digits-train", "digits-heldout", "emoji-train", "emoji-heldout"; a file (.txt: one a line; .csv, .tsv,
            .jsonl, .parquet: a column); or a Hugging Face dataset "owner/name" or "owner/name:split" (default split:
            train). A cell with a list of captions gives as many prompts. Files are text (UTF-8, or what their byte
            order mark says): "NA", "null" and numbers are captions like others.
        column: The caption column; None takes the first of caption, prompt, text that is there.
        num: How many; drawn without replacement (and again from the start if there are fewer). None: all, in order.
        seed: Of the draw.

    Raises:
        UserError: Nothing is called so, the column is missing or holds no text, more than 5 % of the lines do not
            parse, or there are no prompts.
    """
    if not isinstance(source, str):
        raise UserError(f"a prompt set is named by a text, not by a {type(source).__name__}; give a file or a name")
    if num is not None:
        check_whole("the number of prompts", num)
    check_seed("the seed of the prompts", seed)
    cells, is_table = _read(source, column)
    prompts = [text.strip() for cell in cells for text in captions_in(cell)]
    if not prompts:
        raise UserError(f"{source} holds no prompts; give at least one non-empty line")
    left_out = sum(not captions_in(cell) for cell in cells if is_table or cell.strip())
    if left_out:
        warnings.warn(
            f"{left_out} of {len(cells)} rows of {source} hold no caption of 1 to {MAX_LENGTH:,} characters; they are "
            "left out",
            stacklevel=2,
        )
    return prompts if num is None else _draw(prompts, num, seed)


def _draw(prompts: Sequence[str], num: int, seed: int) -> list[str]:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[order[i % len(order)]] for i in range(num)]


def _read(source: str, column: str | None) -> tuple[list[Any], bool]:
    """The cells, and whether they are rows of a table (where an empty one is worth a word)."""
    if source in EMBEDDED:
        return list(EMBEDDED[source]()), False
    path = Path(source)
    kind = path.suffix.lower()
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as error:
        raise UserError(f"cannot read prompts from {source[:60]}...: {error.strerror or error}") from None
    if is_file:
        return read_captions(path, column), kind not in ("", ".txt")
    if not exists and source.count("/") == 1 and not kind and not source.startswith((".", "/", "~")):
        return _read_dataset(source, column), True
    if exists and source:
        raise UserError(f"cannot read prompts from {source}: it is a folder or a device; give a file in it")
    raise UserError(
        f"prompts {source!r} not found; give a file ({', '.join(KINDS[1:])}), a dataset (owner/name) "
        f"or one of {', '.join(EMBEDDED)}"
    )


def _read_dataset(source: str, column: str | None) -> list[Any]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        table = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets and the hub client raise many kinds
        raise UserError(f"cannot load dataset {source}: {' '.join(str(error).split())[:200]}") from error
    chosen = choose_column(list(table.column_names), column, source)
    check_text(table.features.arrow_schema.field(chosen).type, chosen, source)
    return list(table[chosen])
