"""Moments against sums over rows in float64, and ridge regression against direct solves."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax import distributed
from tapvit_jax.prune import moments
from tapvit_jax.prune.moments import (
    Moments,
    Ridge,
    merge,
    merge_all,
    on_host,
    row_moments,
)

ROWS, FEATURES, TARGETS, PARTS = 12, 4, 2, 3
# Shapes are the same in all examples: parts take their rows by weights of zero, as padding does.
by_part = jax.jit(jax.vmap(row_moments, in_axes=(None, None, 0)))
merge_parts = jax.jit(jax.vmap(merge))


def exact(x, y, weights=None):
    """Moments of rows in float64."""
    weights = np.ones(len(x)) if weights is None else np.float64(weights)
    mean_x, mean_y = (np.average(a, axis=0, weights=weights) for a in (x, y))
    centred = (x - mean_x).T * weights
    return Moments(weights.sum(), mean_x, mean_y, centred @ (x - mean_x), centred @ (y - mean_y))


def draw(seed, rows=ROWS, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, FEATURES)) * [1, 3, 0.1, 1] + offset
    y = x @ rng.standard_normal((FEATURES, TARGETS)) + rng.standard_normal((rows, TARGETS))
    return x.astype(np.float32), y.astype(np.float32), rng.random(rows) + 0.1


def assert_close(found, expected, rtol=1e-4):
    for name, a, b in zip(Moments._fields, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), err_msg=name)


@given(
    seed=st.integers(0, 1000),
    offset=st.sampled_from([0.0, 100.0]),
    parts=st.lists(st.integers(0, 2 * PARTS - 1), min_size=ROWS, max_size=ROWS),
)
def test_any_split_has_the_moments_of_all_rows(seed, offset, parts):
    x, y, weights = draw(seed, offset=offset)
    split = (weights * (np.arange(2 * PARTS)[:, None] == parts)).astype(np.float32)
    # Two batches over a leading axis of devices; some of them get no rows.
    first, second = by_part(x, y, split[:PARTS]), by_part(x, y, split[PARTS:])
    found = on_host(merge_parts(first, second))
    assert found.xx.dtype == np.float64
    # Means of 100 leave about five digits of what is around them.
    assert_close(found, exact(np.float64(x), np.float64(y), weights), 1e-4 if not offset else 5e-4)


def no_moments():
    return row_moments(*(np.zeros(shape) for shape in ((0, FEATURES), (0, TARGETS), (0,))))


def test_no_rows_add_nothing():
    x, y, weights = draw(0)
    whole = exact(x, y, weights)
    none = no_moments()
    for found in (merge(none, whole), merge(whole, none), merge_all([none, whole, none])):
        assert_close(found, whole, 1e-6)
    for leaf in merge(none, none):
        np.testing.assert_array_equal(leaf, 0)


def test_moments_of_features_made_from_features():
    x, y, weights = draw(1)
    whole = exact(x, y, weights)
    kept, mixed = np.array([2, 0]), np.random.default_rng(2).standard_normal((FEATURES, 3))
    assert_close(whole.select(kept), exact(x[:, kept], y, weights), 1e-9)
    assert_close(whole.project(mixed), exact(x @ mixed, y, weights), 1e-9)
    assert_close(whole.with_linear_target(mixed), exact(x, x @ mixed, weights), 1e-9)


def of_processes(monkeypatch, parts):
    """What every process gets where each holds one of `parts`."""
    sent = []
    monkeypatch.setattr(distributed, "process_count", lambda: len(parts))
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tree: sent.append(tree) or tree)
    for part in parts:
        on_host(part)
    total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *sent)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tree: total)
    return on_host(parts[0])


def test_processes_add_up(monkeypatch):
    x, y, weights = draw(3, offset=10.0)
    parts = [exact(x[rows], y[rows], weights[rows]) for rows in (slice(5), slice(5, None))]
    parts = [jax.tree.map(lambda leaf: np.asarray(leaf)[None], part) for part in parts]
    assert_close(of_processes(monkeypatch, parts), exact(x, y, weights), 1e-9)


def test_processes_without_rows_have_moments_of_none(monkeypatch):
    none = jax.tree.map(lambda leaf: leaf[None], no_moments())
    for leaf in of_processes(monkeypatch, [none, none]):
        np.testing.assert_array_equal(leaf, 0)


def fit(x, y, penalty, centre):
    """Ridge regression as least squares with rows for the penalty."""
    if np.isinf(penalty):
        return centre, y.mean(axis=0) - x.mean(axis=0) @ centre
    centred = x - x.mean(axis=0)
    strength = np.sqrt(penalty * np.square(centred).sum() / x.shape[1])
    rows = np.concatenate([centred, strength * np.eye(x.shape[1])])
    aim = np.concatenate([y - y.mean(axis=0), strength * centre])
    found = np.linalg.lstsq(rows, aim, rcond=None)[0]
    return found, y.mean(axis=0) - x.mean(axis=0) @ found


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 10.0, np.inf])
def test_ridge_of_a_given_penalty_is_least_squares(monkeypatch, penalty):
    monkeypatch.setattr(moments, "PENALTIES", (penalty,))
    x, y, _ = draw(4, rows=30)
    centre = np.random.default_rng(5).standard_normal((FEATURES, TARGETS))
    folds = [exact(x[::2], y[::2]), exact(x[1::2], y[1::2])]
    for found, expected in zip(
        Ridge(folds).solve(folds, centre), fit(x, y, penalty, centre), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_without_held_out_rows_the_penalty_is_a_small_one():
    x, y, _ = draw(6)
    centre = np.zeros((FEATURES, TARGETS))
    whole, none = exact(x, y), no_moments()
    for folds in ([whole], [none, whole]):
        found, _ = Ridge(folds).solve(folds, centre)
        np.testing.assert_allclose(found, fit(x, y, 1e-2, centre)[0], atol=1e-6)


def best_penalty(x, y, centre):
    """The penalty with which each half predicts the other best."""
    errors = []
    for penalty in moments.PENALTIES:
        error = 0.0
        for own, other in ((0, 1), (1, 0)):
            weights, bias = fit(x[own::2], y[own::2], penalty, centre)
            error += np.square(x[other::2] @ weights + bias - y[other::2]).sum()
        errors.append(error)
    return moments.PENALTIES[int(np.argmin(errors))]


def test_the_penalty_is_the_one_that_predicts_held_out_rows_best():
    chosen = set()
    for seed, noise in enumerate((0.0, 0.3, 1.0, 3.0, 10.0, 30.0)):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((15, 6)) + 1.0
        truth, centre = rng.standard_normal((2, 6, TARGETS))
        y = x @ truth + noise * rng.standard_normal((15, TARGETS)) + 5.0
        folds = [exact(x[::2], y[::2]), exact(x[1::2], y[1::2])]
        weights, bias = Ridge(folds).solve(folds, centre)
        chosen.add(penalty := best_penalty(x, y, centre))
        expected = fit(x, y, penalty, centre)
        np.testing.assert_allclose(weights, expected[0], atol=1e-6)
        np.testing.assert_allclose(bias, expected[1], atol=1e-6)
    assert len(chosen) >= 3 and np.inf in chosen


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 12), constant=st.sampled_from([0.0, -0.17]))
def test_degenerate_features_do_no_harm(seed, rows, constant):
    """A dead feature, a feature twice, and fewer rows than features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, 6))
    x[:, 1], x[:, 3] = constant, x[:, 2]
    y = rng.standard_normal((ROWS, TARGETS))
    centre = rng.standard_normal((6, TARGETS))
    index = np.arange(ROWS)
    halves = np.float32([(index < rows) & (index % 2 == i) for i in (0, 1)])
    # In float32, as they are streamed.
    folds = [on_host(by_part(x, y, half[None])) for half in halves]
    weights, bias = Ridge(folds).solve(folds, centre)
    assert np.isfinite(weights).all() and np.isfinite(bias).all()
    # Rounding of a mean that is not zero makes a feature of its own, of nearly no size.
    np.testing.assert_allclose(weights[1], centre[1], atol=1e-6 + 0.1 * abs(constant))
    np.testing.assert_allclose(weights[2] - centre[2], weights[3] - centre[3], atol=1e-3)
    total = merge_all(folds)
    np.testing.assert_allclose(bias, total.mean_y - total.mean_x @ weights)


def test_features_that_are_all_dead_leave_everything_at_the_centre():
    y = np.random.default_rng(0).standard_normal((6, TARGETS))
    centre = np.ones((3, TARGETS))
    folds = [exact(np.full((3, 3), 7.0), half) for half in (y[:3], y[3:])]
    weights, bias = Ridge(folds).solve(folds, centre)
    np.testing.assert_array_equal(weights, centre)
    np.testing.assert_allclose(bias, y.mean(axis=0) - 21)
