"""Neuron importance: the composite score of relevance, redundancy, activation and gradient.

A batch takes one jitted program: a pass through the model that reduces every block's activations
to kernels as they appear, and a backward pass where the gradient counts. Blocks of equal widths
share their compiled code. Only sums travel from batch to batch, on the device, and nothing is read
back to the host before the end.

Letters: b images, n tokens, h heads, k dims of a head, f MLP hidden, u units.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tapvit_jax.errors import InputError
from tapvit_jax.importance.gradients import Loss, dense_pass, part_bytes
from tapvit_jax.importance.hsic import (
    Bandwidth,
    centred_by_unit,
    hsic,
    linear_kernel,
    rbf_kernel,
    squared_distances,
)
from tapvit_jax.importance.streaming import Statistic, sum_over_batches
from tapvit_jax.models.backbone import TransformerConfig, check_prunable
from tapvit_jax.models.layers import Taps
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import check_unit_scores, unit_key
from tapvit_jax.structs import check_fields, check_kind

Scores = dict[str, Float[np.ndarray, "..."]]
"""Scores by group key of the unit table; higher means keep."""

Terms = dict[str, dict[str, Float[Array, "..."]]]
Method = Literal["tap", "tap_published"]

# Relative to a unit's largest value: what float32 leaves of a coordinate that should be constant.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class TermWeights:
    """Weights of the composite score's terms, each scaled to [0, 1] before."""

    relevance: float
    redundancy: float
    activation: float
    gradient: float = 0.0

    def __post_init__(self):
        check_fields(self)
        values = dataclasses.astuple(self)
        if min(values) < 0 or not 0 < max(values) < math.inf:
            raise InputError(
                f"term weights are {values}, expected none negative, one positive and all finite"
            )


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
        check_fields(self)
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
    def of_method(cls, method: Method) -> "NeuronConfig":
        """The config behind a method's name.

        Raises:
          InputError: an unknown name.
        """
        methods = {"tap": cls, "tap_published": cls.as_published}
        if method not in methods:
            raise InputError(f"method is {method!r}, expected one of {', '.join(methods)}")
        return methods[method]()

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed at all."""
        return self.mlp.gradient > 0 or self.attn.gradient > 0

    @property
    def needs_activations(self) -> bool:
        """Whether any other term counts."""
        return any(w.relevance + w.redundancy + w.activation > 0 for w in (self.mlp, self.attn))


def min_max(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scale to [0, 1] over all entries; equal entries become 0, and NaN or infinity make NaN."""
    if values.size == 0:
        return values
    low = values.min()
    spread = values.max() - low
    return jnp.where(spread == 0, 0.0, (values - low) / jnp.where(spread == 0, 1.0, spread))


def neuron_importance(
    model: Model,
    batches: Iterable[Any],
    method: Method = "tap",
    *,
    config: NeuronConfig | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Scores:
    """Score every prunable dim and head of a model on a metric dataset.

        composite = w_rel scaled(relevance) + w_red (1 - scaled(redundancy))
                  + w_act scaled(activation) + w_grad scaled(gradient)

    Args:
      model: the dense model.
      batches: image batches (b, s, s, ch), or pairs (images, labels), or dicts with "image" and,
        where the loss asks for it, "label"; a "mask" key drops padding rows. Of several processes,
        each brings its own: process p of P every P-th of all batches, from the p-th on.
      method: "tap" (quirks mended) or "tap_published".
      config: overrides what `method` stands for.
      seed: for the classes that loss "kl" samples.
      mesh: devices of this process that share the batches; by default all.

    Returns:
      Scores by unit group: "blocks_i/mlp" (f,), "blocks_i/qk" and "blocks_i/vo" (h, k), and
      "blocks_i/head" (h,), the mean of the head's value dims, which compares heads with heads
      alone.

    Raises:
      InputError: a config of another kind, no batch of two images or more, labels missing or
        beyond the network's classes for loss "label", coupled scores of unequal query-key and value
        dims, or activations or gradients that are not finite.

    Source: TAP-ViTs (arXiv 2601.02437), with the gradient term and the fixes ours.
    """
    check_prunable(model.config)
    config = NeuronConfig.of_method(method) if config is None else config
    check_kind(config, NeuronConfig)
    if config.couple_qk_vo:
        _check_coupling(model.config)
    found = sum_over_batches(
        model,
        batches,
        _statistic(config),
        seed=seed,
        max_batches=config.max_batches,
        needs_labels=config.needs_gradient and config.loss == "label",
        # One image has no distances, so that it says nothing about units.
        fewest=2,
        mesh=mesh,
    )
    found = jax.tree.map(np.float32, found)
    if config.scale == "batch":
        scores = {unit: terms["score"] for unit, terms in found.items()}
    else:
        scores = {unit: compose(config, unit, terms) for unit, terms in found.items()}
    scores = _finish(model.config, config, jax.device_get(scores))
    check_unit_scores(model.config, scores)
    return scores


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
    """The terms of every unit on one batch, not yet scaled; terms of weight 0 are left out.

    Kernels are made as soon as a block has run, so that no activations need to be kept: a kernel
    has b^2 entries where the activations have b n. Relevance waits for the prediction.
    """
    loss = config.loss if config.needs_gradient else None
    summarize = functools.partial(_block_terms, config)
    needed = _needed_taps(config)
    most = part_bytes(handing=bool(needed))
    logits, blocks, gradients = dense_pass(
        model_config, params, images, labels, loss, key, summarize, most, needed
    )
    target = linear_kernel(jax.nn.softmax(logits, axis=-1))
    terms: Terms = {}
    for i, block in enumerate(blocks):
        for kind, found in block.items():
            weights = config.mlp if kind == "mlp" else config.attn
            found = dict(found)
            kernels = found.pop("kernels")
            found["relevance"] = hsic(kernels, target).reshape(found["activation"].shape)
            if weights.gradient > 0:
                found["gradient"] = _summed_gradient(config, gradients[f"blocks_{i}"][kind])
            terms[unit_key(i, kind)] = {
                name: values for name, values in found.items() if getattr(weights, name) > 0
            }
    return terms


@functools.lru_cache(maxsize=64)
def _statistic(config: NeuronConfig) -> Statistic:
    """One object a config, since statistics compare by identity."""
    return Statistic(functools.partial(_summands, config))


def _summands(
    config: NeuronConfig,
    model_config: TransformerConfig,
    params: Params,
    images: Array,
    labels: Array,
    key: Array,
) -> Terms:
    found = batch_terms(model_config, config, params, images, labels, key)
    if config.scale == "batch":
        return {unit: {"score": compose(config, unit, terms)} for unit, terms in found.items()}
    return found


def _needed_taps(config: NeuronConfig) -> tuple[str, ...]:
    """The taps that `_block_terms` reads."""
    if not config.needs_activations:
        return ()
    return ("vo", "mlp") if config.couple_qk_vo else ("vo", "mlp", "q", "k")


def _block_terms(config: NeuronConfig, tap: Taps) -> dict[str, dict[str, Float[Array, "..."]]]:
    """Redundancy, activation and the kernels for relevance of one block's units, by kind."""
    found = {}
    if "vo" in tap:
        found["vo"] = _attention_terms(config, tap["vo"])
        if not config.couple_qk_vo:
            found["qk"] = _query_key_terms(config, tap)
    if "mlp" in tap:
        found["mlp"] = _mlp_terms(config, tap["mlp"])
    return found


def _kernels(
    config: NeuronConfig, weights: TermWeights, points: Float[Array, "b n u"]
) -> tuple[Float[Array, "u b b"], Float[Array, "u b b"]]:
    """Kernels of the units for redundancy and for relevance."""
    centred = centred_by_unit(points)
    plain = rbf_kernel(squared_distances(centred), config.bandwidth)
    if not config.standardize or weights.relevance == 0:
        return plain, plain
    # Constant coordinates are common (the first block's class token, empty image borders): divided
    # by the deviation that rounding leaves them, they would drown all others.
    rounding = _ROUNDING * jnp.abs(points.astype(jnp.float32)).max(axis=(0, 1))[:, None, None]
    squares = jnp.square(centred).sum(axis=-1, keepdims=True)
    deviation = jnp.sqrt(squares / (centred.shape[-1] - 1))
    varies = deviation > rounding
    standard = centred * jnp.where(varies, 1.0 / jnp.where(varies, deviation, 1.0), 0.0)
    return plain, rbf_kernel(squared_distances(standard), config.bandwidth)


def _mlp_terms(config: NeuronConfig, hidden: Float[Array, "b n f"]) -> dict[str, Float[Array, "f"]]:
    plain, relevance = _kernels(config, config.mlp, hidden)
    mean = hidden.astype(jnp.float32).mean(axis=-1, keepdims=True)
    reference = rbf_kernel(squared_distances(centred_by_unit(mean)), config.bandwidth)
    return {
        "kernels": relevance,
        "redundancy": hsic(plain, reference),
        "activation": jnp.abs(hidden.astype(jnp.float32)).sum(axis=(0, 1)),
    }


def _head_terms(
    config: NeuronConfig,
    points: Float[Array, "b n h k"],
    activation: Float[Array, "h k"],
) -> dict[str, Float[Array, "h k"]]:
    b, n, h, k = points.shape
    plain, relevance = _kernels(config, config.attn, points.reshape(b, n, h * k))
    means = points.astype(jnp.float32).mean(axis=-1)
    references = rbf_kernel(squared_distances(centred_by_unit(means)), config.bandwidth)
    # HSIC is linear in the reference: the mean over the other heads is one kernel a head.
    others = (references.sum(axis=0) - references) / max(h - 1, 1)
    return {
        "kernels": relevance,
        "redundancy": hsic(plain.reshape(h, k, b, b), others[:, None]),
        "activation": activation,
    }


def _attention_terms(
    config: NeuronConfig, out: Float[Array, "b *w n h v"]
) -> dict[str, Float[Array, "h v"]]:
    out = _join_windows(out)
    activation = jnp.abs(out.astype(jnp.float32)).sum(axis=(0, 1))
    return _head_terms(config, out, activation)


def _join_windows(x: Float[Array, "b *w n h k"]) -> Float[Array, "b wn h k"]:
    # Windows of one image are just more of its tokens.
    return x.reshape(x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])


def _query_key_terms(config: NeuronConfig, tap: Taps) -> dict[str, Float[Array, "h k"]]:
    # A query-key dim acts through the products q_nj k_mj, whose norm over all token pairs of an
    # image is |q_j| |k_j|; with windows, those of all windows together. Its coordinates are both
    # halves, each token once as query, once as key.
    q, k = (tap[name].astype(jnp.float32) for name in ("q", "k"))
    pairs = jnp.square(q).sum(axis=-3) * jnp.square(k).sum(axis=-3)
    norms = jnp.sqrt(pairs.sum(axis=1) if pairs.ndim == 4 else pairs)
    q, k = _join_windows(q), _join_windows(k)
    return _head_terms(config, jnp.concatenate([q, k], axis=1), norms.sum(axis=0))


def _summed_gradient(config: NeuronConfig, gradient: Float[Array, "b ..."]) -> Array:
    per_image = jnp.square(gradient) / 2 if config.loss == "kl" else jnp.abs(gradient)
    return per_image.sum(axis=0)
