"""Compiled parts that probes of blocks share: what one change to the network does to its output."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.models.backbone import TransformerConfig, apply_block, classify
from tapvit_jax.models.layers import BlockSpec
from tapvit_jax.models.params import Params

Direction = Literal["forward", "reverse"]


@functools.partial(jax.jit, static_argnums=(0, 3))
def run_block(
    spec: BlockSpec, params: Params, x: Float[Array, "b n d"], outputs: int | None
) -> Float[Array, "b m d"]:
    """One block; see `backbone.apply_block`."""
    return apply_block(spec, params, x, outputs=outputs)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(
    config: TransformerConfig, params: Params, x: Float[Array, "b n d"]
) -> Float[Array, "b c"]:
    """The prediction, from what leaves the last block."""
    return jax.nn.log_softmax(classify(config, params, x), axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence_sums(
    direction: Direction,
    devices: int,
    original: Float[Array, "b c"],
    changed: Float[Array, "bv c"],
    real: Float[Array, "b"],
) -> Float[Array, "devices v"]:
    """Sum over the real images on each device of KL(original || changed), or of the reverse.

    Log probabilities; an image's v variants lie together. Source: ours.
    """
    b, c = original.shape
    changed, original = changed.reshape(b, -1, c), original[:, None]
    if direction == "forward":
        kl = jnp.exp(original) * (original - changed)
    else:
        kl = jnp.exp(changed) * (changed - original)
    per_image = kl.sum(axis=2) * real[:, None]
    # Devices are added up at the end: nothing travels between them before.
    return per_image.reshape(devices, b // devices, -1).sum(axis=1)
