"""What criteria collect from batches: moments of activations, gradients at gates and of weights.

Letters: b images, n tokens, w windows, m tokens of a window, h heads, k dims of a head, f MLP
hidden.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tapvit_jax.importance.gradients import (
    Loss,
    class_noise,
    dense_pass,
    gradient_parts,
    part_bytes,
    summed_loss,
)
from tapvit_jax.importance.streaming import Statistic, Sums
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.layers import Taps
from tapvit_jax.models.params import Params, flatten
from tapvit_jax.prune.units import unit_key, unit_table

Moments = dict[str, Float[Array, "..."]]
"""Of one group's units: "count" of values, their "mean", and "spread", the sum of (x - mean)^2."""

Power = Literal[1, 2]


def group_sums(config: TransformerConfig, tree: Params) -> dict[str, Float[Array, "..."]]:
    """Sum the entries of a parameter-shaped tree over each unit's members, by group key.

    Kinds mlp, qk, vo and head; a unit's members are what the unit table says. Source: ours.
    """
    leaves = flatten(tree)
    sums: dict[str, Array] = {}
    for group in unit_table(config):
        if not group.shape:
            continue
        for member in group.members:
            leaf = leaves[member.path]
            others = tuple(axis for axis in range(leaf.ndim) if axis not in member.axes)
            sums[group.key] = sums.get(group.key, 0.0) + leaf.sum(axis=others)
    return sums


def _moments(x: Float[Array, "t *units"]) -> Moments:
    x = x.astype(jnp.float32)
    mean = x.mean(axis=0)
    spread = jnp.square(x - mean).sum(axis=0)
    return {"count": jnp.float32(len(x)), "mean": mean, "spread": spread}


def _pair_moments(q: Float[Array, "w m h k"], k: Float[Array, "w m h k"]) -> Moments:
    """Moments of q_n k_m, a dim's part of the logits, over all pairs of tokens of a window.

    With q = q' + mean(q) and k alike, the deviation of a product from the overall mean falls into
    four parts that are orthogonal over the pairs: nothing cancels.
    """
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    q_mean, k_mean = q.mean(axis=1), k.mean(axis=1)
    q_spread = jnp.square(q - q_mean[:, None]).sum(axis=1)
    k_spread = jnp.square(k - k_mean[:, None]).sum(axis=1)
    windows, m = q.shape[:2]
    products = q_mean * k_mean
    mean = products.mean(axis=0)
    spread = (
        m**2 * jnp.square(products - mean)
        + m * (jnp.square(q_mean) * k_spread + jnp.square(k_mean) * q_spread)
        + q_spread * k_spread
    )
    return {
        "count": jnp.float32(windows * m**2),
        "mean": mean,
        "spread": spread.sum(axis=0),
    }


def _tap_moments(taps: Taps) -> dict[str, Moments]:
    found = {}
    if "vo" in taps:
        q, k, out = (
            taps[name].reshape(math.prod(taps[name].shape[:-3]), *taps[name].shape[-3:])
            for name in ("q", "k", "vo")
        )
        found["qk"] = _pair_moments(q, k)
        found["vo"] = _moments(out.reshape(out.shape[0] * out.shape[1], *out.shape[2:]))
    if "mlp" in taps:
        hidden = taps["mlp"]
        # No -1: a width of zero has no size to infer from.
        found["mlp"] = _moments(hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]))
    return found


def _batch_moments(
    config: TransformerConfig, params: Params, images: Array, labels: Array, key: Array
) -> dict[str, Moments]:
    _, blocks, _ = dense_pass(config, params, images, labels, None, key, _tap_moments)
    return {
        unit_key(i, kind): moments
        for i, block in enumerate(blocks)
        for kind, moments in block.items()
    }


def _merge_moments(
    total: dict[str, Moments], new: dict[str, Moments], weight: Float[Array, ""]
) -> dict[str, Moments]:
    """Chan's update: no difference of large sums, however far the mean lies from zero."""

    def merge(a: Moments, b: Moments) -> Moments:
        added = weight * b["count"]
        count = a["count"] + added
        share = added / jnp.maximum(count, 1.0)

        def shaped(x: Array) -> Array:
            return x.reshape(x.shape + (1,) * (a["mean"].ndim - x.ndim))

        shift = b["mean"] - a["mean"]
        return {
            "count": count,
            "mean": a["mean"] + shaped(share) * shift,
            "spread": a["spread"]
            + weight * b["spread"]
            + jnp.square(shift) * shaped(share * a["count"]),
        }

    return {key: merge(total[key], new[key]) for key in total}


def _moment_sums(total: dict[str, Moments]) -> dict[str, Moments]:
    sums = {}
    for key, found in total.items():
        mean = found["mean"]
        count = found["count"].reshape(-1, *(1,) * (mean.ndim - 1))
        squares = found["spread"] + count * mean**2
        sums[key] = {"count": found["count"], "sum": count * mean, "squares": squares}
    return sums


MOMENTS = Statistic(_batch_moments, _merge_moments, _moment_sums)
"""By group: "count", "sum" and "squares" of hidden units, head outputs, and logits of one qk dim.

Windows count as further images. The logits of a dim are the products q_n k_m of all pairs of tokens
that attend to each other, before the softmax scale.
"""


def mean_square(moments: Moments) -> Float[np.ndarray, "..."]:
    """E[x^2] from the sums of `MOMENTS`."""
    return moments["squares"] / moments["count"]


def variance(moments: Moments) -> Float[np.ndarray, "..."]:
    """E[(x - E[x])^2] from the sums of `MOMENTS`."""
    mean = moments["sum"] / moments["count"]
    return np.maximum(mean_square(moments) - mean**2, 0.0)


@functools.cache
def gate_statistic(loss: Loss, power: Power) -> Statistic:
    """Sums over images of |g| or g^2, with g an image's gradient at each unit's gate of one.

    The gate of a head multiplies all its value dims, so that its gradient is the sum of theirs.
    Also "count", the images. Source: see `gradients.gate_gradients`.
    """

    def of_batch(
        config: TransformerConfig, params: Params, images: Array, labels: Array, key: Array
    ) -> Sums:
        _, _, gates = dense_pass(
            config, params, images, labels, loss, key, lambda taps: (), part_bytes()
        )
        sums = {"count": jnp.float32(len(images))}
        for i, block in enumerate(config.blocks):
            found = dict(gates[f"blocks_{i}"])
            if block.attn:
                found["head"] = found["vo"].sum(axis=-1)
            for kind, gradient in found.items():
                sized = jnp.abs(gradient) if power == 1 else jnp.square(gradient)
                sums[unit_key(i, kind)] = sized.sum(axis=0)
        return sums

    return Statistic(of_batch)


def _weight_gradients(
    config: TransformerConfig,
    loss: Loss,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    key: Array,
) -> Params:
    """The gradient of the mean loss, times the parameters, entry by entry.

    Summed over parts of the batch, which bound what the backward pass keeps.
    """

    def add_part(total: Params, part: tuple[Array, Array, Array]) -> tuple[Params, None]:
        images, labels, noise = part

        def part_loss(params: Params) -> Array:
            logits, _, _ = dense_pass(config, params, images, labels, None, key, lambda taps: ())
            return summed_loss(logits, labels, loss, noise)

        return jax.tree.map(jnp.add, total, jax.grad(part_loss)(params)), None

    parts = gradient_parts(config, len(images), part_bytes())
    given = images, labels, class_noise(key, len(images), config)
    rows = tuple(array.reshape(parts, -1, *array.shape[1:]) for array in given)
    total, _ = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), rows)
    return jax.tree.map(lambda leaf, gradient: leaf * gradient / len(images), params, total)


@functools.cache
def fisher_statistic(loss: Loss) -> Statistic:
    """Sum over batches of (sum over a unit's weights of w dL/dw)^2, L the batch's mean loss.

    Also "count", the batches. Source: NViT (arXiv 2110.04869).
    """

    def of_batch(
        config: TransformerConfig, params: Params, images: Array, labels: Array, key: Array
    ) -> Sums:
        products = _weight_gradients(config, loss, params, images, labels, key)
        sums = jax.tree.map(jnp.square, group_sums(config, products))
        return sums | {"count": jnp.float32(1.0)}

    return Statistic(of_batch)


@functools.cache
def hessian_statistic(loss: Loss) -> Statistic:
    """Sum over images of the sum over a unit's weights of (w dl/dw)^2 / 2, l the image's loss.

    Image after image, so that one gradient is held at a time. Also "count", the images. Source: the
    Fisher diagonal in place of the Hessian's, in optimal brain damage (LeCun et al., 1989).
    """

    def of_batch(
        config: TransformerConfig, params: Params, images: Array, labels: Array, key: Array
    ) -> Sums:
        def add_image(sums: Sums, image: tuple[Array, Array, Array]) -> tuple[Sums, None]:
            x, label, key = image
            products = _weight_gradients(config, loss, params, x[None], label[None], key)
            halves = jax.tree.map(lambda p: jnp.square(p) / 2, products)
            return jax.tree.map(jnp.add, sums, group_sums(config, halves)), None

        shapes = {group.key: group.shape for group in unit_table(config) if group.shape}
        sums = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
        keys = jax.random.split(key, len(images))
        sums, _ = jax.lax.scan(add_image, sums, (images, labels, keys))
        return sums | {"count": jnp.float32(len(images))}

    return Statistic(of_batch)
