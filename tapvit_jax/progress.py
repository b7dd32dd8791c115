"""Progress of long jobs: one bar with an ETA, and a line for every finished step."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

_LOG_SECONDS = 15.0


class Progress:
    """Counts work in units that the caller estimates (seconds, roughly).

    The ETA comes from the units done so far, so that only the estimates' ratios matter. On a
    terminal a bar moves; a log gets a line now and then.

    Args:
      total: units of the whole job.
      quiet: say nothing.
      lines: a line for every finished step, for jobs that print no table of their own.
    """

    def __init__(self, total: float, quiet: bool = False, lines: bool = True):
        # Never quite nothing: shares of it are printed.
        self._total, self._done, self._quiet = max(total, 1e-9), 0.0, quiet
        self._lines = lines
        self._start = self._logged = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = self._new_bar()

    def _new_bar(self) -> tqdm:
        return tqdm(
            total=self._total,
            initial=self._done,
            disable=self._quiet or not self._terminal,
            leave=False,
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} elapsed, {remaining} left  {desc}",
        )

    def resume(self) -> None:
        """Go on after a step that failed."""
        self._bar.close()
        self._bar = self._new_bar()

    @contextlib.contextmanager
    def step(self, name: str, units: float) -> Iterator["Step"]:
        """One step of the job; it counts for `units` however it is reported inside."""
        step = Step(self, name, units)
        self._bar.set_description_str(name)
        start = time.monotonic()
        try:
            yield step
        except BaseException:
            # The message that follows gets a line of its own.
            self._bar.close()
            raise
        self._count(step.take(1.0))
        if self._lines:
            self._line(f"{name} ({time.monotonic() - start:.1f} s)")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def advance(self, name: str, units: float) -> None:
        """Count units of the step `name` as done."""
        self._count(units)
        if not self._terminal and time.monotonic() - self._logged > _LOG_SECONDS:
            self._line(f"{name} ...")

    def _count(self, units: float) -> None:
        units = min(units, self._total - self._done)
        self._done += units
        self._bar.update(units)

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        self._logged = time.monotonic()
        elapsed = self._logged - self._start
        left = "?"
        if self._done > 0:
            left = tqdm.format_interval(elapsed * (self._total - self._done) / self._done)
        share = 100 * self._done / self._total
        times = f"{tqdm.format_interval(elapsed)} elapsed, {left} left"
        tqdm.write(f"{share:3.0f}%  {times}  {text}", file=sys.stderr)


class Step:
    """Reports how much of a step is done."""

    def __init__(self, progress: Progress, name: str, units: float):
        self._progress, self._name, self._units, self._share = progress, name, units, 0.0

    def advance(self, share: float) -> None:
        """Say that a further share of this step is done; together they never exceed the whole."""
        self._progress.advance(self._name, self.take(share))

    def take(self, share: float) -> float:
        """Units of a further share, as far as the step has them left."""
        share = min(max(share, 0.0), 1.0 - self._share)
        self._share += share
        return share * self._units
