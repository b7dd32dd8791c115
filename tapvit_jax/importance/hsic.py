"""Kernels and the Hilbert-Schmidt independence criterion between units and targets.

Every unit is a cloud of b points, one an image, with n coordinates, one a token. All Gram matrices
of a layer come from one batched matrix product, and all bandwidths from two exponentials.

Letters: b images, n tokens, u units.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Bandwidth = Literal["fixed", "mean"]

# The first of the bandwidths, from the largest on, that an exponential serves, and how many: every
# fourth power makes four times its rounding.
_EXPONENTIALS = ((0, 2), (2, 3))
_NUM_BANDWIDTHS = sum(count for _, count in _EXPONENTIALS)
_LARGEST_FIXED = 16.0
_LARGEST_RELATIVE = 4.0


def centred_by_unit(points: Float[Array, "b n u"]) -> Float[Array, "u n b"]:
    """Points with units first and images last, their batch mean taken out, in float32.

    Distances do not see the mean, float32 cancellation does. In this order a unit's Gram matrix is
    a product of contiguous matrices, and all reductions over images run along memory.
    """
    moved = jnp.transpose(points.astype(jnp.float32), (2, 1, 0))
    # Without the barrier the compiler moves the transposition into every use, at several times the
    # cost.
    moved = jax.lax.optimization_barrier(moved)
    return moved - moved.mean(axis=-1, keepdims=True)


def squared_distances(centred: Float[Array, "u n b"]) -> Float[Array, "u b b"]:
    """Squared distances between images, for each unit of `centred_by_unit`."""
    gram = _gram(centred)
    # A sum: the diagonal itself would be gathered anew for every entry. With it, images are
    # at exactly no distance from themselves.
    norms = jnp.where(jnp.eye(gram.shape[-1], dtype=bool), gram, 0.0).sum(axis=-1)
    return jnp.maximum(norms[:, :, None] + norms[:, None, :] - 2 * gram, 0.0)


def _gram(centred: Float[Array, "u n b"]) -> Float[Array, "u b b"]:
    if jax.default_backend() != "cpu":
        return jnp.einsum("unb,unc->ubc", centred, centred, precision=jax.lax.Precision.HIGHEST)
    # The CPU compiler makes products of small matrices out of this, on all cores, and takes the
    # mean out on the way; the einsum it runs unit by unit on one core.
    return (centred[:, :, :, None] * centred[:, :, None, :]).sum(axis=1)


def rbf_kernel(
    squared: Float[Array, "*u b b"], bandwidth: Bandwidth = "fixed"
) -> Float[Array, "*u b b"]:
    """Mean of five Gaussian kernels whose bandwidths double.

        K = mean over s of exp(-squared / (2 s^2)),  s in {1, 2, 4, 8, 16}

    "fixed" uses these bandwidths (TAP-ViTs, arXiv 2601.02437). "mean" uses {1/4 .. 4} times the
    root of each unit's mean squared distance, so that no unit saturates just because its
    activations are large or small (ours; the usual median would sort b^2 numbers a unit). Halving s
    raises the kernel to the fourth power, so that two exponentials serve all five.
    """
    if bandwidth == "mean":
        b = squared.shape[-1]
        mean = squared.sum(axis=(-2, -1), keepdims=True) / (b * (b - 1))
        squared = squared / jnp.where(mean > 0, mean, 1.0)
    largest = _LARGEST_FIXED if bandwidth == "fixed" else _LARGEST_RELATIVE
    total = jnp.zeros((), squared.dtype)
    for first, count in _EXPONENTIALS:
        # The bound changes no kernel. Without it the compiler turns every power of an exponential
        # into an exponential of its own, at several times the cost.
        exponent = squared * (-(4.0**first) / (2.0 * largest**2))
        kernel = jnp.maximum(jnp.exp(exponent), jnp.finfo(jnp.float32).tiny)
        total = total + kernel
        for _ in range(count - 1):
            kernel = jnp.square(jnp.square(kernel))
            total = total + kernel
    return total / _NUM_BANDWIDTHS


def center(kernel: Float[Array, "*u b b"]) -> Float[Array, "*u b b"]:
    """Doubly centred kernel: column and row means out, grand mean back in."""
    return (
        kernel
        - kernel.mean(axis=-2, keepdims=True)
        - kernel.mean(axis=-1, keepdims=True)
        + kernel.mean(axis=(-2, -1), keepdims=True)
    )


def hsic(
    kernels: Float[Array, "*u b b"], references: Float[Array, "*#u b b"]
) -> Float[Array, "*u"]:
    """HSIC of every kernel with its reference kernel, without the 1 / (b - 1)^2.

        HSIC(K, L) = trace(cen(K) cen(L)) = <K, cen(L)>

    Centring is a projection, so that only the few references need it; they broadcast against the
    kernels. A plain sum, which the compiler fuses with the kernel's exponential: a matrix product
    would have to write the kernels to memory first.
    """
    # A constant has no part in it: without one, units that hardly vary keep their digits.
    return ((kernels - 1.0) * center(references)).sum(axis=(-2, -1))


def linear_kernel(points: Float[Array, "b c"]) -> Float[Array, "b b"]:
    """Gram matrix of points whose batch mean is taken out: P' P'^T."""
    points = points.astype(jnp.float32)
    points = points - points.mean(axis=0)
    return jnp.matmul(points, points.T, precision=jax.lax.Precision.HIGHEST)
