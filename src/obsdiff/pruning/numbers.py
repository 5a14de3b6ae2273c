"""Numbers that a caller gives: whole where they count something, finite, in range."""

from __future__ import annotations

import math
from numbers import Integral, Real

from obsdiff.errors import UserError

SEEDS = 2**63


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of at least ``least`` (and below ``most``).

    Raises:
        UserError: Naming the option.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be a whole number")
    if int(value) < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")
    if most is not None and int(value) >= most:
        raise UserError(f"{name} is {value}; it must be below {most}")


def check_number(name: str, value: object, least: float) -> None:
    """Refuse what is no finite number of at least ``least``.

    Raises:
        UserError: Naming the option.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < least:
        raise UserError(f"{name} is {value!r}; it must be a finite number, at least {least:g}")


def check_seed(seed: object) -> None:
    """Refuse what is no seed: a whole number from 0 to 2^63 - 1.

    Raises:
        UserError: It is none.
    """
    check_whole("seed", seed, 0, SEEDS)
