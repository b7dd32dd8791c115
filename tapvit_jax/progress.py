"""Progress of long jobs: one bar with an ETA, and a line for every finished step."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """Counts work in units that the caller estimates (seconds, roughly).

    The bar's ETA comes from the units done so far, so only the estimates' ratios matter.
    """

    def __init__(self, total: float, quiet: bool = False):
        self._quiet = quiet
        self._start = time.monotonic()
        # Logs are not terminals: they get a bar line every now and then instead of many a second.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(
            total=total,
            disable=quiet,
            mininterval=interval,
            maxinterval=interval,
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} elapsed, {remaining} left  {desc}",
        )

    @contextlib.contextmanager
    def step(self, name: str, units: float) -> Iterator["Step"]:
        """One step of the job; it counts for `units` however it is reported inside."""
        step = Step(self._bar, units)
        self._bar.set_description_str(name)
        start = time.monotonic()
        yield step
        step.finish()
        if not self._quiet:
            tqdm.write(f"{time.monotonic() - start:7.1f} s  {name}", file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class Step:
    """Reports how much of a step is done."""

    def __init__(self, bar: tqdm, units: float):
        self._bar, self._units, self._done = bar, units, 0.0

    def advance(self, fraction: float) -> None:
        """Say that a further fraction of this step is done."""
        fraction = min(fraction, 1.0 - self._done)
        self._done += fraction
        self._bar.update(fraction * self._units)

    def finish(self) -> None:
        """Count what was not reported."""
        self.advance(1.0)
