"""How long forward passes take, whatever runs them."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tapvit_jax.errors import InputError

# Untimed passes of each before any is timed; the first may compile.
_WARMUP = 3


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass: median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def take_turns(runs: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, Latency]:
    """Time several forward passes, which take turns in one process.

    A machine that slows down so slows all of them down alike. Every timed pass follows an untimed
    one of the same model, so that each finds its own weights in the caches.

    Args:
      runs: each returns when its pass is done.
      repeats: timed passes each.

    Raises:
      InputError: no repetition.

    Source: ours.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}, expected 1 or more")
    for run in runs.values():
        for _ in range(_WARMUP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: Latency(*(float(np.quantile(values, q)) for q in (0.5, 0.1, 0.9)))
        for name, values in times.items()
    }
