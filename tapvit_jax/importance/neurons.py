"""Neuron importance: composite (relevance, redundancy, activation, gradient) and Taylor scores.

A batch takes one jitted program: a pass through the model that reduces every block's activations
to kernels as they appear, and a backward pass where the gradient counts. Blocks of equal widths
share their compiled code. Only sums travel from batch to batch, on the device, and nothing is read
back to the host before the end.

Letters: b images, n tokens, h heads, k dims of a head, f MLP hidden, u units, c classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.hsic import (
    Bandwidth,
    centred_by_unit,
    hsic,
    linear_kernel,
    rbf_kernel,
    squared_distances,
)
from tapvit_jax.models import backbone
from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block_with_taps,
    check_prunable,
    classify,
    embed,
    visit_blocks,
)
from tapvit_jax.models.layers import BlockSpec, Gates, Taps
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import unit_key
from tapvit_jax.sharding import AXIS, data_mesh, replicate, shard_rows
from tapvit_jax.structs import check_choices

T = TypeVar("T")

Scores = dict[str, Float[np.ndarray, "..."]]
"""Scores by group key of the unit table; higher means keep."""

Terms = dict[str, dict[str, Float[Array, "..."]]]
Loss = Literal["label", "entropy", "kl"]
# Relative to a unit's largest value: what float32 leaves of a coordinate that should be constant.
_ROUNDING = 1e-6
# Beyond this, a batch's images take their backward passes in several parts.
_MOST_RESIDUAL_BYTES = 13 * 2**28
# Up to here, the parts hand over their activations; kernels then take twice as much on the way.
_MOST_TAP_BYTES = 7 * 2**28
# What a CPU's caches serve best.
_CACHED_RESIDUAL_BYTES = 2**28
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

    @property
    def needs_activations(self) -> bool:
        """Whether any other term counts."""
        return any(w.relevance + w.redundancy + w.activation > 0 for w in (self.mlp, self.attn))


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
      method: "tap" (composite, quirks mended), "tap_published", or "taylor".
      config: overrides what `method` stands for.
      seed: for the classes that loss "kl" samples.
      mesh: devices of this process that share the batches; by default all.

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
    usable = _usable_batches(config, batches)
    # As many batches at a time as there are devices, each on its own: kernels compare the images
    # of one batch, so that nothing travels between devices before the end.
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    first = list(itertools.islice(usable, len(devices)))
    sums: Terms | None = None
    mesh = data_mesh(devices[: max(1, len(first))])
    params = replicate(model.params, mesh)
    for group in group_batches(itertools.chain(first, usable), mesh.size):
        stacked = stack_group(group, mesh)
        if sums is None:
            sums = _no_sums(model.config, config, mesh)
        sums = _add_batches(model.config, config, mesh, params, sums, *stacked, key)
    found = {} if sums is None else jax.device_get(sums)
    found = jax.tree.map(lambda values: values.astype(np.float64).sum(axis=0), found)
    found = _over_processes(found, model.config, config)
    if config.scale == "batch":
        scores = {unit: terms["score"] for unit, terms in found.items()}
    else:
        scores = {unit: compose(config, unit, terms) for unit, terms in found.items()}
    return _finish(model.config, config, jax.device_get(scores))


def _usable_batches(
    config: NeuronConfig, batches: Iterable[Any]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number among the batches of all processes, images and labels of every batch to be scored."""
    index, processes = distributed.process_index(), distributed.process_count()
    for i, batch in enumerate(itertools.islice(batches, distributed.own_count(config.max_batches))):
        images, labels = unpack_batch(batch)
        if len(images) < 2:
            # A trailing batch of one image has no distances, so it says nothing about units.
            continue
        if config.loss == "label" and config.needs_gradient and not labelled(labels):
            raise InputError("loss 'label' needs batches with labels")
        labels = np.zeros(len(images), np.int32) if labels is None else labels
        yield index + i * processes, images, labels


def group_batches(batches: Iterable[tuple[int, Any, Any]], most: int) -> Iterator[list[tuple]]:
    """Up to `most` consecutive batches of one size."""
    for _, same in itertools.groupby(batches, key=lambda batch: len(batch[1])):
        while group := list(itertools.islice(same, most)):
            yield group


def stack_group(group: list[tuple], mesh: Mesh) -> tuple[Array, Array, Array, Array]:
    """Images, labels, numbers and weights of a group, one batch a device.

    Devices without a batch of their own repeat the first one with weight 0.
    """
    weights = np.float32([1.0] * len(group) + [0.0] * (mesh.size - len(group)))
    group = group + group[:1] * (mesh.size - len(group))
    numbers, images, labels = zip(*group, strict=True)
    parts = (images, labels, np.asarray(numbers, np.uint32), weights)
    if mesh.size == 1:
        parts = (images[0][None], labels[0][None], *parts[2:])
    else:
        parts = (np.stack(images), np.stack(labels), *parts[2:])
    return tuple(shard_rows(part, mesh)[0] for part in parts)


def _over_processes(sums: Terms, model_config: TransformerConfig, config: NeuronConfig) -> Terms:
    """Add up the sums of all processes, some of which may have had no batch."""
    if not any(distributed.gather(np.array(bool(sums)))):
        raise InputError("neuron importance needs at least one batch of two images or more")
    if distributed.process_count() == 1:
        return jax.tree.map(np.float32, sums)
    shapes = _term_shapes(model_config, config)
    sums = sums or jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    return jax.tree.map(np.float32, distributed.sum_over_processes(sums))


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


def labelled(labels: Int[np.ndarray, "b"] | None) -> bool:
    """Whether every image has a label; -1 stands for none."""
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
    """The terms of every unit on one batch, not yet scaled; terms of weight 0 are left out.

    Kernels are made as soon as a block has run, so that no activations need to be kept: a kernel
    has b^2 entries where the activations have b n. Relevance waits for the prediction.
    """
    loss = config.loss if config.needs_gradient else None
    summarize = functools.partial(_block_terms, config)
    needed = _needed_taps(config)
    # A CPU's caches serve small parts best, where no kernels need a batch's images together.
    most = _MOST_RESIDUAL_BYTES if needed else _part_bytes()
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _add_batches(
    model_config: TransformerConfig,
    config: NeuronConfig,
    mesh: Mesh,
    params: Params,
    sums: Terms,
    images: Float[Array, "v b s s ch"],
    labels: Int[Array, "v b"],
    numbers: Int[Array, "v"],
    weights: Float[Array, "v"],
    key: Array,
) -> Terms:
    """Add every device's batch to its own sums."""

    def on_device(params, sums, images, labels, numbers, weights, key):
        key = jax.random.fold_in(key, numbers[0])
        found = _summands(model_config, config, params, images[0], labels[0], key)
        return jax.tree.map(lambda total, new: total + weights[0] * new, sums, found)

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, rows, rows, whole),
        out_specs=rows,
        # Checked, gradients of what all devices have in common would be summed over the devices.
        check_vma=False,
    )(params, sums, images, labels, numbers, weights, key)


def _summands(
    model_config: TransformerConfig,
    config: NeuronConfig,
    params: Params,
    images: Array,
    labels: Array,
    key: Array,
) -> Terms:
    found = batch_terms(model_config, config, params, images, labels, key)
    if config.scale == "batch":
        return {unit: {"score": compose(config, unit, terms)} for unit, terms in found.items()}
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _no_sums(
    model_config: TransformerConfig,
    config: NeuronConfig,
    mesh: Mesh,
) -> Terms:
    shapes = _term_shapes(model_config, config)
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(
        lambda leaf: jnp.zeros((mesh.size, *leaf.shape), leaf.dtype, device=rows), shapes
    )


@functools.lru_cache(maxsize=64)
def _term_shapes(model_config: TransformerConfig, config: NeuronConfig) -> Terms:
    """Shapes of the terms, which depend neither on the batch size nor on the images.

    Kept, because tracing a network takes longer than a small one's batch. Treat as frozen.
    """
    side, channels = model_config.image_size, model_config.in_channels
    return jax.eval_shape(
        functools.partial(_summands, model_config, config),
        backbone.param_shapes(model_config),
        jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.random.key(0),
    )


def dense_pass(
    model_config: TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    labels: Int[Array, "b"],
    loss: Loss | None,
    key: Array,
    summarize: Callable[[Taps], T],
    most_bytes: int = _MOST_RESIDUAL_BYTES,
    needed: tuple[str, ...] = (),
) -> tuple[Float[Array, "b c"], list[T], dict[str, Gates]]:
    """Logits, what `summarize` makes of every block's taps, and the gates' gradients if asked.

    Kernels need a batch's images together, gradients do not: where a backward pass over all of them
    would keep more than `most_bytes`, parts of the batch take it one after the other. They hand
    over the taps named `needed`, if `summarize` needs no others and they are not too many to keep;
    otherwise a forward pass of its own serves the kernels.
    """
    parts = _gradient_parts(model_config, len(images), most_bytes)
    if loss is not None and parts == 1:
        return gate_gradients(model_config, params, images, labels, loss, key, summarize)
    few = _tap_bytes(model_config, len(images)) <= _MOST_TAP_BYTES
    handed = needed if loss is not None and few else ()
    if handed:
        parts = _gradient_parts(model_config, len(images), min(most_bytes, _part_bytes()))
    else:
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


def _part_bytes() -> int:
    """What one part's backward pass should keep, where parts cost nothing."""
    return _CACHED_RESIDUAL_BYTES if jax.default_backend() == "cpu" else _MOST_RESIDUAL_BYTES


def _needed_taps(config: NeuronConfig) -> tuple[str, ...]:
    """The taps that `_block_terms` reads."""
    if not config.needs_activations:
        return ()
    return ("vo", "mlp") if config.couple_qk_vo else ("vo", "mlp", "q", "k")


def _tap_bytes(config: TransformerConfig, images: int) -> int:
    """At most what the taps of all blocks take, but for attention's own weights."""
    total = 0
    for i, block in enumerate(config.blocks):
        heads = block.num_heads * (2 * block.qk_dim + block.v_dim)
        total += config.block_spec(i).tokens * (block.mlp_dim + heads)
    return 4 * images * total


def _gradient_parts(config: TransformerConfig, images: int, most_bytes: int) -> int:
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
    x, found = visit_blocks(model_config, params, x, visit, inputs)
    return classify(model_config, params, x), found


def _residual_bytes(config: TransformerConfig, images: int) -> int:
    """About what a backward pass keeps of the forward pass."""
    total = 0
    for i, block in enumerate(config.blocks):
        spec = config.block_spec(i)
        heads = block.num_heads * (2 * block.qk_dim + 2 * block.v_dim + 2 * spec.attended)
        total += spec.tokens * (6 * spec.embed_dim + 3 * block.mlp_dim + heads)
    return 4 * images * total


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
