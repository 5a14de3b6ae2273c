"""How far along work is, on standard error: a bar on a terminal, a line every few seconds in a file or pipe."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

FIRST_S = 5.0  # work that is done by then says nothing in a file
LONGEST_S = 30.0  # between two lines; in between, a twentieth of the time so far


def duration(seconds: float) -> str:
    """A time in the two units that matter: ``0.4 s``, ``31 s``, ``2 min 5 s``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Lines:
    """Progress as plain lines: the first after a few seconds, then one every few seconds, and a last one.

    Args:
        what: What is being done, such as "calibrating".
        total: How much there is to do, in any unit; infinite if nobody knows.
        done: How much was done already.
        counted: What the amount is shown as; default: ``done/total``.
        clock: Seconds that only rise.
        stream: Where the lines go; default: standard error.
    """

    def __init__(
        self,
        what: str,
        total: float,
        done: float = 0,
        counted: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.done, self.counted, self.note = what, total, done, counted, ""
        self._clock, self._stream = clock, stream
        self._started, self._before = clock(), done
        self._next, self._said = FIRST_S, False
        self._lock = threading.Lock()

    def update(self, done: float, counted: str | None = None, note: str | None = None) -> None:
        """Set how much is done; a line follows if it is time for one."""
        self.done, self.counted, self.note = done, counted, self.note if note is None else note
        if done < self.total:
            self.tick()

    def tick(self) -> None:
        """Print a line if it is time for one."""
        with self._lock:
            passed = self._clock() - self._started
            if passed >= self._next:
                self._say(passed)
                self._next = passed + min(LONGEST_S, max(FIRST_S, passed / 20))

    def finish(self) -> None:
        """The last line, for work long enough to have said something."""
        if self._said:
            self._say(self._clock() - self._started)

    def say(self, text: str) -> None:
        """Another line."""
        print(text, file=self._stream or sys.stderr, flush=True)

    def _say(self, passed: float) -> None:
        self._said = True
        known, gained = math.isfinite(self.total), self.done - self._before
        share = f"{self.done / self.total if self.total else 1:.0%}" if known else ""
        parts = [f"{self.what} {self.counted or _fraction(self.done, self.total)}", share, self.note, duration(passed)]
        if known and gained > 0 and self.done < self.total:
            parts.append(f"about {duration(passed * (self.total - self.done) / gained)} left")
        self.say(", ".join(part for part in parts if part))


def _fraction(done: float, total: float) -> str:
    return f"{done:.0f}/{total:.0f}" if math.isfinite(total) else f"{done:.0f}"


class _Bar:
    """The same on a terminal."""

    def __init__(self, what: str, total: float, done: float = 0, counted: str | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:>12}"),
            BarColumn(),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.total = total
        self._progress = Progress(*columns, console=Console(stderr=True))
        known = total if math.isfinite(total) else None
        counted = counted or _fraction(done, total)
        self._task = self._progress.add_task(what, total=known, counted=counted, note="")
        self._progress.update(self._task, completed=done)
        self._progress.start()

    def update(self, done: float, counted: str | None = None, note: str | None = None) -> None:
        fields: dict[str, Any] = {"counted": counted or _fraction(done, self.total)}
        self._progress.update(self._task, completed=done, **fields | ({} if note is None else {"note": note}))

    def finish(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Shows how far along work is, for as long as the block lasts.

    Args:
        what: What is being done, such as "calibrating".
        total: How much there is to do, in any unit; infinite if nobody knows.
        done: How much was done already.
        counted: What the amount is shown as; default: ``done/total``.
    """

    def __init__(self, what: str, total: float, done: float = 0, counted: str | None = None) -> None:
        self._given = (what, total, done, counted)
        self._shown: Any = None
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._shown = _Bar(*self._given)
        else:
            self._shown = lines = Lines(*self._given)
            threading.Thread(target=self._keep_telling, args=(lines,), daemon=True).start()
        return self

    def _keep_telling(self, lines: Lines) -> None:
        """One item may take minutes: the lines come anyway, so that a log shows life."""
        while not self._over.wait(1.0):
            lines.tick()

    def update(self, done: float, counted: str | None = None, note: str | None = None) -> None:
        """Set how much is done."""
        self._shown.update(done, counted, note)

    def say(self, text: str) -> None:
        """A line between the bars."""
        self._shown.say(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if kind is None:
            self._shown.finish()
        elif isinstance(self._shown, _Bar):
            self._shown.stop()


def track(items: Iterable[T], total: int, what: str, quiet: bool = False) -> Iterator[T]:
    """Yield ``items`` while showing how far along they are."""
    if quiet:
        yield from items
        return
    with Progress(what, total) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.update(done)
