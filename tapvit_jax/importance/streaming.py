"""Statistics of a model over batches: one jitted program a batch, sums that stay on the devices.

A statistic is a pure function of one batch and a way to merge its results. Every device of this
process takes whole batches of its own; nothing is read back, and nothing travels between devices or
processes, before the end.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.sharding import AXIS, data_mesh, replicate, shard_rows

Sums = Any
"""A pytree of arrays."""


def add(total: Sums, new: Sums, weight: Float[Array, ""]) -> Sums:
    """The plain sum; weight 0 leaves a batch out."""
    return jax.tree.map(lambda a, b: a + weight * b, total, new)


def as_found(total: Sums) -> Sums:
    """What `add` collects is a sum already."""
    return total


class Statistic(NamedTuple):
    """What to collect. All three functions are pure and compare by identity, for jit.

    Attributes:
      of_batch: (config, params, images, labels, key) -> a pytree of float32 arrays.
      merge: (total, of a batch, weight 0 or 1) -> total; begins with zeros.
      sums: on the host, in float64: what `merge` collected as sums that may be added up.
    """

    of_batch: Callable[[TransformerConfig, Params, Array, Array, Array], Sums]
    merge: Callable[[Sums, Sums, Array], Sums] = add
    sums: Callable[[Sums], Sums] = as_found


_FORMS = 'images (b, s, s, ch), a pair (images, labels), or a dict with "image"'


def unpack_batch(batch: Any) -> tuple[Float[np.ndarray, "b s s ch"], Int[np.ndarray, "b"] | None]:
    """Split a batch (array, pair, or dict with an optional padding mask) into images and labels.

    Raises:
      InputError: any other form, or not one whole number as label and one as mask for each image.
    """
    mask = None
    if isinstance(batch, Mapping):
        if "image" not in batch:
            raise InputError(f"batch is a dict of {', '.join(map(str, batch))}, expected {_FORMS}")
        images, labels, mask = batch["image"], batch.get("label"), batch.get("mask")
    elif isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise InputError(
                f"batch is a {type(batch).__name__} of {len(batch)}, expected {_FORMS}"
            )
        images, labels = batch
    else:
        images, labels = batch, None
    if np.ndim(images) != 4:
        found = f"{type(images).__name__} of {np.ndim(images)} axes"
        raise InputError(f"batch is a {found}, expected {_FORMS}")
    for name, values in (("labels", labels), ("mask", mask)):
        if values is not None and np.shape(values) != (len(images),):
            raise InputError(
                f"{name} of a batch have shape {np.shape(values)}, expected one for each of the "
                f"{len(images)} images"
            )
    if labels is not None:
        labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"labels are {labels.dtype}, expected whole numbers")
    if mask is not None and not (real := np.asarray(mask) > 0).all():
        images, labels = np.asarray(images)[real], None if labels is None else labels[real]
    return images, labels


def sum_over_batches(
    model: Model,
    batches: Iterable[Any],
    statistic: Statistic,
    *,
    seed: int = 0,
    max_batches: int = 50,
    needs_labels: bool = False,
    fewest: int = 1,
    mesh: Mesh | None = None,
) -> Sums:
    """Sum a statistic over batches, devices and processes.

    Args:
      model: the model that is looked at.
      batches: as in `neuron_importance`: of several processes, each brings its own.
      statistic: what to collect.
      seed: a key made from it and from the batch's number goes into every batch.
      max_batches: batches of all processes beyond these are not read.
      needs_labels: whether batches without labels are refused.
      fewest: batches of fewer images are passed over.
      mesh: devices of this process that share the batches; by default all.

    Returns:
      The sums in float64, the same in every process.

    Raises:
      InputError: no batch with enough images in any process, or labels missing or beyond the
        network's classes.

    Source: ours.
    """
    key = jax.random.key(seed)
    classes = model.config.num_classes if needs_labels else None
    usable = _usable_batches(batches, max_batches, classes, fewest)
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    first = list(itertools.islice(usable, len(devices)))
    mesh = data_mesh(devices[: max(1, len(first))])
    params = replicate(model.params, mesh)
    shapes = _shapes(model.config, statistic)
    total: Sums = None
    for group in _group_batches(itertools.chain(first, usable), mesh.size):
        if total is None:
            total = _zeros(shapes, mesh)
        stacked = _stack_group(group, mesh)
        total = _add_batches(model.config, statistic, mesh, params, total, *stacked, key)
    if not any(distributed.gather(np.array(total is not None))):
        images = f"{fewest} image{'s' * (fewest > 1)} or more"
        raise InputError(f"scoring needs at least one batch of {images}")
    if total is None:
        total = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), shapes)
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(total))
    found = jax.tree.map(lambda leaf: leaf.sum(axis=0), statistic.sums(found))
    return distributed.sum_over_processes(found)


def _usable_batches(
    batches: Iterable[Any], max_batches: int, classes: int | None, fewest: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number among the batches of all processes, images and labels of every batch that counts.

    Labels of so many classes are needed; None is no labels.
    """
    index, processes = distributed.process_index(), distributed.process_count()
    for i, batch in enumerate(itertools.islice(batches, distributed.own_count(max_batches))):
        images, labels = unpack_batch(batch)
        if len(images) < fewest:
            continue
        if classes is not None:
            _check_labels(labels, classes)
        labels = np.zeros(len(images), np.int32) if labels is None else labels
        yield index + i * processes, images, labels


def _check_labels(labels: Int[np.ndarray, "b"] | None, classes: int) -> None:
    """Refuse images without a label, for which -1 stands, and labels of classes there are none."""
    if labels is None or (np.asarray(labels) < 0).any():
        raise InputError("these scores need labels, found a batch with images that have none")
    if (highest := np.max(labels)) >= classes:
        raise InputError(f"label {highest}, expected 0 to {classes - 1}, the network's classes")


def _group_batches(batches: Iterable[tuple[int, Any, Any]], most: int) -> Iterator[list[tuple]]:
    """Up to `most` consecutive batches of one size."""
    for _, same in itertools.groupby(batches, key=lambda batch: len(batch[1])):
        while group := list(itertools.islice(same, most)):
            yield group


def _stack_group(group: list[tuple], mesh: Mesh) -> tuple[Array, Array, Array, Array]:
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _add_batches(
    config: TransformerConfig,
    statistic: Statistic,
    mesh: Mesh,
    params: Params,
    total: Sums,
    images: Float[Array, "v b s s ch"],
    labels: Int[Array, "v b"],
    numbers: Int[Array, "v"],
    weights: Float[Array, "v"],
    key: Array,
) -> Sums:
    """Merge every device's batch into its own total."""

    def on_device(params, total, images, labels, numbers, weights, key):
        key = jax.random.fold_in(key, numbers[0])
        found = statistic.of_batch(config, params, images[0], labels[0], key)
        return statistic.merge(total, found, weights[0])

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, rows, rows, whole),
        out_specs=rows,
        # Checked, gradients of what all devices have in common would be summed over the devices.
        check_vma=False,
    )(params, total, images, labels, numbers, weights, key)


@functools.lru_cache(maxsize=64)
def _shapes(config: TransformerConfig, statistic: Statistic) -> Sums:
    """Shapes of a statistic, which depend neither on the batch size nor on the images.

    Kept, because tracing a network takes longer than a small one's batch. Treat as frozen.
    """
    side, channels = config.image_size, config.in_channels
    return jax.eval_shape(
        functools.partial(statistic.of_batch, config),
        backbone.param_shapes(config),
        jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        jax.random.key(0),
    )


def _zeros(shapes: Sums, mesh: Mesh) -> Sums:
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(
        lambda leaf: jnp.zeros((mesh.size, *leaf.shape), leaf.dtype, device=rows), shapes
    )
