"""The classes that a device sees, from its mixture."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from tapvit_jax.errors import InputError
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.shares import (
    ClassGaussians,
    class_shares,
    fit_classes,
    mixture_shares,
    rows_for_classes,
    sample_mixture,
)

MEANS = np.array([[4.0, 0.0, 1.0], [0.0, 4.0, -1.0], [-4.0, -4.0, 0.0]])
APART = ClassGaussians(MEANS, np.eye(3))
SHARES = np.array([0.6, 0.3, 0.1])


def covariances(kind, components=3, dim=3):
    """Covariances of one kind near one, none of them a multiple of the others."""
    rng = np.random.default_rng(1)
    factors = np.eye(dim) + 0.3 * np.tril(rng.standard_normal((components, dim, dim)))
    full = factors @ np.swapaxes(factors, 1, 2)
    diagonal = full[:, range(dim), range(dim)]
    return {"full": full, "tied": full[0], "diag": diagonal, "spherical": diagonal[:, 0]}[kind]


def soft_classes(count=400, classes=3, dim=4, seed=0):
    """Features around the classes' means, and probabilities that say which class they are of."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((classes, dim))
    labels = rng.integers(classes, size=count)
    features = centres[labels] + rng.standard_normal((count, dim))
    logits = -np.square(features[:, None] - centres).sum(axis=-1) / 2
    p = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    return features.astype(np.float32), p


def test_classes_are_weighted_means_and_one_covariance():
    x, p = soft_classes()
    found = fit_classes(x, p)
    overall = x.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((4, 4))
    for c in range(3):
        # One image more, like the whole pool.
        mean = (p[:, c] @ x + overall) / (p[:, c].sum() + 1)
        np.testing.assert_allclose(found.means[c], mean, rtol=1e-6)
        scatter += (p[:, c, None] * (x - mean)).T @ (x - mean)
    covariance = scatter / len(x)
    covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))
    np.testing.assert_allclose(found.precision @ covariance, np.eye(4), atol=1e-5)


def test_log_densities_are_those_of_the_gaussians():
    classes = ClassGaussians(MEANS, np.linalg.inv(covariances("tied")))
    points = np.random.default_rng(0).standard_normal((5, 3))
    gaussians = [multivariate_normal(mean, covariances("tied")) for mean in MEANS]
    expected = np.stack([g.logpdf(points) for g in gaussians], axis=1)
    # What all classes have in common is left out.
    difference = classes.log_densities(points) - expected
    np.testing.assert_allclose(difference, np.repeat(difference[:, :1], 3, axis=1), atol=1e-9)


@pytest.mark.parametrize("kind", ["diag", "spherical", "tied", "full"])
def test_samples_have_the_mixtures_moments(kind):
    gmm = Gmm(SHARES, 2 * MEANS, covariances(kind), kind)
    found = sample_mixture(gmm, 40_000, seed=3)
    whole = {"diag": lambda c: np.diag(c), "spherical": lambda c: c * np.eye(3)}.get(kind, np.array)
    parts = [covariances(kind)] * 3 if kind == "tied" else covariances(kind)
    mean = SHARES @ gmm.means
    between = (SHARES[:, None] * (gmm.means - mean)).T @ (gmm.means - mean)
    within = sum(w * whole(part) for w, part in zip(SHARES, parts, strict=True))
    np.testing.assert_allclose(found.mean(axis=0), mean, atol=0.15)
    np.testing.assert_allclose(np.cov(found.T), between + within, rtol=0.03, atol=0.4)
    np.testing.assert_array_equal(found, sample_mixture(gmm, 40_000, seed=3))
    # Around its own mean, every component has its own covariance.
    nearest = np.argmin(np.square(found[:, None] - gmm.means).sum(axis=-1), axis=1)
    for k in range(3):
        np.testing.assert_allclose(np.cov(found[nearest == k].T), whole(parts[k]), atol=0.15)


@pytest.mark.parametrize("kind", ["diag", "spherical", "tied", "full"])
def test_a_mixture_of_the_classes_has_their_shares(kind):
    gmm = Gmm(SHARES, MEANS, covariances(kind), kind)
    np.testing.assert_allclose(mixture_shares(gmm, APART), SHARES, atol=0.03)
    # A device that sees one class alone.
    one = dataclasses.replace(gmm, weights=np.array([0.0, 1.0, 0.0]))
    assert mixture_shares(one, APART)[1] > 0.98


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_every_step_is_more_likely(count, dim, seed):
    rng = np.random.default_rng(seed)
    classes = ClassGaussians(rng.standard_normal((count, dim)), np.eye(dim))
    points = rng.standard_normal((20, dim))
    log_p, before = classes.log_densities(points.astype(np.float32)), -np.inf
    for steps in range(1, 5):
        shares = class_shares(classes, points, steps=steps)
        assert shares.min() >= 0 and abs(shares.sum() - 1) < 1e-9
        likelihood = logsumexp(log_p, axis=1, b=shares).sum()
        assert likelihood >= before - 1e-6
        before = likelihood


def test_one_step_by_hand():
    classes = ClassGaussians(np.array([[0.0], [1.0]]), np.eye(1))
    # Likelihood ratios e^(x - 1/2) of the second class.
    second = 1 / (1 + np.exp(0.5 - np.array([0.5, 2.0])))
    expected = [1 - second.mean(), second.mean()]
    np.testing.assert_allclose(class_shares(classes, [[0.5], [2.0]], steps=1), expected, rtol=1e-6)


def test_large_features_cost_no_digits():
    x, p = soft_classes()
    points = x[:50]
    expected = class_shares(fit_classes(x, p), points)
    found = class_shares(fit_classes(x + 4096.0, p), points + np.float32(4096.0))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_degenerate_classes_stay_finite():
    x, p = soft_classes()
    # A class that is never named, a dimension that is another's copy, one that never varies.
    p = np.concatenate([p, np.zeros((len(p), 1))], axis=1)
    x = np.concatenate([x, x[:, :1], np.ones((len(x), 1), np.float32)], axis=1)
    classes = fit_classes(x, p)
    np.testing.assert_allclose(classes.means[3], x.mean(axis=0), rtol=1e-4)
    shares = class_shares(classes, x)
    assert np.isfinite(shares).all() and abs(shares.sum() - 1) < 1e-9
    # One image of two classes, and dimensions without any variance at all.
    shares = class_shares(fit_classes(np.ones((1, 2)), [[0.5, 0.5]]), np.ones((3, 2)))
    np.testing.assert_allclose(shares, [0.5, 0.5])


def test_some_rows_of_a_large_pool_are_enough():
    assert sorted(rows_for_classes(100, 3)) == list(range(100))
    rows = rows_for_classes(10_000, 3, seed=1)
    assert len(set(rows.tolist())) == len(rows) == 192 and rows.max() < 10_000
    np.testing.assert_array_equal(rows, rows_for_classes(10_000, 3, seed=1))
    assert set(rows.tolist()) != set(rows_for_classes(10_000, 3, seed=2).tolist())


@pytest.mark.parametrize(
    ("features", "probabilities", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)) / 2, "2 rows of features with 3 of probabilities"),
        (np.full((2, 3), np.nan), np.ones((2, 2)) / 2, "NaN or infinity"),
        (np.ones((2, 3)), np.ones((2, 2)), "sum to 1"),
        (np.ones((0, 3)), np.ones((0, 2)), "features: shape"),
    ],
)
def test_bad_classes_are_refused(features, probabilities, message):
    with pytest.raises(InputError, match=message):
        fit_classes(features, probabilities)


@pytest.mark.parametrize(
    ("points", "steps", "message"),
    [
        (np.ones((2, 4)), 3, "points have 4 dimensions, expected the classes' 3"),
        (np.full((2, 3), np.inf), 3, "NaN or infinity"),
        (np.ones((2, 3)), 0, "steps is 0"),
    ],
)
def test_bad_points_are_refused(points, steps, message):
    with pytest.raises(InputError, match=message):
        class_shares(APART, points, steps=steps)


def test_an_improper_mixture_is_refused():
    gmm = Gmm(np.array([0.5, 0.1, 0.1]), MEANS, covariances("diag"), "diag")
    with pytest.raises(InputError, match="weights"):
        mixture_shares(gmm, APART)
    other = Gmm(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), "diag")
    with pytest.raises(InputError, match="points have 2 dimensions, expected the classes' 3"):
        mixture_shares(other, APART)
