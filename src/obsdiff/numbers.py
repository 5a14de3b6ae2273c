"""Numbers that a user gives: whole where they count something, finite, in range. Needs no torch."""

from __future__ import annotations

import math
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


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _shown(value: object) -> str:
    return brief(repr(value) if isinstance(value, str) else value, 40)
