"""Neuron importance: composite (relevance, redundancy, activation, gradient) and Taylor scores.

A batch takes one jitted pass through the model, then one jitted program per block that scores all
its units at once; blocks of equal widths share that program. Only sums travel from batch to batch,
and nothing is read back to the host before the end.

Letters: b images, n tokens, h heads, k dims of a head, f MLP hidden, u units, c classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tapvit_jax.errors import InputError
from tapvit_jax.importance.hsic import (
    Bandwidth,
    hsic,
    linear_kernel,
    rbf_kernel,
    squared_distances,
)
from tapvit_jax.models.backbone import TransformerConfig, apply_with_taps, check_prunable
from tapvit_jax.models.layers import Gates, Taps
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import unit_key
from tapvit_jax.structs import check_choices

Scores = dict[str, Float[np.ndarray, "..."]]
"""Scores by group key of the unit table; higher means keep."""

Terms = dict[str, dict[str, Float[Array, "..."]]]
Loss = Literal["label", "entropy", "kl"]
# Relative to a unit's largest value: what float32 leaves of a coordinate that should be constant.
_ROUNDING = 1e-6
Method = Literal["tap", "tap_published", "taylor"]


@dataclasses.dataclass(frozen=True)
class TermWeights:
    """Weights of the composite score's terms, each scaled to [0, 1] before."""

    relevance: float
    redundancy: float
    activation: float
    gradient: float = 0.0

    def __post_init__(self):
        values = dataclasses.astuple(self)
        if min(values) < 0 or max(values) <= 0:
            raise InputError(f"term weights are {values}, expected none negative and one positive")


@dataclasses.dataclass(frozen=True)
class NeuronConfig:
    """How units are scored. The defaults mend the published quirks; `as_published` has them all.

    Attributes:
      mlp: weights of the terms for MLP units.
      attn: weights of the terms for attention dims.
      standardize: divide each coordinate by its (unbiased) standard deviation over the batch before
        the relevance kernel; coordinates that vary by no more than rounding count as constant. As
        published only the mean is divided, which changes nothing.
      bandwidth: kernel bandwidths, see `hsic.rbf_kernel`.
      scale: scale the terms to [0, 1] in every batch ("batch", as published), which makes a batch
        of odd images count as much as any other, or once over all batches ("total").
      couple_qk_vo: one index set for queries, keys and values, scored on the values (as published),
        or queries and keys scored on their own.
      loss: what the gradient term differentiates: cross-entropy with the label, the entropy of the
        prediction, or the divergence from the dense output (the last two need no labels).
      max_batches: batches beyond these are not read.
    """

    mlp: TermWeights = TermWeights(relevance=0.1, redundancy=0.1, activation=0.3, gradient=0.5)
    attn: TermWeights = TermWeights(relevance=0.1, redundancy=0.1, activation=0.3, gradient=0.5)
    standardize: bool = True
    bandwidth: Bandwidth = "mean"
    scale: Literal["batch", "total"] = "total"
    couple_qk_vo: bool = False
    loss: Loss = "kl"
    max_batches: int = 50

    def __post_init__(self):
        check_choices(self)
        if self.max_batches < 1:
            raise InputError(f"max_batches is {self.max_batches}, expected 1 or more")

    @classmethod
    def as_published(cls) -> "NeuronConfig":
        """What the authors' code of TAP-ViTs (arXiv 2601.02437) computes."""
        return cls(
            mlp=TermWeights(relevance=0.1, redundancy=0.1, activation=0.8),
            attn=TermWeights(relevance=0.8, redundancy=0.1, activation=0.1),
            standardize=False,
            bandwidth="fixed",
            scale="batch",
            couple_qk_vo=True,
        )

    @classmethod
    def taylor(cls, loss: Loss = "kl") -> "NeuronConfig":
        """The gradient term on its own."""
        only = TermWeights(relevance=0.0, redundancy=0.0, activation=0.0, gradient=1.0)
        return cls(mlp=only, attn=only, loss=loss)

    @classmethod
    def of_method(cls, method: Method) -> "NeuronConfig":
        """The config behind a method's name.

        Raises:
          InputError: an unknown name.
        """
        methods = {"tap": cls, "tap_published": cls.as_published, "taylor": cls.taylor}
        if method not in methods:
            raise InputError(f"method is {method!r}, expected one of {', '.join(methods)}")
        return methods[method]()

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed at all."""
        return self.mlp.gradient > 0 or self.attn.gradient > 0


def min_max(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scale to [0, 1] over all entries; equal entries become 0."""
    if values.size == 0:
        return values
    low, high = values.min(), values.max()
    return jnp.where(high > low, (values - low) / jnp.where(high > low, high - low, 1.0), 0.0)


def neuron_importance(
    model: Model,
    batches: Iterable[Any],
    method: Method = "tap",
    *,
    config: NeuronConfig | None = None,
    seed: int = 0,
) -> Scores:
    """Score every prunable dim and head of a model on a metric dataset.

        composite = w_rel scaled(relevance) + w_red (1 - scaled(redundancy))
                  + w_act scaled(activation) + w_grad scaled(gradient)

    Args:
      model: the dense model.
      batches: image batches (b, s, s, ch), or pairs (images, labels), or dicts with "image" and,
        where the loss asks for it, "label"; a "mask" key drops padding rows.
      method: "tap" (composite, quirks mended), "tap_published", or "taylor".
      config: overrides what `method` stands for.
      seed: for the classes that loss "kl" samples.

    Returns:
      Scores by unit group: "blocks_i/mlp" (f,), "blocks_i/qk" and "blocks_i/vo" (h, k), and
      "blocks_i/head" (h,), the mean of the head's value dims.

    Raises:
      InputError: no batch of two images or more, labels missing for loss "label", or coupled scores
        of unequal query-key and value dims.

    Source: TAP-ViTs (arXiv 2601.02437), with the gradient term and the fixes ours.
    """
    check_prunable(model.config)
    config = config or NeuronConfig.of_method(method)
    if config.couple_qk_vo:
        _check_coupling(model.config)
    key = jax.random.key(seed)
    sums: Terms | None = None
    for i, batch in enumerate(itertools.islice(batches, config.max_batches)):
        images, labels = unpack_batch(batch)
        if len(images) < 2:
            # A trailing batch of one image has no distances, so it says nothing about units.
            continue
        if config.loss == "label" and config.needs_gradient and not _labelled(labels):
            raise InputError("loss 'label' needs batches with labels")
        labels = np.zeros(len(images), np.int32) if labels is None else labels
        found = batch_terms(
            model.config, config, model.params, images, labels, jax.random.fold_in(key, i)
        )
        if config.scale == "batch":
            found = {unit: {"score": compose(config, unit, t)} for unit, t in found.items()}
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    if sums is None:
        raise InputError("neuron importance needs at least one batch of two images or more")
    if config.scale == "batch":
        scores = {unit: terms["score"] for unit, terms in sums.items()}
    else:
        scores = {unit: compose(config, unit, terms) for unit, terms in sums.items()}
    return _finish(model.config, config, jax.device_get(scores))


def unpack_batch(batch: Any) -> tuple[Float[np.ndarray, "b s s ch"], Int[np.ndarray, "b"] | None]:
    """Split a batch (array, pair, or dict with an optional padding mask) into images and labels."""
    if isinstance(batch, Mapping):
        images, labels = batch["image"], batch.get("label")
        if "mask" in batch:
            real = np.asarray(batch["mask"]) > 0
            if not real.all():
                images = images[real]
                labels = None if labels is None else labels[real]
        return images, labels
    if isinstance(batch, tuple | list):
        return batch[0], batch[1]
    return batch, None


def _labelled(labels: Int[np.ndarray, "b"] | None) -> bool:
    return labels is not None and bool((np.asarray(labels) >= 0).all())


def _check_coupling(model_config: TransformerConfig) -> None:
    for i, block in enumerate(model_config.blocks):
        if block.attn and block.qk_dim != block.v_dim:
            raise InputError(
                f"blocks_{i}: coupled scores need equal qk_dim and v_dim, "
                f"found {block.qk_dim} and {block.v_dim}"
            )


def _finish(model_config: TransformerConfig, config: NeuronConfig, scores: Scores) -> Scores:
    result = {key: np.asarray(value) for key, value in scores.items()}
    for i, block in enumerate(model_config.blocks):
        if block.attn:
            vo = result[unit_key(i, "vo")]
            if config.couple_qk_vo:
                result[unit_key(i, "qk")] = vo
            result[unit_key(i, "head")] = vo.mean(axis=1) if vo.shape[1] else np.zeros(len(vo))
    return result


def compose(
    config: NeuronConfig, unit: str, terms: dict[str, Float[Array, "..."]]
) -> Float[Array, "..."]:
    """Weighted sum of a group's terms, each scaled to [0, 1]; redundancy counts against a unit."""
    return _compose(config.mlp if unit.endswith("/mlp") else config.attn, terms)


@functools.partial(jax.jit, static_argnums=0)
def _compose(weights: TermWeights, terms: dict[str, Array]) -> Array:
    total = jnp.zeros(())
    for name, values in terms.items():
        scaled = min_max(values)
        scaled = 1.0 - scaled if name == "redundancy" else scaled
        total = total + getattr(weights, name) * scaled
    return total


def batch_terms(
    model_config: TransformerConfig,
    config: NeuronConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    key: Array,
) -> Terms:
    """The terms of every unit on one batch, not yet scaled; terms of weight 0 are left out."""
    loss = config.loss if config.needs_gradient else None
    logits, taps, gradients = _run_model(model_config, loss, params, images, labels, key)
    terms: Terms = {}
    for i in range(len(model_config.blocks)):
        name = f"blocks_{i}"
        found = _block_terms(config, logits, taps[name], gradients.get(name, {}))
        terms |= {unit_key(i, kind): values for kind, values in found.items()}
    return terms


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_model(
    model_config: TransformerConfig,
    loss: Loss | None,
    params: Params,
    images: Array,
    labels: Array,
    key: Array,
) -> tuple[Array, dict[str, Taps], dict[str, Gates]]:
    if loss is not None:
        return gate_gradients(model_config, params, images, labels, loss, key)
    return *apply_with_taps(model_config, params, images), {}


@functools.partial(jax.jit, static_argnums=0)
def _block_terms(
    config: NeuronConfig, logits: Float[Array, "b c"], tap: Taps, gradients: Gates
) -> dict[str, dict[str, Float[Array, "..."]]]:
    target = linear_kernel(jax.nn.softmax(logits, axis=-1))[None]
    found = {}
    if "vo" in tap:
        found["vo"] = _attention_terms(config, tap["vo"], target)
        if not config.couple_qk_vo:
            found["qk"] = _query_key_terms(config, tap, target)
    if "mlp" in tap:
        found["mlp"] = _mlp_terms(config, tap["mlp"], target)
    for kind, term in found.items():
        weights = config.mlp if kind == "mlp" else config.attn
        if weights.gradient > 0:
            term["gradient"] = _summed_gradient(config, gradients[kind])
        found[kind] = {n: values for n, values in term.items() if getattr(weights, n) > 0}
    return found


def _relevance_kernel(
    config: NeuronConfig, points: Float[Array, "b n u"], shared: Float[Array, "u b b"]
) -> Float[Array, "u b b"]:
    if not config.standardize:
        return shared
    # Constant coordinates are common (the first block's class token, empty image borders): divided
    # by the deviation that rounding leaves them, they would drown all others.
    points = points.astype(jnp.float32)
    rounding = _ROUNDING * jnp.abs(points).max(axis=(0, 1))
    points = points - points.mean(axis=0)
    deviation = jnp.sqrt(jnp.square(points).sum(axis=0) / (points.shape[0] - 1))
    varies = deviation > rounding
    points = jnp.where(varies, points / jnp.where(varies, deviation, 1.0), 0.0)
    return rbf_kernel(squared_distances(points), config.bandwidth)


def _mlp_terms(
    config: NeuronConfig, hidden: Float[Array, "b n f"], target: Float[Array, "1 b b"]
) -> dict[str, Float[Array, "f"]]:
    kernels = rbf_kernel(squared_distances(hidden), config.bandwidth)
    mean = hidden.astype(jnp.float32).mean(axis=-1, keepdims=True)
    reference = rbf_kernel(squared_distances(mean), config.bandwidth)
    return {
        "relevance": hsic(_relevance_kernel(config, hidden, kernels), target)[:, 0],
        "redundancy": hsic(kernels, reference)[:, 0],
        "activation": jnp.abs(hidden.astype(jnp.float32)).sum(axis=(0, 1)),
    }


def _head_terms(
    config: NeuronConfig,
    points: Float[Array, "b n h k"],
    activation: Float[Array, "h k"],
    target: Float[Array, "1 b b"],
) -> dict[str, Float[Array, "h k"]]:
    b, n, h, k = points.shape
    units = points.reshape(b, n, h * k)
    kernels = rbf_kernel(squared_distances(units), config.bandwidth)
    means = points.astype(jnp.float32).mean(axis=-1)
    references = rbf_kernel(squared_distances(means), config.bandwidth)
    relevance = hsic(_relevance_kernel(config, units, kernels), target)[:, 0]
    with_heads = hsic(kernels, references).reshape(h, k, h)
    others = 1.0 - jnp.eye(h)
    redundancy = jnp.einsum("hkr,hr->hk", with_heads, others) / max(h - 1, 1)
    return {
        "relevance": relevance.reshape(h, k),
        "redundancy": redundancy,
        "activation": activation,
    }


def _attention_terms(
    config: NeuronConfig, out: Float[Array, "b *w n h v"], target: Float[Array, "1 b b"]
) -> dict[str, Float[Array, "h v"]]:
    out = _join_windows(out)
    activation = jnp.abs(out.astype(jnp.float32)).sum(axis=(0, 1))
    return _head_terms(config, out, activation, target)


def _join_windows(x: Float[Array, "b *w n h k"]) -> Float[Array, "b wn h k"]:
    # Windows of one image are just more of its tokens.
    return x.reshape(x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])


def _query_key_terms(
    config: NeuronConfig, tap: Taps, target: Float[Array, "1 b b"]
) -> dict[str, Float[Array, "h k"]]:
    # A query-key dim acts through the products q_nj k_mj, whose norm over all token pairs of an
    # image is |q_j| |k_j|; with windows, those of all windows together. Its coordinates are both
    # halves, each token once as query, once as key.
    q, k = (tap[name].astype(jnp.float32) for name in ("q", "k"))
    pairs = jnp.square(q).sum(axis=-3) * jnp.square(k).sum(axis=-3)
    norms = jnp.sqrt(pairs.sum(axis=1) if pairs.ndim == 4 else pairs)
    q, k = _join_windows(q), _join_windows(k)
    return _head_terms(config, jnp.concatenate([q, k], axis=1), norms.sum(axis=0), target)


def _summed_gradient(config: NeuronConfig, gradient: Float[Array, "b ..."]) -> Array:
    per_image = jnp.square(gradient) / 2 if config.loss == "kl" else jnp.abs(gradient)
    return per_image.sum(axis=0)


def gate_gradients(
    config: TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    loss: Loss,
    key: Array,
) -> tuple[Float[Array, "b c"], dict[str, Taps], dict[str, Gates]]:
    """Logits, taps, and each image's gradient of its loss with respect to gates of one.

    The gradient with respect to a unit's gate is sum over tokens of a dL/da, so that its size is
    the first-order (Taylor) estimate of what removing the unit does to the loss. Images do not mix,
    so that the gradient of the summed loss with respect to per-image gates holds every image's own
    gradient: the vmap of grad, in one backward pass.

    With loss "kl" the loss is -log p_y for a class y drawn from the model's own prediction. The
    divergence of the dense output from the gated one has no gradient at gates of one; its leading
    term is half the Fisher information, whose unbiased estimate is half the square of this
    gradient (as in Fisher pruning, arXiv 1801.05787).

    Source: Taylor importance (arXiv 1906.10771); gates a unit and image, ours.
    """
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
        logits, taps = apply_with_taps(config, params, images, gates)
        log_p = jax.nn.log_softmax(logits)
        if loss == "entropy":
            total = -(jnp.exp(log_p) * log_p).sum()
        else:
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            classes = labels if loss == "label" else drawn
            total = -jnp.take_along_axis(log_p, classes[:, None], axis=1).sum()
        return total, (logits, taps)

    gradients, (logits, taps) = jax.grad(total_loss, has_aux=True)(gates)
    return logits, taps, gradients
