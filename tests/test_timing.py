"""Latencies: who is timed when, and what is told of the times."""

import itertools
import time

import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.timing import Latency, take_turns


def test_models_take_turns_and_are_timed_behind_a_pass_of_their_own(monkeypatch):
    calls, clock = [], itertools.count()
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}

    def now():
        calls.append("clock")
        return next(clock)

    monkeypatch.setattr(time, "perf_counter", now)
    found = take_turns(runs, repeats=2)
    turn = [x for name in "ab" for x in (name, "clock", name, "clock")]
    assert calls == ["a"] * 3 + ["b"] * 3 + turn * 2
    assert found == {name: Latency(1000.0, 1000.0, 1000.0) for name in "ab"}


def test_quantiles(monkeypatch):
    stamps = iter([stamp for n in range(1, 12) for stamp in (0.0, n / 1e3)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(stamps))
    found = take_turns({"a": lambda: None}, repeats=11)["a"]
    assert (found.median, found.low, found.high) == pytest.approx((6.0, 2.0, 10.0))


def test_no_repetition_is_refused():
    with pytest.raises(InputError, match="repeats is 0"):
        take_turns({"a": lambda: None}, repeats=0)
