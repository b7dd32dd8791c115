"""Statistics of comparisons: intervals, paired differences, ranks and shares of a gap."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from tapvit_jax.errors import InputError

CONFIDENCE = 0.95
_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean and how far its interval reaches to either side.

    Attributes:
      half_width: of the interval; None for a single value, which has no interval.
      count: values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width


@dataclasses.dataclass(frozen=True)
class Paired:
    """How much one thing is above another over pairs that share everything else.

    Attributes:
      difference: mean of the pairs' differences, with its interval.
      wins: pairs in which the first is above; `losses` those in which it is below.
      sign_p: two-sided p-value of the exact sign test; ties count for neither side.
    """

    difference: Mean
    wins: int
    losses: int
    sign_p: float


@dataclasses.dataclass(frozen=True)
class Gap:
    """Share of the way from a low to a high value that something covers.

    Attributes:
      share: None where the high values are not above the low ones on average.
      low: lower end of the interval, and `high` the upper one; None where the gap is not above zero
        in nearly all resamples, so that shares of it mean nothing.
    """

    share: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """Mean with Student's interval: half width = t_{n-1} s / sqrt(n).

    Raises:
      InputError: no values.
    """
    x = np.asarray(values, np.float64)
    if x.size == 0:
        raise InputError("a mean needs at least one value")
    mean = float(x.mean())
    if x.size == 1:
        return Mean(mean, None, 1)
    error = float(x.std(ddof=1)) / np.sqrt(x.size)
    factor = float(stats.t.ppf(0.5 + confidence / 2, x.size - 1))
    return Mean(mean, factor * error, x.size)


def paired(
    first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"], confidence: float = CONFIDENCE
) -> Paired:
    """Differences first - second of pairs: Student's interval of the mean, and the sign test.

    Raises:
      InputError: no pairs, or sequences of different lengths.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise InputError(f"pairs need equally many values, found {a.size} and {b.size}")
    differences = a - b
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    sign_p = 1.0
    if wins + losses:
        sign_p = float(stats.binomtest(wins, wins + losses).pvalue)
    return Paired(mean_interval(differences, confidence), wins, losses, sign_p)


def mean_ranks(values: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "m"]:
    """Mean over rows of each column's rank; 1 is the largest value, ties share their mean rank.

    Raises:
      InputError: no rows.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise InputError("ranks need at least one row of values")
    return stats.rankdata(-values, axis=1).mean(axis=0)


def gap_closed(
    low: Float[np.ndarray, "n"],
    value: Float[np.ndarray, "n"],
    high: Float[np.ndarray, "n"],
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Gap:
    """Share of the gap from low to high that the values close, over paired triples.

        share = mean(value - low) / mean(high - low)

    with the percentile interval of a bootstrap over the triples.

    Raises:
      InputError: no triples, or sequences of different lengths.
    """
    a, b, c = (np.asarray(x, np.float64) for x in (low, value, high))
    if not a.shape == b.shape == c.shape or a.size == 0:
        raise InputError(f"a gap needs triples, found {a.size}, {b.size} and {c.size} values")
    gains, gaps = b - a, c - a
    if gaps.mean() <= 0:
        return Gap(None, None, None)
    share = float(gains.mean() / gaps.mean())
    drawn = np.random.default_rng(seed).integers(gains.size, size=(_DRAWS, gains.size))
    resampled = gaps[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    if gains.size == 1 or (resampled <= 0).mean() > tail:
        return Gap(share, None, None)
    sound = resampled > 0
    shares = gains[drawn].mean(axis=1)[sound] / resampled[sound]
    ends = np.quantile(shares, (tail, 1 - tail))
    return Gap(share, float(ends[0]), float(ends[1]))
