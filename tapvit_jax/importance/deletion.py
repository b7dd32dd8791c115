"""What the output loses when a single unit is deleted, for every unit of every block.

All deletions of a block share its input, which one pass of the dense model provides, and run only
the blocks behind it, a chunk of units at a time. Blocks of equal widths share one compiled program,
but for the last one of a ViT that classifies its class token, which runs for that token alone.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.neurons import Scores
from tapvit_jax.importance.probes import divergence_sums, log_probabilities, run_block
from tapvit_jax.importance.streaming import unpack_batch
from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block,
    block_params,
    classified_tokens,
)
from tapvit_jax.models.layers import BlockSpec, Gates
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.streams import embed_images
from tapvit_jax.prune.units import Kind, UnitGroup, unit_table
from tapvit_jax.sharding import data_mesh, replicate, shard_rows


def deletion_divergences(
    model: Model,
    batches: Iterable[Any],
    *,
    max_images: int = 64,
    chunk: int = 32,
    mesh: Mesh | None = None,
) -> Scores:
    """Divergence of the output when one unit at a time is deleted: U evaluations a unit.

        score_j = mean over images of KL(p || p without unit j)

    Args:
      model: the dense model.
      batches: as in `neuron_importance`; images beyond `max_images` of all processes are not read.
      max_images: the work is proportional to it, and to the number of units.
      chunk: units that are deleted at once, each in a copy of the batch.
      mesh: devices of this process that share every batch's images; by default all.

    Returns:
      Scores of kinds mlp, qk, vo and head by group key.

    Raises:
      InputError: no batch with images in any process, or useless limits.

    Source: UP-ViTs (arXiv 2111.15127); shared prefixes and chunks are ours.
    """
    if max_images < 1 or chunk < 1:
        found = f"max_images is {max_images} and chunk {chunk}"
        raise InputError(f"{found}, expected 1 or more")
    groups = [group for group in unit_table(model.config) if group.shape]
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    sums = {group.key: np.zeros(group.size) for group in groups}
    waiting: list[dict[str, list[Array]]] = []
    count = 0
    placed = None
    for images in _first_images(batches, max_images):
        if placed is None:
            used = data_mesh(devices[: len(images)])
            placed = (used, replicate(model.params, used))
        mesh, params = placed
        rows, real = shard_rows(images, mesh)
        weights, _ = shard_rows(np.ones(real, np.float32), mesh)
        waiting.append(
            _batch_divergences(model.config, groups, params, rows, weights, chunk, mesh.size)
        )
        count += real
    for found in jax.device_get(waiting):
        for key, parts in found.items():
            joined = np.concatenate(parts, axis=1) if parts else np.zeros((1, 0))
            sums[key] += np.float64(joined[:, : sums[key].size]).sum(axis=0)
    sums, total = distributed.sum_over_processes((sums, np.float64(count)))
    if total == 0:
        raise InputError("unit importance needs at least one batch with images")
    # Rounding can push a divergence of nothing a little below zero.
    means = {key: np.float32(np.maximum(values / total, 0.0)) for key, values in sums.items()}
    return {group.key: means[group.key].reshape(group.shape) for group in groups}


def _first_images(batches: Iterable[Any], most: int) -> Iterator[np.ndarray]:
    """The images of this process that are among the first `most` of all processes' together."""
    number, size, own = distributed.process_index(), 0, iter(batches)
    while number * size < most:
        batch = next(own, None)
        if batch is None:
            return
        images, _ = unpack_batch(batch)
        size = size or len(images)
        images = images[: max(most - number * size, 0)]
        if len(images):
            yield images
        number += distributed.process_count()


def _batch_divergences(
    config: TransformerConfig,
    groups: list[UnitGroup],
    params: Params,
    images: Float[Array, "b s s ch"],
    weights: Float[Array, "b"],
    chunk: int,
    devices: int,
) -> dict[str, list[Float[Array, "devices chunk"]]]:
    """Sum over each device's images of every unit's divergence, in chunks that stay there."""
    specs = [config.block_spec(i) for i in range(len(config.blocks))]
    parts = [block_params(params, i) for i in range(len(specs))]
    ends = [classified_tokens(config, i) for i in range(len(specs))]
    inputs = [embed_images(config, params, images)]
    for spec, part, end in zip(specs, parts, ends, strict=True):
        inputs.append(run_block(spec, part, inputs[-1], end))
    original = log_probabilities(config, params, inputs[-1])
    found: dict[str, list[Array]] = {group.key: [] for group in groups}
    for group in groups:
        i = group.block
        width = min(chunk, group.size)
        for start in range(0, group.size, chunk):
            x = _without_units(specs[i], group.kind, width, ends[i], parts[i], inputs[i], start)
            for j in range(i + 1, len(specs)):
                x = run_block(specs[j], parts[j], x, ends[j])
            deleted = log_probabilities(config, params, x)
            sums = divergence_sums("forward", devices, original, deleted, weights)
            found[group.key].append(sums)
    return found


def _gate_shape(spec: BlockSpec, kind: Kind) -> tuple[int, ...]:
    widths = spec.widths
    return {
        "mlp": (widths.mlp_dim,),
        "qk": (widths.num_heads, widths.qk_dim),
        "vo": (widths.num_heads, widths.v_dim),
        "head": (widths.num_heads,),
    }[kind]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _without_units(
    spec: BlockSpec,
    kind: Kind,
    chunk: int,
    outputs: int | None,
    params: Params,
    x: Float[Array, "b n d"],
    start: Array,
) -> Float[Array, "bc m d"]:
    """One block without unit start, start + 1, ...; an image's copies lie together.

    What comes before the gates runs once. Numbers beyond the last unit delete nothing.
    """
    shape = _gate_shape(spec, kind)
    size = int(np.prod(shape))

    def without(unit: Array) -> Array:
        # The gate's image axis has size one and broadcasts.
        gate: Gates = {kind: (jnp.arange(size) != unit).astype(jnp.float32).reshape(1, *shape)}
        return apply_block(spec, params, x, gate, outputs)

    out = jax.vmap(without, out_axes=1)(start + jnp.arange(chunk))
    return out.reshape(-1, *out.shape[2:])
