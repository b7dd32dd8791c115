"""Softmax and GELU as the blocks compute them, against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from tapvit_jax.models.backbone import apply
from tapvit_jax.models.layers import attend, exact_gelu

# What rounding to the values' 8 bits leaves of a weighted mean, and of its gradients.
BF16 = 2e-2


def attention_in_float64(logits, values, gradient):
    """The weighted values, and the gradients of logits and values."""
    logits, values, gradient = (np.float64(x) for x in (logits, values, gradient))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = gradient @ np.swapaxes(values, -1, -2)
    mean = (weights * of_weights).sum(axis=-1, keepdims=True)
    of_values = np.swapaxes(weights, -1, -2) @ gradient
    return weights @ values, weights * (of_weights - mean), of_values


def drawn(queries, spread, dtype=np.float32):
    rng = np.random.default_rng(0)
    logits = spread * rng.standard_normal((2, 3, queries, 7), np.float32)
    values = rng.standard_normal((2, 3, 7, 4), np.float32)
    gradient = rng.standard_normal((2, 3, queries, 4), np.float32)
    return jnp.asarray(logits), jnp.asarray(values, dtype), jnp.asarray(gradient, dtype)


def close(found, expected, tolerance):
    scale = max(np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(np.float64(found), expected, atol=tolerance * scale)


@pytest.mark.parametrize("queries", [7, 1])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
def test_attention_and_its_gradients(queries, spread):
    logits, values, gradient = drawn(queries, spread)
    found, pull_back = jax.vjp(attend, logits, values)
    expected = attention_in_float64(logits, values, gradient)
    for ours, theirs in zip((found, *pull_back(gradient)), expected, strict=True):
        close(ours, theirs, 1e-6)


def test_attention_weighs_masked_pairs_with_nothing():
    logits, values, gradient = drawn(7, 1.0)
    logits = logits.at[..., 3].set(-jnp.inf)
    found, pull_back = jax.vjp(attend, logits, values.at[..., 3, :].set(1e30))
    expected = attention_in_float64(logits, values, gradient)
    close(found, expected[0], 1e-6)
    of_logits, of_values = pull_back(gradient)
    assert not of_values[..., 3, :].any()
    assert not of_logits[..., 3].any()


def test_attention_in_bfloat16():
    logits, values, gradient = drawn(7, 1.0, jnp.bfloat16)
    found, pull_back = jax.vjp(attend, logits, values)
    of_logits, of_values = pull_back(gradient)
    # What follows a product has the values' dtype; logits stay in float32.
    assert (found.dtype, of_values.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert of_logits.dtype == jnp.float32
    expected = attention_in_float64(logits, values, gradient)
    for ours, theirs in zip((found, of_logits, of_values), expected, strict=True):
        close(ours, theirs, BF16)


def test_gelu_and_its_derivative():
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e30, -1e4, 1e4, 1e30]]).astype(np.float32)
    found, pull_back = jax.vjp(exact_gelu, jnp.asarray(x))
    (slope,) = pull_back(jnp.ones_like(x))
    wide = np.float64(x)
    density = np.exp(-0.5 * wide**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(found, wide * ndtr(wide), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, ndtr(wide) + wide * density, rtol=1e-6, atol=1e-6)


def test_gelu_in_bfloat16_rounds_once():
    x = jnp.linspace(-6, 6, 401).astype(jnp.bfloat16)
    wide = exact_gelu(x.astype(jnp.float32))
    np.testing.assert_array_equal(exact_gelu(x), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("family", ["tiny_model", "swin_model"])
def test_standard_operations_give_the_same(request, images, family):
    model = request.getfixturevalue(family)
    found = apply(model.config, model.params, images)
    standard = apply(model.config, model.params, images, standard_ops=True)
    np.testing.assert_allclose(found, standard, rtol=1e-5, atol=1e-5)
