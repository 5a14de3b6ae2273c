"""Numbers that a user gives: whole where they count something, finite, in range. Needs no torch."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real

from obsdiff.errors import UserError, brief

SEEDS = 2**63  # torch's generators take what is below


def check_whole(name: str, value: object, least: int = 1, below: int | None = None) -> None:
    """Refuse what is no whole number of at least ``least`` (and ``below`` another).

    Raises:
        UserError: Naming the option.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {_shown(value)}; it must be a whole number")
    if int(value) < least:
        raise UserError(f"{name} is {_shown(value)}; it must be at least {least}")
    if below is not None and int(value) >= below:
        raise UserError(f"{name} is {_shown(value)}; it must be below {below}")


def check_number(name: str, value: object, least: float) -> None:
    """Refuse what is no finite number of at least ``least``.

    Raises:
        UserError: Naming the option.
    """
    number = _number(value)
    if not math.isfinite(number) or number < least:
        raise UserError(f"{name} is {_shown(value)}; it must be a finite number, at least {least:g}")


def check_seed(name: str, seed: object) -> None:
    """Refuse what seeds no generator.

    Raises:
        UserError: It is none.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < SEEDS:
        raise UserError(f"{name} is {_shown(seed)}; it must be a whole number from 0 to 2^63 - 1")


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(name: str, text: object) -> int:
    """A size as a user writes it: 24GB, 24 GiB, 1.5TB, or bytes.

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"\s*(\d{1,16}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", str(text))
    unit = None if found is None else UNITS.get(found[2].upper())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1:
        raise UserError(f"{name} is {_shown(text)}; give a size such as 24GB, 24GiB or a number of bytes")
    return size


def bytes_text(size: float) -> str:
    """For people: a size with a unit."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if size >= UNITS[unit]), "B")
    amount = size / UNITS[unit]
    return f"{amount:,.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:,.1f} {unit}"


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _shown(value: object) -> str:
    return brief(repr(value) if isinstance(value, str) else value, 40)
