"""Progress where standard error is no terminal, by a clock that the tests turn."""

import io
import sys
import time

import pytest

from obsdiff import progress
from obsdiff.progress import Lines, Progress, duration, track


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines():
    """Lines over 25 items, with their clock and their stream."""
    clock, stream = Clock(), io.StringIO()
    return Lines("calibrating", 25, clock=clock, stream=stream), clock, stream


def test_the_line_says_how_much_how_long_and_what_is_left(lines):
    shown, clock, stream = lines
    clock.now += 31
    shown.update(12)
    assert stream.getvalue() == "calibrating 12/25, 48%, 31 s, about 34 s left\n"


def test_short_work_says_nothing(lines):
    shown, clock, stream = lines
    for done in range(1, 26):
        clock.now += 4.9 / 25
        shown.update(done)
    shown.finish()
    assert stream.getvalue() == ""


def test_a_line_every_few_seconds_and_a_last_one(lines):
    shown, clock, stream = lines
    for tick in range(1, 101):  # 25 items of 2 s
        clock.now += 0.5
        shown.tick() if tick % 4 else shown.update(tick // 4)
    shown.finish()
    said = stream.getvalue().splitlines()
    assert [line.split(", ")[2] for line in said] == [duration(5 * i) for i in range(1, 11)]
    assert said[0] == "calibrating 2/25, 8%, 5.0 s, about 58 s left" and said[-1] == "calibrating 25/25, 100%, 50 s"


def test_hours_do_not_fill_the_log(lines):
    shown, clock, stream = lines
    for _ in range(3600):
        clock.now += 1
        shown.tick()
    assert 100 < len(stream.getvalue().splitlines()) < 200
    assert stream.getvalue().splitlines()[0] == "calibrating 0/25, 0%, 5.0 s"  # alive, though nothing is done yet


def test_what_was_done_before_does_not_count_as_speed():
    clock, stream = Clock(), io.StringIO()
    shown = Lines("training", 500, done=400, counted="400/500 steps", clock=clock, stream=stream)
    clock.now += 10
    shown.update(450, "450/500 steps", "loss 0.1")
    assert stream.getvalue() == "training 450/500 steps, 90%, loss 0.1, 10 s, about 10 s left\n"


def test_work_without_an_end():
    clock, stream = Clock(), io.StringIO()
    shown = Lines("training", float("inf"), clock=clock, stream=stream)
    clock.now += 10
    shown.update(7)
    assert stream.getvalue() == "training 7, 10 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_slow_item_does_not_silence_the_log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_S", 0.1)
    with Progress("solving", 2) as shown:
        time.sleep(1.3)  # the first item takes longer than the first line waits
        shown.update(2)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("solving 0/2, 0%") and said[-1].startswith("solving 2/2, 100%")


def test_track_yields_all_and_is_quiet_when_asked_or_quick(capsys):
    assert list(track(iter("abc"), 3, "spelling")) == ["a", "b", "c"]
    assert list(track(iter("abc"), 3, "spelling", quiet=True)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("training", 50, done=10, counted="10/50 steps") as shown:
        shown.update(20, "20/50 steps", "loss 0.5")
        shown.say("step 20: fine")
    text = sys.stderr.getvalue()
    assert "━" in text and "20/50 steps" in text and "loss 0.5" in text and "step 20: fine" in text
