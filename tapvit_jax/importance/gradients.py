"""A batch's forward and backward pass: activations, reduced as they appear, and gates' gradients.

Letters: b images, c classes.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block,
    apply_block_with_taps,
    block_params,
    classified_tokens,
    classify,
    embed,
    visit_blocks,
)
from tapvit_jax.models.layers import BlockSpec, Gates, Taps
from tapvit_jax.models.params import Params

T = TypeVar("T")

Loss = Literal["label", "entropy", "kl"]

MOST_RESIDUAL_BYTES = 13 * 2**28
"""Beyond this, a batch's images take their backward passes in several parts."""

# Up to here, the parts hand over their activations; kernels then take twice as much on the way.
_MOST_TAP_BYTES = 7 * 2**28
# What a CPU's caches serve best; parts that hand over their activations had better be fewer.
_CACHED_RESIDUAL_BYTES, _HANDING_RESIDUAL_BYTES = 2**28, 2**30


def dense_pass(
    model_config: TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    loss: Loss | None,
    key: Array,
    summarize: Callable[[Taps], T],
    most_bytes: int = MOST_RESIDUAL_BYTES,
    needed: tuple[str, ...] = (),
) -> tuple[Float[Array, "b c"], list[T], dict[str, Gates]]:
    """Logits, what `summarize` makes of every block's taps, and the gates' gradients if asked.

    Kernels need a batch's images together, gradients do not: where a backward pass over all of them
    would keep more than `most_bytes`, parts of the batch take it one after the other. They hand
    over the taps named `needed`, if `summarize` needs no others and they are not too many to keep;
    otherwise a forward pass of its own serves the kernels.
    """
    parts = gradient_parts(model_config, len(images), most_bytes)
    if loss is not None and parts == 1:
        return gate_gradients(model_config, params, images, labels, loss, key, summarize)
    few = _tap_bytes(model_config, len(images)) <= _MOST_TAP_BYTES
    handed = needed if loss is not None and few else ()
    if not handed:
        logits, found = _forward(model_config, params, images, None, summarize)
    if loss is None:
        return logits, found, {}

    def one_part(part: tuple[Array, Array, Array]) -> tuple[Array, list[Taps], dict[str, Gates]]:
        def keep(taps: Taps) -> Taps:
            return {name: taps[name] for name in handed if name in taps}

        return _gate_gradients(model_config, params, *part, loss, keep)

    # Parts draw the classes that the whole batch would have drawn. Where no kernels are wanted
    # either, nothing is needed of the pass before, which spares it.
    given = images, labels, class_noise(key, len(images), model_config)
    rows = [array.reshape(parts, -1, *array.shape[1:]) for array in given]
    stacked = jax.lax.map(one_part, tuple(rows))
    joined, taps, gradients = jax.tree.map(
        lambda leaf: leaf.reshape(len(images), *leaf.shape[2:]), stacked
    )
    if handed:
        logits, found = joined, [summarize(tap) for tap in taps]
    return logits, found, gradients


def part_bytes(*, handing: bool = False) -> int:
    """What one part's backward pass should keep, of parts that hand over activations or do not."""
    if jax.default_backend() != "cpu":
        return MOST_RESIDUAL_BYTES
    return _HANDING_RESIDUAL_BYTES if handing else _CACHED_RESIDUAL_BYTES


def class_noise(key: Array, images: int, config: TransformerConfig) -> Float[Array, "b c"]:
    """Gumbel noise: the highest logit with it added is a class drawn from the prediction."""
    return jax.random.gumbel(key, (images, config.num_classes))


def summed_loss(
    logits: Float[Array, "b c"], labels: Int[Array, "b"], loss: Loss, noise: Float[Array, "b c"]
) -> Float[Array, ""]:
    """Sum over images of -log p of the label, of the entropy, or of -log p of a drawn class.

    `noise` draws the classes, see `class_noise`.
    """
    log_p = jax.nn.log_softmax(logits)
    if loss == "entropy":
        return -(jnp.exp(log_p) * log_p).sum()
    drawn = jnp.argmax(jax.lax.stop_gradient(logits) + noise, axis=-1)
    classes = labels if loss == "label" else drawn
    return -jnp.take_along_axis(log_p, classes[:, None], axis=1).sum()


def gate_gradients(
    config: TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    loss: Loss,
    key: Array,
    summarize: Callable[[Taps], T] = lambda taps: taps,
) -> tuple[Float[Array, "b c"], list[T], dict[str, Gates]]:
    """Logits, a summary of every block's taps, and every image's gradients at gates of one.

    The gradient of an image's loss with respect to a unit's gate is sum over tokens of a dL/da, so
    that its size is the first-order (Taylor) estimate of what removing the unit does to the loss.
    Images do not mix, so that the gradient of the summed loss with respect to per-image gates holds
    every image's own gradient: the vmap of grad, in one backward pass.

    With loss "kl" the loss is -log p_y for a class y drawn from the model's own prediction. The
    divergence of the dense output from the gated one has no gradient at gates of one; its leading
    term is half the Fisher information, whose unbiased estimate is half the square of this
    gradient (as in Fisher pruning, arXiv 1801.05787).

    Source: Taylor importance (arXiv 1906.10771); gates a unit and image, ours.
    """
    noise = class_noise(key, len(images), config)
    return _gate_gradients(config, params, images, labels, noise, loss, summarize)


def _gate_gradients(
    config: TransformerConfig,
    params: Params,
    images: Array,
    labels: Array,
    noise: Array,
    loss: Loss,
    summarize: Callable[[Taps], T],
) -> tuple[Array, list[T], dict[str, Gates]]:
    b = images.shape[0]
    gates = {}
    for i, block in enumerate(config.blocks):
        gate = {}
        if block.attn:
            gate["qk"] = jnp.ones((b, block.num_heads, block.qk_dim))
            gate["vo"] = jnp.ones((b, block.num_heads, block.v_dim))
        if block.mlp:
            gate["mlp"] = jnp.ones((b, block.mlp_dim))
        gates[f"blocks_{i}"] = gate

    def total_loss(gates):
        logits, taps = _forward(config, params, images, gates, summarize)
        return summed_loss(logits, labels, loss, noise), (logits, taps)

    gradients, (logits, taps) = jax.grad(total_loss, has_aux=True)(gates)
    return logits, taps, gradients


def _tap_bytes(config: TransformerConfig, images: int) -> int:
    """At most what the taps of all blocks take, but for attention's own weights."""
    total = 0
    for i, block in enumerate(config.blocks):
        heads = block.num_heads * (2 * block.qk_dim + block.v_dim)
        total += config.block_spec(i).tokens * (block.mlp_dim + heads)
    return 4 * images * total


def gradient_parts(config: TransformerConfig, images: int, most_bytes: int) -> int:
    """Smallest number of equal parts of a batch whose backward passes keep little enough."""
    fine = (n for n in range(1, images + 1) if images % n == 0)
    least = _residual_bytes(config, images) / most_bytes
    return next((n for n in fine if n >= least), images)


def _forward(
    model_config: TransformerConfig,
    params: Params,
    images: Array,
    gates: dict[str, Gates] | None,
    summarize: Callable[[Taps], T],
) -> tuple[Array, list[T]]:
    def visit(spec: BlockSpec, part: Params, x: Array, gate: Gates | None) -> tuple[Array, T]:
        x, taps = apply_block_with_taps(spec, part, x, gate)
        return x, summarize(jax.lax.stop_gradient(taps))

    count = len(model_config.blocks)
    inputs = [None if gates is None else gates[f"blocks_{i}"] for i in range(count)]
    x = embed(model_config, params, images)
    end = classified_tokens(model_config, count - 1) if count else None
    if end is None:
        x, found = visit_blocks(model_config, params, x, visit, inputs)
        return classify(model_config, params, x), found
    # Nothing goes back from tokens that no logit depends on; the last block's taps hold all tokens,
    # and share with its gated pass what does not depend on the gates.
    before = model_config.first_blocks(count - 1)
    x, found = visit_blocks(before, params, x, visit, inputs[:-1])
    spec, part = model_config.block_spec(count - 1), block_params(params, count - 1)
    _, last = visit(spec, part, jax.lax.stop_gradient(x), None)
    x = apply_block(spec, part, x, inputs[-1], end)
    return classify(model_config, params, x), [*found, last]


def _residual_bytes(config: TransformerConfig, images: int) -> int:
    """About what a backward pass keeps of the forward pass."""
    total = 0
    for i, block in enumerate(config.blocks):
        spec = config.block_spec(i)
        heads = block.num_heads * (2 * block.qk_dim + 2 * block.v_dim + 2 * spec.attended)
        total += spec.tokens * (6 * spec.embed_dim + 3 * block.mlp_dim + heads)
    return 4 * images * total
