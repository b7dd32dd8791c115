"""Intervals over devices and seeds, paired differences, ranks and shares of a gap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from experiments.statistics import crossed_interval, gap_closed, mean_interval, mean_ranks, paired
from tapvit_jax.errors import InputError

_VALUES = arrays(np.float64, st.integers(2, 12), elements=st.floats(-100, 100, width=32))


def crossed(table):
    """Values by device (rows) and seed (columns)."""
    return {key: float(value) for key, value in np.ndenumerate(np.asarray(table))}


def column(values):
    """One value a device, of a single seed."""
    return crossed(np.asarray(values)[:, None])


@given(_VALUES)
def test_the_interval_is_scipys_students(values):
    found = mean_interval(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, np.mean(values), max(stats.sem(values), 1e-300)
    )
    assert found.count == len(values)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9, atol=1e-9)
    assert crossed_interval(column(values)) == found
    assert crossed_interval(crossed(values[None])) == found


def test_one_value_has_no_interval_and_none_has_no_mean():
    for found in (mean_interval([3.0]), crossed_interval({(0, 0): 3.0})):
        assert (found.mean, found.half_width, found.low, found.high) == (3.0, None, None, None)
    with pytest.raises(InputError, match="at least one"):
        mean_interval([])


def test_repeats_are_no_further_devices():
    rng = np.random.default_rng(0)
    devices = 5 * rng.standard_normal(4)
    expected = mean_interval(devices)
    noise = 1e-6 * rng.standard_normal((4, 3))
    found = crossed_interval(crossed(devices[:, None] + noise))
    assert (found.count, found.half_width) == (12, pytest.approx(expected.half_width, rel=1e-4))
    # Nor are devices that share a seed's dense model further dense models.
    turned = crossed_interval(crossed((devices[:, None] + noise).T))
    assert turned.half_width == pytest.approx(found.half_width)
    # A device without one of its seeds: the devices' means.
    table = crossed(devices[:, None] + noise)
    del table[3, 2]
    found = crossed_interval(table)
    assert (found.count, found.half_width) == (11, pytest.approx(expected.half_width, rel=1e-4))


@pytest.mark.parametrize(("device", "seed"), [(0.0, 0.0), (3.0, 0.0), (0.0, 3.0), (2.0, 2.0)])
def test_intervals_hold_as_often_as_they_say(device, seed):
    rng = np.random.default_rng(1)
    draws, shape = 1000, (5, 4)
    tables = rng.standard_normal((draws, *shape))
    tables += device * rng.standard_normal((draws, shape[0], 1))
    tables += seed * rng.standard_normal((draws, 1, shape[1]))
    found = [crossed_interval(crossed(table)) for table in tables]
    held = np.mean([mean.low <= 0 <= mean.high for mean in found])
    assert 0.92 < held < 0.985
    naive = [mean_interval(table.ravel()) for table in tables]
    naively = np.mean([mean.low <= 0 <= mean.high for mean in naive])
    assert naively < 0.85 or device == seed == 0


@given(_VALUES)
def test_pairs_are_a_paired_t_test(values):
    other = np.roll(values, 1)
    found, mirrored = paired(column(values), column(other)), paired(column(other), column(values))
    differences = values - other
    assert (found.wins, found.losses) == ((differences > 0).sum(), (differences < 0).sum())
    assert (mirrored.wins, mirrored.losses) == (found.losses, found.wins)
    assert mirrored.difference.mean == -found.difference.mean


def test_the_paired_interval_is_that_of_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    a = rng.normal(size=9)
    b = a + 0.3 + 0.1 * rng.normal(size=9)
    found = paired(column(b), column(a)).difference
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    # Only what both have is a pair.
    assert paired(column(b), column(a[:8])).difference.count == 8
    with pytest.raises(InputError, match="in common"):
        paired({(0, 0): 1.0}, {(1, 0): 1.0})


def test_ranks_share_ties_and_one_is_best():
    table = np.array([[90.0, 80.0, 80.0], [50.0, 60.0, 10.0]])
    np.testing.assert_allclose(mean_ranks(table), [1.5, 1.75, 2.75])
    with pytest.raises(InputError, match="at least one row"):
        mean_ranks(np.zeros((0, 3)))


def test_the_share_of_a_gap_is_of_means_with_an_interval_around_it():
    low, high = column([50.0, 60.0, 55.0]), column([60.0, 70.0, 65.0])
    found = gap_closed(low, column([55.0, 66.0, 62.0]), high)
    assert found.share == pytest.approx(0.6)
    assert 0.5 <= found.low <= 0.6 <= found.high <= 0.7
    # An oracle that is no better leaves no gap, and one that hardly is, no interval.
    assert gap_closed(high, low, low).share is None
    unclear = gap_closed(column(np.zeros(3)), column(np.ones(3)), column([5.0, -4.0, 0.0]))
    assert unclear.share == pytest.approx(3.0) and unclear.low is None
    with pytest.raises(InputError, match="all three have"):
        gap_closed(low, {}, high)


def test_repeats_do_not_narrow_the_interval_of_a_share():
    low, high = np.zeros((4, 1)), np.full((4, 1), 10.0)
    value = np.array([[2.0], [4.0], [6.0], [8.0]])
    once = gap_closed(crossed(low), crossed(value), crossed(high))
    often = gap_closed(*(crossed(np.tile(x, (1, 6))) for x in (low, value, high)))
    assert often.share == once.share == 0.5
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1)
