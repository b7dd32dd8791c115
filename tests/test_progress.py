import io
import re
import sys

import pytest

from tapvit_jax import progress
from tapvit_jax.progress import Progress

LINE = re.compile(r" *(\d+)%  (\d\d:\d\d) elapsed, (\S+) left  (.*)")


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return [LINE.fullmatch(line).groups() for line in err.splitlines()]


def test_a_log_gets_a_line_for_every_step(clock, capsys):
    whole = Progress(100)
    with whole.step("first", 20):
        clock.now += 10
    with whole.step("second", 60):
        clock.now += 50
    with whole.step("third", 20):
        clock.now += 20
    whole.close()
    assert lines(capsys) == [
        ("20", "00:10", "00:40", "first (10.0 s)"),
        ("80", "01:00", "00:15", "second (50.0 s)"),
        ("100", "01:20", "00:00", "third (20.0 s)"),
    ]


def test_a_log_gets_a_line_now_and_then_within_long_steps(clock, capsys):
    whole = Progress(10)
    with whole.step("long", 10) as step:
        for _ in range(10):
            clock.now += 4
            step.advance(0.1)
    assert lines(capsys) == [
        ("40", "00:16", "00:24", "long ..."),
        ("80", "00:32", "00:08", "long ..."),
        ("100", "00:40", "00:00", "long (40.0 s)"),
    ]


def test_a_step_counts_once_however_it_is_reported(clock, capsys):
    whole = Progress(4)
    for name, shares in (("none", []), ("over", [0.8, 0.8, 5.0]), ("back", [0.5, -3.0])):
        clock.now += 1
        with whole.step(name, 1) as step:
            for share in shares:
                step.advance(share)
    assert [line[0] for line in lines(capsys)] == ["25", "50", "75"]


def test_nested_and_additional_steps_never_exceed_the_whole(clock, capsys):
    whole = Progress(3)
    with whole.step("outer", 3) as outer:
        outer.advance(0.5)
        with whole.step("inner", 3):
            clock.now += 1
        outer.advance(0.5)
    with whole.step("more", 5):
        clock.now += 1
    assert [line[::2] for line in lines(capsys)] == [
        ("100", "00:00"),
        ("100", "00:00"),
        ("100", "00:00"),
    ]


@pytest.mark.parametrize("total", [0, 5])
def test_steps_that_count_for_nothing(clock, capsys, total):
    whole = Progress(total)
    with whole.step("nothing", 0):
        clock.now += 3
    assert lines(capsys) == [("0", "00:03", "?", "nothing (3.0 s)")]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_is_not_said_to_be_finished(clock, capsys, stop):
    whole = Progress(2)
    with pytest.raises(stop), whole.step("fails", 1) as step:
        step.advance(0.5)
        raise stop
    assert lines(capsys) == []
    with whole.step("works", 1):
        clock.now += 1
    assert [line[0] for line in lines(capsys)] == ["75"]


def test_quiet_prints_nothing(clock, capsys, monkeypatch):
    for stream in (None, Terminal()):
        if stream is not None:
            monkeypatch.setattr(sys, "stderr", stream)
        whole = Progress(2, quiet=True)
        with whole.step("long", 1) as step:
            clock.now += 100
            step.advance(0.5)
        with pytest.raises(RuntimeError), whole.step("fails", 1):
            raise RuntimeError
        whole.close()
        assert stream is None or stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def last_line(terminal):
    """What stands on the terminal's last line once all its returns were obeyed."""
    shown = ""
    for text in terminal.getvalue().rsplit("\n", 1)[-1].split("\r"):
        shown = text + shown[len(text) :]
    return shown.rstrip()


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    whole = Progress(4)
    with whole.step("first", 3):
        assert "  0% |" in last_line(terminal) and last_line(terminal).endswith("left  first")
    with whole.step("second", 1):
        assert " 75% |" in last_line(terminal) and last_line(terminal).endswith("left  second")
    assert re.search(r" 75%  00:00 elapsed, 00:00 left  first \(0\.0 s\)\n", terminal.getvalue())
    whole.close()
    assert last_line(terminal) == ""
    assert capsys.readouterr() == ("", "")


def test_the_bar_goes_away_before_an_error_is_printed(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    whole = Progress(4)
    with pytest.raises(RuntimeError), whole.step("first", 3):
        raise RuntimeError
    assert last_line(terminal) == ""
