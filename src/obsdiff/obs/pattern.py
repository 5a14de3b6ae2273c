"""Sparsity patterns: a small closed type, parsed once at the edge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from obsdiff.errors import UserError

KINDS = ("heads", "ffn", "channels")  # of units that ``structured:RATIO`` removes
RANK, LOWRANK = "rank", "lowrank"  # kinds of units that are directions: of a vector per sample, of tokens
DIRECTIONS = (RANK, LOWRANK)
DEPTH = "depth"  # whole stages
BARE = {"structured": 0.5, "rank": 0.25, "lowrank": 0.5}  # of a kind without a number, where a budget decides


@dataclass(frozen=True)
class Unstructured:
    """Any single weight may go; ``ratio`` in [0, 1) of each layer's weights is zero afterwards."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio("sparsity", self.ratio)

    @property
    def sparsity(self) -> float:
        return self.ratio

    def __str__(self) -> str:
        return f"unstructured:{self.ratio:.10g}"


@dataclass(frozen=True)
class NM:
    """``n`` of every ``m`` consecutive weights along the inputs stay, the other m - n are zero (2:4, 4:8, ...)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise UserError(f"pattern {self.n}:{self.m} is impossible; N:M keeps N of every M weights, 1 <= N < M")

    @property
    def sparsity(self) -> float:
        return float(1 - Fraction(self.n, self.m))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Structured:
    """Whole attention heads, FFN neurons and ResNet channel groups go, and layers keep only some directions of what
    they read, so that the tensors become smaller.

    Attributes:
        heads: Share of the heads to remove, in [0, 1); the count is rounded (half to even).
        ffn: Share of the FFN neurons to remove, in [0, 1).
        channels: Share of the inner channel groups of ResNet blocks to remove, in [0, 1); rounded like heads.
        rank: Directions of a vector that modulations and other layers that read it keep: a whole number, or a share of
            the width below 1. None leaves them whole.
        width: What there is of the directions, once the pattern belongs to one input.
        lowrank: The same of tokens that queries, keys and values read.
        multiple_of: Kept FFN widths are the nearest multiple of this; None chooses 64 for layers of at least 1,024
            neurons (unaligned widths are slow: OBS-Diff table 5) and 8 below.
    """

    heads: float
    ffn: float
    multiple_of: int | None = None
    channels: float = 0.0
    rank: float | None = None
    width: int | None = None
    lowrank: float | None = None

    def __post_init__(self) -> None:
        _check_ratio("share of heads", self.heads)
        _check_ratio("share of FFN neurons", self.ffn)
        _check_ratio("share of channels", self.channels)
        if self.multiple_of is not None and self.multiple_of < 1:
            raise UserError(f"multiple_of is {self.multiple_of}; it must be at least 1")
        for kind, kept in self.directions.items():
            if not (0 < kept < 1 or (kept >= 1 and float(kept).is_integer())):
                raise UserError(f"{kind} is {kept:g}; it must be a whole number, or a share of the width below 1")
            if self.width is not None and kept > self.width:
                raise UserError(f"{kind} is {kept:g} of {self.width}; it cannot be above the width")
        if self.width is not None and not self.directions:
            raise UserError(f"a width of {self.width} is of directions, and there is no rank")

    @property
    def directions(self) -> dict[str, float]:
        """What stays of directions, by the kinds that the pattern names."""
        both = {RANK: self.rank, LOWRANK: self.lowrank}
        return {kind: kept for kind, kept in both.items() if kept is not None}

    @property
    def sparsity(self) -> float:
        return max(self.heads, self.ffn, self.channels, *map(self.share, DIRECTIONS))

    @property
    def cuts(self) -> bool:
        """Whether it is about heads, neurons and channels, not about directions alone."""
        return max(self.heads, self.ffn, self.channels) > 0 or not self.directions

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that the pattern is about."""
        return (*(KINDS if self.cuts else ()), *self.directions)

    @property
    def everything(self) -> bool:
        """Whether it is ``structured:RATIO``: the same share of all kinds that there are, and none is asked for by
        name."""
        return self.heads == self.ffn == self.channels and self.multiple_of is None

    @property
    def named(self) -> dict[str, float]:
        """The shares that are asked for by name, as far as they remove anything."""
        shares = {} if self.everything else {kind: self.share(kind) for kind in KINDS}
        return {kind: share for kind, share in shares.items() if share > 0}

    def share(self, kind: str) -> float:
        """The share to remove of the groups of a kind: "heads", "ffn", "channels", "rank" or "lowrank" (0 of a whole
        number while there is no width)."""
        if kind in DIRECTIONS:
            kept = self.directions.get(kind)
            return 0.0 if kept is None else 1 - kept / (self.width or max(1.0, kept))
        return {"heads": self.heads, "ffn": self.ffn, "channels": self.channels}[kind]

    def kept(self, kind: str, count: int) -> int:
        """Units that stay of ``count`` of a kind, at least one."""
        if kind in DIRECTIONS:
            rank = self.directions.get(kind, count)
            return max(1, round(rank * count)) if rank < 1 else min(int(rank), count)
        if kind == "ffn":
            return self.kept_neurons(count)
        return max(1, count - round(count * self.share(kind)))

    def only(self, kind: str, gone: float) -> Structured:
        """The same rules for one kind alone, with a share of its own."""
        shares = {"heads": 0.0, "ffn": 0.0, "channels": 0.0} | {kind: gone}
        return Structured(shares["heads"], shares["ffn"], self.multiple_of, shares["channels"])

    def choices(self, kind: str, count: int) -> list[Structured]:
        """All that may stay of ``count`` units, most first: any number, neurons in steps of the multiple, directions in
        steps of 8 where there are many."""
        if kind in DIRECTIONS:
            step = 8 if count >= 256 else 1
            return [self.reduced(kind, kept, count) for kept in (count, *range((count - 1) // step * step, 0, -step))]
        if kind != "ffn":
            return [self.only(kind, gone / count) for gone in range(count)]
        step = self.width_step(count)
        widths = [count, *(kept for kept in range(count // step * step, 0, -step) if kept < count)]
        return [self.only(kind, 1 - kept / count) for kept in widths]

    def of(self, kind: str, count: int) -> Structured:
        """What the pattern says to a group of ``count`` units of a kind."""
        if kind in DIRECTIONS:
            return self.reduced(kind, self.kept(kind, count), count)
        return self.units

    @staticmethod
    def reduced(kind: str, kept: int, width: int) -> Structured:
        """So many directions of a width; all of them: nothing is done."""
        fields: dict[str, Any] = {} if kept == width else {kind: kept, "width": width}
        return Structured(0.0, 0.0, **fields)

    @property
    def units(self) -> Structured:
        """The same without directions."""
        return replace(self, rank=None, lowrank=None, width=None)

    def width_step(self, width: int) -> int:
        """Kept widths of a layer of ``width`` neurons are multiples of this."""
        return self.multiple_of or (64 if width >= 1024 else 8)

    def kept_neurons(self, width: int) -> int:
        """FFN neurons that stay of ``width``, at least one multiple."""
        multiple = self.width_step(width)
        if self.ffn == 0 or width < multiple or multiple == 1:
            return width if self.ffn == 0 else max(1, width - round(width * self.ffn))
        return min(width, max(multiple, round(width * (1 - self.ffn) / multiple) * multiple))

    def __str__(self) -> str:
        if self.directions:
            width = "" if self.width is None else f"/{self.width}"
            named = [f"{kind}:{kept:.10g}{width}" for kind, kept in self.directions.items()]
            return "+".join([str(self.units), *named] if self.cuts else named)
        if self.everything:
            return f"structured:{self.heads:.10g}"
        extra = "" if self.channels == 0 else f",channels={self.channels:.10g}"
        extra += "" if self.multiple_of is None else f",multiple_of={self.multiple_of}"
        return f"structured:heads={self.heads:.10g},ffn={self.ffn:.10g}{extra}"


Pattern = Unstructured | NM | Structured


@dataclass(frozen=True)
class Hybrid:
    """Units and directions go first, then single weights of the layers that are left.

    Attributes:
        first: What is cut out.
        then: What becomes zero in what is left of each layer.
    """

    first: Structured
    then: Unstructured | NM

    @property
    def sparsity(self) -> float:
        """The share that the units lose."""
        return self.first.sparsity

    def __str__(self) -> str:
        return f"{self.first}+{self.then}"


@dataclass(frozen=True)
class Depth:
    """Whole stages (blocks) go; then the layers that are left may be pruned too.

    Attributes:
        amount: Stages to remove: a whole number, or a share of them below 1; None: as many as a budget chooses.
        then: What is done to the layers of the shorter model; None: nothing.
    """

    amount: float | None
    then: Pattern | Hybrid | None = None

    def __post_init__(self) -> None:
        if self.amount is None:
            return
        if not (0 < self.amount < 1 or (self.amount >= 1 and float(self.amount).is_integer())):
            raise UserError(
                f"depth is {self.amount:g}; it must be a whole number of stages, or a share of them below 1"
            )

    @property
    def sparsity(self) -> float:
        """The share of the stages that goes, 0 while only their number is known."""
        return self.amount if self.amount is not None and self.amount < 1 else 0.0

    def gone(self, count: int) -> int:
        """Stages that go of ``count``; a share is rounded, half to even."""
        assert self.amount is not None
        return round(self.amount * count) if self.amount < 1 else int(self.amount)

    def __str__(self) -> str:
        amount = DEPTH if self.amount is None else f"{DEPTH}:{self.amount:.10g}"
        return amount + ("" if self.then is None else f"+{self.then}")


Request = Pattern | Hybrid | Depth

_N_OF_M = r"([0-9]{1,9}):([0-9]{1,9})"
_OF_WEIGHTS = rf"{_N_OF_M}|unstructured:.*"
_SYNTAX = (
    "use unstructured:RATIO (unstructured:0.5), N:M (2:4), structured:RATIO (structured:0.3), "
    "structured:heads=RATIO,ffn=RATIO[,channels=RATIO][,multiple_of=WIDTH], rank:RANK or SHARE (rank:64), "
    "lowrank:RANK or SHARE, depth:STAGES or SHARE (depth:2), or a sum in the order depth+structured+rank+lowrank+2:4; "
    "with a budget structured, rank, lowrank and depth need no number"
)


def parse_request(text: str | Request) -> Request:
    """The pattern that ``text`` names, alone or joined with what goes before or after it; an object passes through.

    Raises:
        UserError: The text names none, one out of range, or what excludes one another.
    """
    if isinstance(text, Hybrid | Depth):
        return text
    parts = [] if not isinstance(text, str) else [part.strip() for part in text.split("+")]
    depths = [part for part in parts if part.partition(":")[0] == DEPTH]
    if not depths:
        return _layered(text, parts)
    rest = [part for part in parts if part not in depths]
    _, given, value = depths[0].partition(":")
    if len(depths) > 1 or (given and not value):
        raise UserError(f"pattern {str(text)[:80]!r} needs one number of stages; {_SYNTAX}")
    amount = _number(value, str(text)) if value else None
    return Depth(amount, _layered("+".join(rest), rest) if rest else None)


def _layered(text: str | Pattern, parts: Sequence[str]) -> Pattern | Hybrid:
    """What is done to layers: a pattern, or units and directions first and single weights then."""
    weights = [part for part in parts if re.fullmatch(_OF_WEIGHTS, part)]
    units = [part for part in parts if part not in weights]
    if not weights or len(parts) == 1:
        return parse_pattern(text)
    if len(weights) > 1:
        raise UserError(
            f"pattern {str(text)[:80]!r} names {' and '.join(weights)}, which exclude each other: single weights go by "
            "one pattern; leave one out"
        )
    first, then = parse_pattern("+".join(units)), parse_pattern(weights[0])
    assert isinstance(first, Structured) and isinstance(then, Unstructured | NM)
    if then.sparsity == 0:
        raise UserError(f"pattern {str(text)[:80]!r} prunes no single weights; leave {then} out")
    return Hybrid(first, then)


def of_layers(request: Request) -> Pattern | Hybrid | None:
    """What a request does to single layers; None for depth alone."""
    return request.then if isinstance(request, Depth) else request


def of_units(request: Request | None) -> Structured | None:
    """What a request does to units and directions; None: nothing."""
    layered = None if request is None else of_layers(request)
    units = layered.first if isinstance(layered, Hybrid) else layered
    return units if isinstance(units, Structured) else None


def parse_pattern(text: str | Pattern) -> Pattern:
    """The pattern that ``text`` names; a pattern object passes through.

    Raises:
        UserError: The text names no pattern, or one out of range.
    """
    if isinstance(text, Unstructured | NM | Structured):
        return text
    text = str(text).strip()
    if match := re.fullmatch(_N_OF_M, text):
        return NM(int(match[1]), int(match[2]))
    parts = text.split("+")
    if len(parts) > 1:
        return _combined(parts, text)
    kind, _, value = text.partition(":")
    if kind in DIRECTIONS:
        kept, _, width = value.partition("/")
        fields: dict[str, Any] = {kind: _number(kept, text) if value else BARE[kind]}
        return Structured(0.0, 0.0, width=int(_number(width, text)) if width else None, **fields)
    if kind == "structured" and not value:
        return Structured(BARE[kind], BARE[kind], channels=BARE[kind])
    if kind == "unstructured" and value:
        return Unstructured(_number(value, text))
    if kind == "structured" and value:
        if "=" not in value:
            ratio = _number(value, text)
            return Structured(ratio, ratio, channels=ratio)
        return _parse_structured(value, text)
    raise UserError(f"unknown pattern {text[:80]!r}; {_SYNTAX}")


def _combined(parts: list[str], text: str) -> Structured:
    """``structured:…+rank:…+lowrank:…``, in any order, each once."""
    found = [parse_pattern(part) for part in parts]
    cut = [p for p in found if isinstance(p, Structured)]
    named = [kind for p in cut for kind in (p.directions or ("structured",))]
    if len(cut) < len(parts) or len(set(named)) < len(named) or any(p.width is not None for p in cut):
        raise UserError(f"pattern {text[:80]!r} joins what cannot be joined; {_SYNTAX}")
    directions: dict[str, Any] = {kind: kept for p in cut for kind, kept in p.directions.items()}
    return replace(next((p for p in cut if p.cuts), Structured(0.0, 0.0)), **directions)


def is_bare(text: str) -> bool:
    """Whether a pattern names a kind without a number, which asks for a budget."""
    return any(part.strip() in (*BARE, DEPTH) for part in text.split("+"))


def _parse_structured(value: str, text: str) -> Structured:
    fields: dict[str, float] = {}
    for part in value.split(","):
        key, _, number = part.partition("=")
        if key not in (*KINDS, "multiple_of") or key in fields:
            raise UserError(f"cannot read {part!r} in pattern {text!r}; {_SYNTAX}")
        fields[key] = _number(number, text)
    multiple = fields.get("multiple_of")
    if multiple is not None and not float(multiple).is_integer():
        raise UserError(f"multiple_of is {multiple:g} in pattern {text!r}; it must be a whole number")
    shares = {kind: fields.get(kind, 0.0) for kind in KINDS}
    multiple_of = None if multiple is None else int(multiple)
    return Structured(shares["heads"], shares["ffn"], multiple_of, shares["channels"])


def _number(text: str, pattern: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"cannot read {text!r} as a number in pattern {pattern!r}; {_SYNTAX}") from None


def _check_ratio(what: str, ratio: float) -> None:
    if not 0 <= ratio < 1:  # also refuses NaN
        raise UserError(f"{what} is {ratio:g}; it must be at least 0 and below 1")
