"""Prompt sets: embedded ones by name, text, CSV, TSV or parquet files, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from obsdiff.errors import UserError
from obsdiff.evaluation.digits import HELD_OUT_WORDINGS, TRAIN_WORDINGS, digit_prompts

EMBEDDED = {"digits-train": TRAIN_WORDINGS, "digits-heldout": HELD_OUT_WORDINGS}
CAPTION_COLUMNS = ("caption", "prompt", "text", "TEXT")


def load_prompts(source: str, column: str | None = None, num: int | None = None, seed: int = 0) -> list[str]:
    """The prompts called ``source``, empty ones left out.

    Args:
        source: "digits-train", "digits-heldout"; a file (.txt: one a line; .csv, .tsv, .parquet: a column); or a
            Hugging Face dataset "owner/name" or "owner/name:split" (default split: train).
        column: The caption column; None takes the first of caption, prompt, text that is there.
        num: How many; drawn without replacement (and again from the start if there are fewer). None: all, in order.
        seed: Of the draw.

    Raises:
        UserError: Nothing is called so, the column is missing, or there are no prompts.
    """
    prompts = [text.strip() for text in _read(source, column) if isinstance(text, str) and text.strip()]
    if not prompts:
        raise UserError(f"{source} holds no prompts; give at least one non-empty line")
    return prompts if num is None else _draw(prompts, num, seed)


def _draw(prompts: Sequence[str], num: int, seed: int) -> list[str]:
    if num < 1:
        raise UserError(f"asked for {num} prompts; it must be at least 1")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[order[i % len(order)]] for i in range(num)]


def _read(source: str, column: str | None) -> list[Any]:
    if source in EMBEDDED:
        return list(digit_prompts(EMBEDDED[source]))
    path = Path(source)
    kind = path.suffix.lower()
    if path.is_file() and kind in ("", ".txt"):
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not a UTF-8 text file: {error}") from None
    if path.is_file() and kind in (".csv", ".tsv", ".parquet"):
        return _column(_read_table(path, kind), column, source)
    if not path.exists() and source.count("/") == 1 and not kind and not source.startswith((".", "/", "~")):
        return _column(_read_dataset(source), column, source)
    if path.is_file():
        raise UserError(f"cannot read prompts from {source}: use .txt, .csv, .tsv or .parquet")
    raise UserError(
        f"prompts {source!r} not found; give a file (.txt, .csv, .tsv, .parquet), a dataset (owner/name) "
        f"or one of {', '.join(EMBEDDED)}"
    )


def _read_table(path: Path, kind: str) -> Any:
    import pandas

    try:
        if kind == ".parquet":
            return pandas.read_parquet(path)
        return pandas.read_csv(path, sep="\t" if kind == ".tsv" else ",")
    except Exception as error:  # pandas and pyarrow raise many kinds for damaged files
        raise UserError(f"cannot read prompts from {path}: {' '.join(str(error).split())[:200]}") from error


def _read_dataset(source: str) -> Any:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        return load_dataset(name, split=split or "train").to_pandas()
    except Exception as error:  # datasets and the hub client raise many kinds
        raise UserError(f"cannot load dataset {source}: {' '.join(str(error).split())[:200]}") from error


def _column(table: Any, column: str | None, source: str) -> list[Any]:
    columns = [str(name) for name in table.columns]
    chosen = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        raise UserError(f"{source} has no column {chosen or 'caption'!r}; its columns are {', '.join(columns)}")
    return list(table[chosen])
