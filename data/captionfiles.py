"""Files of captions: plain text, CSV, TSV, JSON lines and parquet, read as text, without guessing types.

Each reader gives the cells of the caption column, null where a row has none. Rows that do not parse are left out with a
warning that names their lines; above ``MAX_UNPARSED`` the file is refused.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

from obsdiff.data.captions import check_text, choose_column
from obsdiff.errors import UserError

KINDS = ("", ".txt", ".csv", ".tsv", ".jsonl", ".parquet")
MAX_UNPARSED = 0.05  # of a file's lines
SHOWN = 5  # line numbers named in messages
# the mark of UTF-32 starts with that of UTF-16
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_captions(path: Path, column: str | None) -> list[Any]:
    """The cells of a file's captions: every line (no ending, .txt), or a column (.csv, .tsv, .jsonl, .parquet).

    Args:
        path: The file.
        column: Caption column; None takes the first of the usual names that is there. Text files have none.

    Raises:
        UserError: It cannot be read, has another ending, no such column, or too many rows that do not parse.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"cannot read prompts from {path}: use {', '.join(KINDS[1:])}")
    if kind == ".parquet":
        return _read_parquet(path, column)
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return _read_table(text, "\t" if kind == ".tsv" else ",", column, str(path))
    lines = re.split("\r\n|\r|\n", text)
    return _read_json_lines(lines, column, str(path)) if kind == ".jsonl" else list(lines)


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in what its byte order mark says (UTF-8, UTF-16, UTF-32).

    Raises:
        UserError: It cannot be opened, or is no such text; the byte is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    mark, encoding = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise UserError(
            f"{path} is no {encoding.upper()} text: byte {at} does not fit; save it as UTF-8 text"
        ) from None
    if "\0" in text:
        at = len(mark) + len(text[: text.index("\0")].encode(encoding))
        raise UserError(f"{path} is no text file: byte {at} is zero; save it as UTF-8 text")
    return text


def _read_table(text: str, delimiter: str, column: str | None, what: str) -> list[Any]:
    """A column of comma- or tab-separated values; both are quoted as RFC 4180 says."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    found: list[Any] = []
    unparsed: list[tuple[int, int]] = []  # first and last line
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if header is None:
                raise UserError(f"{what}: the header does not parse: {error}; mend its quotes") from None
            unparsed.append((first, rows.line_num))
            continue
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            place = header.index(choose_column(header, column, what))
        elif len(row) != len(header):
            unparsed.append((first, rows.line_num))
        else:
            found.append(row[place])
    _say_unparsed(unparsed, rows.line_num, what, f"not {len(header or ())} fields, or quotes that do not match")
    return found


def _read_json_lines(lines: list[str], column: str | None, what: str) -> list[Any]:
    """A text or an object with a caption on each line."""
    found: list[Any] = []
    unparsed: list[tuple[int, int]] = []
    names: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = 0
        if isinstance(row, dict):
            if column is None:
                column = choose_column(list(row), None, what)
            names |= dict.fromkeys(row)
            row = row.get(column)
        if row is None or isinstance(row, str) or _is_texts(row):
            found.append(row)
        else:
            unparsed.append((number, number))
    if names:
        choose_column(list(names), column, what)
    _say_unparsed(unparsed, len(lines), what, "not JSON, or a caption that is no text")
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(part is None or isinstance(part, str) for part in value)


def _say_unparsed(unparsed: list[tuple[int, int]], lines: int, what: str, why: str) -> None:
    """Warn of lines that do not parse, or refuse a file with too many."""
    if not unparsed:
        return
    count = sum(last - first + 1 for first, last in unparsed)
    named = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in unparsed[:SHOWN])
    more = ", ..." if len(unparsed) > SHOWN else ""
    found = f"{what}: {count} of {lines} lines do not parse ({why}): {named}{more}"
    if count > MAX_UNPARSED * lines:
        raise UserError(f"{found}; put captions that hold separators into double quotes")
    warnings.warn(f"{found}; they are left out", stacklevel=2)


def _read_parquet(path: Path, column: str | None) -> list[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            chosen = choose_column(list(schema.names), column, str(path))
            check_text(schema.field(chosen).type, chosen, str(path))
            cells: list[Any] = file.read([chosen]).column(chosen).to_pylist()
            return cells
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read prompts from {path}: {' '.join(str(error).split())[:200]}") from error
