"""Which rows of a denoiser call belong to which prompt: checked against what the call is told, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.models.calls import arguments_of
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.families import Family

NEGATIVE = "negative_"
Path = tuple[str, ...]


class CallRows:
    """The rows of each denoiser call of a pipeline: one per prompt, or with guidance the negative prompts' as well.

    Attributes:
        each: Rows per prompt of the latest call, 1 or 2.
        repeated: Whether the latest call was given the same latents at the same time as the one before: an extra call
            within a step, such as that of skip-layer guidance or of a negative prompt with a call of its own.
    """

    def __init__(self, pipe: Any, family: Family, conditioning: Conditioning) -> None:
        self.kind = type(pipe).__name__
        self.conditioning = conditioning
        self.family = family
        self.each, self.repeated = 1, False
        self._part = slice(0)
        self._latest: tuple[Any, Any] | None = None
        self._told: dict[tuple[str, int], Tensor] = {}

    def begin(self, part: slice) -> None:
        """The prompts ``part`` come next."""
        self._part, self._latest = part, None
        self._told.clear()

    @property
    def prompts(self) -> int:
        """How many."""
        return self._part.stop - self._part.start

    @property
    def own(self) -> slice:
        """The rows of the prompts themselves in the latest call."""
        first = 0 if self.each == 1 or self.family.guidance == "last" else self.prompts
        return slice(first, first + self.prompts)

    @property
    def negative(self) -> slice:
        """The rows of the negative prompts in the latest call, if it has two per prompt."""
        first = self.prompts - self.own.start
        return slice(first, first + self.prompts)

    def of_prompt(self, index: int) -> list[int]:
        """The rows of one prompt in the latest call: with guidance the negative one's first."""
        rows = list(range(index, self.each * self.prompts, self.prompts))
        return rows[::-1] if self.family.guidance == "last" else rows

    def look(self, denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of a call, and give its arguments by name.

        Raises:
            UserError: Its rows are neither the prompts nor the negative prompts and the prompts.
        """
        given = arguments_of(denoiser, args, kwargs)
        sample, time = given[self.family.sample], given[self.family.time]
        self.each, left = divmod(len(sample), self.prompts)
        if left or self.each not in (1, 2):
            raise UserError(
                f"{self.kind} calls its denoiser with {len(sample)} rows for {self.prompts} prompts; known are one row "
                f"per prompt, or two (negative prompt, prompt). {self._advice()}"
            )
        for argument, name in self.family.conditions:
            if name not in self.conditioning.embeds:
                continue  # prompts that the pipeline encodes itself
            expected, told = self._expected(name, given[argument]), given[argument]
            if expected is None or expected.shape != told.shape or not torch.equal(expected, told):
                raise UserError(
                    f"{self.kind} calls its denoiser with rows that are not "
                    f"{'the prompts' if self.each == 1 else 'the negative prompts, then the prompts'} ({argument} "
                    f"is not made of {name}). {self._advice()}"
                )
        now = _detached(sample), torch.as_tensor(time).detach()
        self.repeated = self._latest is not None and all(
            _equal(a, b, self.prompts) for a, b in zip(now, self._latest, strict=True)
        )
        self._latest = now
        return given

    def _expected(self, name: str, like: Tensor) -> Tensor | None:
        """What the rows of a call must be told, kept for the calls that follow; None if the embeds are not there."""
        key = (name, self.each)
        if key not in self._told:
            embeds = self.conditioning.embeds
            parts = [embeds[key][self._part] for key in (NEGATIVE + name, name)[-self.each :] if key in embeds]
            if len(parts) < self.each:
                return None
            self._told[key] = torch.cat(parts).to(like)
        return self._told[key]

    def _advice(self) -> str:
        return "Measure with the family's plain pipeline, made of the same parts (its from_pipe(pipe))"


def _detached(sample: Any) -> Any:
    return sample.detach() if isinstance(sample, Tensor) else [x.detach() for x in sample]


def _equal(now: Any, before: Any, prompts: int) -> bool:
    """Whether the prompts' own rows, which come last, are the same."""
    if isinstance(now, list):
        return all(torch.equal(a, b) for a, b in zip(now[-prompts:], before[-prompts:], strict=True))
    a, b = (tensor[-prompts:] if tensor.dim() else tensor for tensor in (now, before))
    return torch.equal(a, b)


def row_paths(arguments: Mapping[str, Any], rows: int) -> frozenset[Path]:
    """Which arguments of a call have an entry for each of its rows, by name (and key, in a dictionary).

    Seen in a call of one or two rows, where nothing else is as short: sequences, sizes and tables are longer. What is
    None there (the mask of a prompt without padding) counts too: it may have entries in other calls.
    """
    found: set[Path] = set()

    def visit(value: Any, path: Path) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(inner, (*path, key))
        elif value is None or (
            (isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)) and len(value) == rows
        ):
            found.add(path)

    visit(arguments, ())
    return frozenset(found)


def flattened(arguments: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """Arguments with those in dictionaries by (name, key)."""
    found: dict[Path, Any] = {}
    for key, value in arguments.items():
        inner = (*path, key)
        found |= flattened(value, inner) if isinstance(value, Mapping) and value else {inner: value}
    return found


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The opposite of :func:`flattened`."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        at = found
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
    return found


def take_rows(arguments: Mapping[str, Any], paths: frozenset[Path], at: Sequence[int]) -> dict[str, Any]:
    """The arguments of a call of some of the rows."""

    def taken(value: Any) -> Any:
        if value is None:
            return None
        return value[list(at)] if isinstance(value, Tensor) else [value[i] for i in at]

    return nested({path: taken(value) if path in paths else value for path, value in flattened(arguments).items()})


def join_rows(calls: Sequence[Mapping[str, Any]], paths: frozenset[Path]) -> dict[str, Any]:
    """One call of the rows of several, which agree in everything that rows share."""
    flat = [flattened(arguments) for arguments in calls]

    def joined(path: Path) -> Any:
        values = [arguments[path] for arguments in flat]
        if path not in paths or values[0] is None:
            return values[0]
        return torch.cat(values) if isinstance(values[0], Tensor) else [row for value in values for row in value]

    return nested({path: joined(path) for path in flat[0]})
