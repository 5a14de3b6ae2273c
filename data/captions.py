"""What counts as a caption."""

from __future__ import annotations

from typing import Any

from obsdiff.errors import UserError

CAPTION_COLUMNS = ("caption", "prompt", "text", "TEXT")
MAX_LENGTH = 100_000  # characters; no caption is that long, but a file read with the wrong format gives such


def captions_in(value: Any) -> list[str]:
    """The captions that a cell holds: one for a text, one for each text of a list, none for anything else.

    Null, blank texts, texts over ``MAX_LENGTH`` characters and those that no tokenizer takes (a NUL, half a surrogate
    pair) are none.
    """
    if isinstance(value, str):
        return [value] if _usable(value) else []
    if isinstance(value, list | tuple):
        return [text for text in value if isinstance(text, str) and _usable(text)]
    return []


def _usable(text: str) -> bool:
    if not text.strip() or len(text) > MAX_LENGTH or "\0" in text:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def choose_column(columns: list[str], column: str | None, what: str) -> str:
    """The caption column: ``column``, or the first of the usual names that is there.

    Args:
        columns: Those of the table.
        column: What was asked for, or None.
        what: The table's name in errors.

    Raises:
        UserError: It is not there, or there twice.
    """
    chosen = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        names = ", ".join(columns)
        shown = names if len(names) <= 300 else names[:300] + " ..."
        raise UserError(f"{what} has no column {chosen or 'caption'!r}; its columns are {shown}")
    if columns.count(chosen) > 1:
        raise UserError(f"{what} has {columns.count(chosen)} columns called {chosen!r}; rename all but one")
    return chosen


def check_text(kind: Any, column: str, what: str) -> None:
    """Refuse a column that holds something else than texts, or lists of them.

    Args:
        kind: Its arrow type.
        column, what: Names of column and table in errors.

    Raises:
        UserError: It does.
    """
    from pyarrow import types

    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    inner = inner.value_type if types.is_dictionary(inner) else inner
    if not (types.is_string(inner) or types.is_large_string(inner) or types.is_null(inner)):
        raise UserError(
            f"column {column!r} of {what} holds {kind}, not text; name a column of captions (of an image folder, write "
            "metadata.jsonl with quoted captions, as the reader of metadata.csv guesses types)"
        )
