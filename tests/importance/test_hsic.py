"""Kernels and HSIC against the formulas in float64."""

import jax
import numpy as np
import pytest

from tapvit_jax.importance.hsic import (
    center,
    centred_by_unit,
    hsic,
    linear_kernel,
    rbf_kernel,
)
from tapvit_jax.importance.hsic import squared_distances as distances_of_centred


def squared_distances(points):
    return distances_of_centred(centred_by_unit(points))


def slow_kernel(points, bandwidth):
    """Mean of five Gaussians between the rows of (images, tokens)."""
    points = np.asarray(points, np.float64)
    squared = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    if bandwidth == "fixed":
        scales = [1, 2, 4, 8, 16]
    else:
        pairs = ~np.eye(len(points), dtype=bool)
        typical = np.sqrt(squared[pairs].mean())
        scales = [typical * factor for factor in (1 / 4, 1 / 2, 1, 2, 4)]
    return np.mean([np.exp(-squared / (2 * s**2)) for s in scales], axis=0)


def slow_hsic(kernel, reference):
    b = len(kernel)
    h = np.eye(b) - np.ones((b, b)) / b
    return np.trace(h @ kernel @ h @ h @ reference @ h)


@pytest.fixture
def points():
    """Units of very different scales, so that every bandwidth matters for one of them."""
    rng = np.random.default_rng(0)
    scales = np.array([0.1, 1.0, 3.0, 20.0])
    return (rng.standard_normal((6, 5, 4)) * scales).astype(np.float32)


@pytest.mark.parametrize("bandwidth", ["fixed", "mean"])
def test_kernels_equal_the_mean_of_five_gaussians(points, bandwidth):
    found = rbf_kernel(squared_distances(points), bandwidth)
    for u in range(points.shape[-1]):
        expected = slow_kernel(points[..., u], bandwidth)
        np.testing.assert_allclose(found[u], expected, rtol=1e-4, atol=1e-6)


def test_mean_bandwidth_does_not_see_the_scale(points):
    small, large = (rbf_kernel(squared_distances(points * s), "mean") for s in (1e-3, 1e3))
    np.testing.assert_allclose(small, large, atol=1e-5)


@pytest.mark.parametrize("bandwidth", ["fixed", "mean"])
def test_images_that_do_not_differ_have_a_kernel_of_ones(bandwidth):
    kernel = rbf_kernel(squared_distances(np.full((4, 3, 2), 7.3, np.float32)), bandwidth)
    np.testing.assert_array_equal(kernel, np.ones((2, 4, 4)))


@pytest.mark.parametrize("scale", [1e-2, 1e-1, 1.0, 10.0])
@pytest.mark.parametrize("bandwidth", ["fixed", "mean"])
def test_kernels_are_as_exact_as_their_distances(scale, bandwidth):
    rng = np.random.default_rng(0)
    squared = np.square(rng.standard_normal((3, 20, 20)) * scale).astype(np.float32)
    squared = squared + np.swapaxes(squared, 1, 2)
    found = jax.jit(rbf_kernel, static_argnums=1)(squared, bandwidth)
    exact = squared.astype(np.float64)
    mean = exact.sum(axis=(1, 2), keepdims=True) / (20 * 19)
    exact = exact / mean if bandwidth == "mean" else exact
    largest = 16.0 if bandwidth == "fixed" else 4.0
    sizes = [largest / 2**i for i in range(5)]
    expected = np.mean([np.exp(-exact / (2 * s**2)) for s in sizes], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_compilers_leave_powers_of_an_exponential_as_they_are(points):
    compiled = jax.jit(rbf_kernel).lower(squared_distances(points)).compile()
    assert compiled.as_text().count(" exponential(") == 2


def test_hsic_is_the_trace_of_the_centred_product(points):
    kernels = np.asarray(rbf_kernel(squared_distances(points)))
    rng = np.random.default_rng(1)
    references = np.asarray(rbf_kernel(squared_distances(rng.standard_normal((6, 5, 3)))))
    found = hsic(kernels[:, None], references[None])
    expected = [[slow_hsic(np.float64(k), np.float64(r)) for r in references] for k in kernels]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_centring_takes_out_all_means(points):
    centred = np.asarray(center(rbf_kernel(squared_distances(points))))
    np.testing.assert_allclose(centred.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(centred.mean(axis=2), 0, atol=1e-6)
    np.testing.assert_allclose(center(centred), centred, atol=1e-6)


def test_linear_kernel():
    points = np.random.default_rng(2).standard_normal((6, 3)) + 5.0
    centred = points - points.mean(axis=0)
    np.testing.assert_allclose(linear_kernel(np.float32(points)), centred @ centred.T, atol=1e-4)


def test_the_order_of_the_images_does_not_matter(points):
    rng = np.random.default_rng(3)
    targets, order = rng.standard_normal((6, 2)).astype(np.float32), rng.permutation(6)

    def score(points, targets):
        return hsic(rbf_kernel(squared_distances(points)), linear_kernel(targets))

    expected = score(points, targets)
    np.testing.assert_allclose(score(points[order], targets[order]), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(score(points[order], targets) / expected - 1).max() > 0.1


def test_distances_survive_a_large_common_offset():
    rng = np.random.default_rng(4)
    points = (rng.standard_normal((6, 5, 3)) + 1e4).astype(np.float32)
    exact = points.astype(np.float64)
    expected = ((exact[:, None] - exact[None]) ** 2).sum(axis=2).transpose(2, 0, 1)
    np.testing.assert_allclose(squared_distances(points), expected, rtol=1e-5, atol=1e-5)
