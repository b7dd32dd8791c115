"""Statistics of comparisons: intervals, paired differences, ranks and shares of a gap."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from tapvit_jax.errors import InputError

CONFIDENCE = 0.95
_DRAWS = 2000

Values = Mapping[tuple[Hashable, Hashable], float]
"""What was measured, by device and seed."""


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
    """

    difference: Mean
    wins: int
    losses: int


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
    factor = float(stdtrit(x.size - 1, 0.5 + confidence / 2))
    return Mean(mean, factor * error, x.size)


def crossed_interval(values: Values, confidence: float = CONFIDENCE) -> Mean:
    """Mean over devices and seeds, with an interval that holds for others of both.

    Seeds of one device are repeats and no further devices, and a seed's split and dense model are
    common to all devices: y_ds = mu + a_d + b_s + e_ds. Of D devices and S seeds

        Var(mean) = (MS_a + MS_b - MS_e) / (D S)

    from the mean squares of the analysis of variance, with Satterthwaite's degrees of freedom for
    Student's t; an effect whose mean square is not above MS_e is left out. Where some device lacks
    a seed, the devices' own means are what Student's interval is of.

    Raises:
      InputError: no values.

    Source: random-effects analysis of variance (Searle, Casella and McCulloch, 1992).
    """
    devices, seeds = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    plain = mean_interval(list(values.values()), confidence)
    if min(len(devices), len(seeds)) < 2:
        return plain
    if len(values) < len(devices) * len(seeds):
        own = [[v for key, v in values.items() if key[0] == device] for device in devices]
        of_devices = mean_interval([float(np.mean(v)) for v in own], confidence)
        return dataclasses.replace(plain, half_width=of_devices.half_width)
    table = np.array([[values[device, seed] for seed in seeds] for device in devices], np.float64)
    rows, columns = table.mean(axis=1) - plain.mean, table.mean(axis=0) - plain.mean
    rest = table - plain.mean - rows[:, None] - columns
    row_freedom, column_freedom = len(rows) - 1, len(columns) - 1
    freedom = row_freedom * column_freedom
    error = float(np.sum(rest**2)) / freedom
    effects = [
        (len(columns) * float(np.sum(rows**2)) / row_freedom, row_freedom),
        (len(rows) * float(np.sum(columns**2)) / column_freedom, column_freedom),
    ]
    effects = [(square, free) for square, free in effects if square > error]
    if not effects:
        return plain
    extra = len(effects) - 1
    variance = sum(square for square, _ in effects) - extra * error
    spread = sum(square**2 / free for square, free in effects) + extra * error**2 / freedom
    factor = float(stdtrit(variance**2 / spread, 0.5 + confidence / 2))
    return dataclasses.replace(plain, half_width=factor * float(np.sqrt(variance / table.size)))


def paired(first: Values, second: Values, confidence: float = CONFIDENCE) -> Paired:
    """Differences first - second over the devices and seeds that both have, see `crossed_interval`.

    Raises:
      InputError: no device and seed in common.
    """
    differences = {key: first[key] - second[key] for key in first if key in second}
    if not differences:
        raise InputError("pairs need a device and seed in common, found none")
    found = np.array(list(differences.values()))
    wins, losses = int((found > 0).sum()), int((found < 0).sum())
    return Paired(crossed_interval(differences, confidence), wins, losses)


def mean_ranks(values: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "m"]:
    """Mean over rows of each column's rank; 1 is the largest value, ties share their mean rank.

    Raises:
      InputError: no rows.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise InputError("ranks need at least one row of values")
    # All of scipy.stats for one function of one table: programs that draw none start sooner.
    from scipy.stats import rankdata

    return rankdata(-values, axis=1).mean(axis=0)


def gap_closed(
    low: Values, value: Values, high: Values, *, seed: int = 0, confidence: float = CONFIDENCE
) -> Gap:
    """Share of the gap from low to high that the values close, where all three are there.

        share = mean(value - low) / mean(high - low)

    with the percentile interval of a bootstrap that draws devices and seeds, each on their own.

    Raises:
      InputError: no device and seed that all three have.

    Source: the pigeonhole bootstrap (Owen, 2007).
    """
    shared = [key for key in low if key in value and key in high]
    if not shared:
        raise InputError("a gap needs a device and seed that all three have, found none")
    gains = np.array([value[key] - low[key] for key in shared])
    gaps = np.array([high[key] - low[key] for key in shared])
    if gaps.mean() <= 0:
        return Gap(None, None, None)
    share = float(gains.mean() / gaps.mean())
    rng = np.random.default_rng(seed)
    counts = np.ones((_DRAWS, len(shared)))
    for part in zip(*shared, strict=True):
        names, places = np.unique([str(name) for name in part], return_inverse=True)
        counts *= rng.multinomial(len(names), np.full(len(names), 1 / len(names)), _DRAWS)[
            :, places
        ]
    counts = counts[counts.any(axis=1)]
    resampled = counts @ gaps
    tail = (1 - confidence) / 2
    if len(shared) == 1 or (resampled <= 0).mean() > tail:
        return Gap(share, None, None)
    sound = resampled > 0
    ends = np.quantile((counts @ gains)[sound] / resampled[sound], (tail, 1 - tail))
    return Gap(share, float(ends[0]), float(ends[1]))
