"""The metric dataset's residual streams, block by block, and the moments that recovery solves from.

Letters as in `prune.recover`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.streaming import unpack_batch
from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block,
    apply_block_with_taps,
    block_params,
    classified_tokens,
    classify,
    embed,
    pool,
)
from tapvit_jax.models.layers import BlockSpec, from_windows
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import ViTConfig
from tapvit_jax.prune.moments import Moments, merge, merge_all, on_host, row_moments
from tapvit_jax.sharding import data_mesh, replicate, shard_rows

# For sums that layers are solved from: products of float32 are coarser by default on accelerators.
_HIGHEST = jax.lax.Precision.HIGHEST


def _token_weights(config: TransformerConfig, i: int) -> Float[np.ndarray, "n"]:
    """Which tokens behind a block anything depends on: behind a ViT's last, those it classifies."""
    weights = np.ones(config.block_spec(i).tokens, np.float32)
    if (classified := classified_tokens(config, i)) is not None:
        weights[classified:] = 0.0
    elif isinstance(config, ViTConfig) and i == len(config.blocks) - 1:
        # The mean of the patches leaves the others out.
        weights[: config.num_prefix_tokens] = 0.0
    return weights


class Streams:
    """The metric dataset's residual streams: the dense model's, and the recovered one's."""

    def __init__(self, model: Model, batches: Iterable[Any], mesh: Mesh | None):
        self._config = model.config
        devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
        self._dense: Params = {}
        self._real: list[Array] = []
        self._target: list[Array] = []
        seen = 0
        for batch in batches:
            images, _ = unpack_batch(batch)
            if len(images) == 0:
                continue
            if not self._real:
                self._mesh = data_mesh(devices[: (len(images) + 1) // 2])
                self._dense = replicate(model.params, self._mesh)
            rows, real = self._place(images, seen)
            seen += len(images)
            self._real.append(real)
            self._target.append(embed_images(self._config, self._dense, rows))
        if not all(distributed.gather(np.array(bool(self._real)))):
            raise InputError("recovery needs at least one batch of images in every process")
        self._found = list(self._target)
        # What the dense model has behind the block's attention branch and behind the block.
        self._middle: list[Array] = []
        self._behind: list[Array] = []
        self._heads: list[Array] = []
        self._block = 0
        self._parallel = False
        # In parallel: a branch before this is gone, and what follows has to make up for it.
        self._short = False

    def _place(self, images: Any, seen: int) -> tuple[Array, Array]:
        """Images on the devices, and which rows are images and not padding.

        Even and odd ones, counted over all batches, lie on even and odd rows of every device: what
        is chosen on held-out images depends neither on the devices nor on the batches.
        """
        before, count = seen % 2, len(images)
        behind = -(before + count) % (2 * self._mesh.size)
        real = np.pad(np.ones(count, np.float32), (before, behind))
        images = np.pad(images, [(before, behind)] + [(0, 0)] * (np.ndim(images) - 1))
        return shard_rows(images, self._mesh)[0], shard_rows(real, self._mesh)[0]

    @property
    def dense(self) -> Params:
        """The dense parameters, on the devices."""
        return self._dense

    @property
    def mesh(self) -> Mesh:
        """The devices that share every batch's images."""
        return self._mesh

    @property
    def _spec(self) -> BlockSpec:
        return self._config.block_spec(self._block)

    def skip(self, i: int) -> None:
        """Pass a block that is as it was, behind blocks that are as they were."""
        self.begin(i, parallel=False)
        self.leave()

    def leave(self) -> None:
        """Leave a block that is as it was."""
        self._found = self._target = self._behind

    def see_dense_middle(self) -> None:
        """See what the dense model has behind the block's attention branch."""
        self._found = list(self._middle)

    def begin(self, i: int, parallel: bool) -> Params:
        """Enter a block; returns its dense parameters.

        In parallel, its branches see what dense ones see, but for what a branch that is gone right
        before them would have added: nothing else could make up for that.
        """
        self._block, self._parallel = i, parallel
        part = block_params(self._dense, i)
        passed = [_pass_block(self._spec, part, x) for x in self._target]
        self._middle, self._behind = [mid for mid, _ in passed], [out for _, out in passed]
        if parallel and not self._short:
            self._found = list(self._target)
        return jax.tree.map(np.asarray, part)

    def logit_moments(self, part: Params) -> tuple[np.ndarray, np.ndarray]:
        """Of queries and keys in every head, as means over queries; see `solve_queries_keys`."""
        run = functools.partial(_logit_sums, self._spec, self._mesh.size)
        weights = _token_weights(self._config, self._block)
        total = None
        for x, real in zip(self._found, self._real, strict=True):
            found = run(part, x, real, weights)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        own = jax.tree.map(lambda a: np.asarray(a, np.float64).sum(axis=0), jax.device_get(total))
        queries, keys, weight = distributed.sum_over_processes(own)
        _check_finite((queries, keys))
        return queries / weight, keys / weight

    def attention_moments(self, part: Params) -> list[Moments]:
        """Of all heads' outputs, and what the attention branch should add to the stream."""
        found = [_head_outputs(self._spec, part, x) for x in self._found]
        self._found, self._heads = [before for before, _ in found], [heads for _, heads in found]
        return self._moments(self._heads, self._found, self._middle)

    def pass_attention(
        self, kernel: Float[np.ndarray, "hv d"], bias: Float[np.ndarray, "d"]
    ) -> None:
        """Take the recovered stream through the attention branch, from its heads' outputs."""
        pairs = zip(self._found, self._heads, strict=True)
        self._found = [_add_branch(x, heads, kernel, bias) for x, heads in pairs]
        self._heads = []
        self._rejoin()

    def pass_no_attention(self) -> None:
        """Take the recovered stream past an attention branch that is not there."""
        part = block_params(self._dense, self._block)
        self._found = [_merge_patches(self._spec, part, x) for x in self._found]

    def _rejoin(self) -> None:
        if self._parallel:
            self._short = False
            self.see_dense_middle()

    def hidden_moments(self, part: Params) -> list[Moments]:
        """Of all hidden units, and what the MLP should add to the stream."""
        return self._hidden_moments(part)

    def kept_hidden_moments(
        self, part: Params, keep: Bool[np.ndarray, "f"], kernel: Float[np.ndarray, "f d"]
    ) -> tuple[list[Moments], list[Moments]]:
        """Of the kept hidden units, with what the MLP should add to the stream as targets, and with
        what all hidden units make of a kernel.

        Products with pruned units, most of `hidden_moments`' work, are left out.
        """
        units = _few_shapes(keep)
        # In this order the kept ones are a slice: picking them out would take longer than products
        # with all.
        order = np.concatenate([units, np.setdiff1d(np.arange(len(keep)), units)])
        part = part | {"mlp": _reordered(part["mlp"], order)}
        kernel = kernel[order].astype(np.float32)
        found = self._hidden_moments(part, kernel, first=len(units))
        folds, dim = [fold.select(np.arange(np.sum(keep))) for fold in found], kernel.shape[1]
        halves = slice(dim), slice(dim, None)
        return tuple([fold.targets(columns) for fold in folds] for columns in halves)

    def _hidden_moments(
        self, part: Params, kernel: Float[np.ndarray, "f d"] | None = None, first: int | None = None
    ) -> list[Moments]:
        weights = _token_weights(self._config, self._block)
        sums = None
        for x, target, real in zip(self._found, self._behind, self._real, strict=True):
            given = part, x, target, real, weights, sums, kernel
            sums = _add_hidden(self._spec, self._mesh.size, first, *given)
        return _checked(sums)

    def pass_mlp(self, part: Params, keep: Bool[np.ndarray, "f"]) -> None:
        """Take both streams out of the block, whose pruned hidden units, if any, are zero."""
        spec = self._spec
        if not keep.all():
            units = _few_shapes(keep)
            part = part | {"mlp": _reordered(part["mlp"], units)}
            widths = dataclasses.replace(spec.widths, mlp_dim=len(units))
            spec = dataclasses.replace(spec, widths=widths)
        self._found = [_pass_mlp(spec, part, x) for x in self._found]
        self._target, self._short = self._behind, False

    def pass_no_mlp(self) -> None:
        """Take both streams past an MLP branch that is not there."""
        self._target, self._short = self._behind, True

    def missing_mean(self) -> Float[np.ndarray, "d"]:
        """What the recovered stream lacks on average behind the last block."""
        none = [x[..., :0] for x in self._found]
        return merge_all(self._moments(none, self._found, self._target)).mean_y

    def head_moments(self) -> list[Moments]:
        """Of the recovered features, and the dense logits."""
        sums = None
        for x, target, real in zip(self._found, self._target, self._real, strict=True):
            features = _features(self._config, self._dense, x)
            logits = _logits(self._config, self._dense, target)
            sums = _add_rows(self._mesh.size, features, logits, real[:, None], sums)
        return _checked(sums)

    def class_shares(self) -> tuple[Float[np.ndarray, "c"], int]:
        """The dense model's mean prediction behind the last block, and over how many images."""
        total = None
        for x, real in zip(self._target, self._real, strict=True):
            found = _predicted(self._config, self._dense, x, real)
            total = found if total is None else total + found
        own = np.asarray(total, np.float64), sum(float(np.sum(real)) for real in self._real)
        predicted, images = distributed.sum_over_processes(own)
        _check_finite(predicted)
        return predicted / images, round(float(images))

    def dense_batches(self) -> Iterator[tuple[Array, Array]]:
        """The dense stream in front of the block, and which rows are images, by batch."""
        yield from zip(self._target, self._real, strict=True)

    def _moments(
        self, features: Sequence[Array], streams: Sequence[Array], targets: Sequence[Array]
    ) -> list[Moments]:
        weights = _token_weights(self._config, self._block)
        sums = None
        for x, before, target, real in zip(features, streams, targets, self._real, strict=True):
            sums = _add_rows(self._mesh.size, x, target - before, real[:, None] * weights, sums)
        return _checked(sums)


def _checked(sums: tuple[Moments, ...]) -> list[Moments]:
    folds = [on_host(fold) for fold in sums]
    _check_finite(folds)
    return folds


def _check_finite(tree: Any) -> None:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
        raise InputError("recovery: activations on the metric dataset are not finite")


@functools.partial(jax.jit, static_argnums=0)
def _add_rows(
    devices: int,
    x: Float[Array, "b n f"],
    y: Float[Array, "b n d"],
    weights: Float[Array, "b n"],
    sums: tuple[Moments, ...] | None,
) -> tuple[Moments, ...]:
    """Add moments of even and of odd images, each device its own: nothing travels between them."""

    def rows(a: Array, fold: int) -> Array:
        # Shapes in full: without units there is nothing to work a missing one out from.
        a = a.reshape(devices, len(a) // devices, *a.shape[1:])[:, fold::2]
        return a.reshape(devices, a.shape[1] * a.shape[2], *a.shape[3:])

    found = tuple(
        jax.vmap(row_moments)(rows(x, fold), rows(y, fold), rows(weights, fold))
        for fold in range(2)
    )
    return (
        found if sums is None else jax.tree.map(jax.vmap(merge), sums, found, is_leaf=_is_moments)
    )


def _is_moments(value: Any) -> bool:
    return isinstance(value, Moments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _add_hidden(
    spec: BlockSpec,
    devices: int,
    first: int | None,
    part: Params,
    x: Float[Array, "b n d"],
    target: Float[Array, "b n d"],
    real: Float[Array, "b"],
    weights: Float[Array, "n"],
    sums: tuple[Moments, ...] | None,
    kernel: Float[Array, "f d"] | None,
) -> tuple[Moments, ...]:
    """Add the moments of an MLP's first hidden units, which take too much memory to keep.

    Behind what the MLP should add to the stream, what all units make of a kernel is a target.
    """
    hidden = apply_block_with_taps(_behind_attention(spec), part, x)[1]["mlp"]
    targets = target - x
    if kernel is not None:
        linear = jnp.matmul(hidden.astype(jnp.float32), kernel, precision=_HIGHEST)
        targets = jnp.concatenate([targets.astype(jnp.float32), linear], axis=-1)
    return _add_rows(devices, hidden[..., :first], targets, real[:, None] * weights, sums)


def _few_shapes(keep: Bool[np.ndarray, "f"]) -> Int[np.ndarray, "k"]:
    """The kept units, then others, so that they are a multiple of an eighth of all.

    Every number of units would be a program of its own.
    """
    kept, step = np.flatnonzero(keep), max(1, -(-len(keep) // 8))
    more = step * max(1, -(-len(kept) // step)) - len(kept)
    return np.concatenate([kept, np.flatnonzero(~keep)[:more]])


def _reordered(mlp: Params, units: Int[np.ndarray, "k"]) -> Params:
    """An MLP with these of its hidden units."""
    first = {name: np.asarray(leaf)[..., units] for name, leaf in mlp["fc1"].items()}
    second = mlp["fc2"] | {"kernel": np.asarray(mlp["fc2"]["kernel"])[units]}
    return {"fc1": first, "fc2": second}


@functools.partial(jax.jit, static_argnums=0)
def _head_outputs(
    spec: BlockSpec, part: Params, x: Array
) -> tuple[Float[Array, "b n d"], Float[Array, "b n hv"]]:
    """The stream in front of the attention branch, behind patch merging, and what its heads say."""
    heads = apply_block_with_taps(_only(spec, "attn"), part, x)[1]["vo"]
    joined = heads.reshape(*heads.shape[:-2], -1)
    joined = from_windows(joined, spec) if spec.window and joined.size else joined
    joined = joined.reshape(len(x), spec.tokens, joined.shape[-1])
    return apply_block(_only(spec, None), part, x), joined


@jax.jit
def _add_branch(x: Array, heads: Array, kernel: Array, bias: Array) -> Array:
    return x + (heads.astype(jnp.float32) @ kernel + bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _merge_patches(spec: BlockSpec, part: Params, x: Array) -> Array:
    return apply_block(_only(spec, None), part, x)


def _only(spec: BlockSpec, branch: str | None) -> BlockSpec:
    there = {name: getattr(spec.widths, name) and name == branch for name in ("attn", "mlp")}
    return dataclasses.replace(spec, widths=dataclasses.replace(spec.widths, **there))


def _behind_attention(spec: BlockSpec) -> BlockSpec:
    return dataclasses.replace(_only(spec, "mlp"), merge=False)


@functools.partial(jax.jit, static_argnums=0)
def _pass_block(spec: BlockSpec, part: Params, x: Array) -> tuple[Array, Array]:
    middle = apply_block(_only(spec, "attn"), part, x)
    return middle, apply_block(_behind_attention(spec), part, middle)


@functools.partial(jax.jit, static_argnums=0)
def _pass_mlp(spec: BlockSpec, part: Params, x: Array) -> Array:
    return apply_block(_behind_attention(spec), part, x)


@functools.partial(jax.jit, static_argnums=0)
def embed_images(config: TransformerConfig, params: Params, images: Array) -> Array:
    """The stream in front of the first block."""
    return embed(config, params, images)


@functools.partial(jax.jit, static_argnums=0)
def _features(config: TransformerConfig, params: Params, x: Array) -> Float[Array, "b 1 e"]:
    return pool(config, params, x)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: TransformerConfig, params: Params, x: Array) -> Float[Array, "b 1 c"]:
    return classify(config, params, x)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _predicted(
    config: TransformerConfig, params: Params, x: Array, real: Float[Array, "b"]
) -> Float[Array, "c"]:
    return real @ jax.nn.softmax(classify(config, params, x).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logit_sums(
    spec: BlockSpec,
    devices: int,
    part: Params,
    x: Float[Array, "b n d"],
    real: Float[Array, "b"],
    weights: Float[Array, "n"],
) -> tuple[Float[Array, "v h k k"], Float[Array, "v h k k"], Float[Array, "v"]]:
    taps = apply_block_with_taps(_only(spec, "attn"), part, x)[1]
    rows = real[:, None] * weights
    if spec.window:
        windows = spec.tokens // spec.attended
        rows = jnp.broadcast_to(real[:, None, None], (len(real), windows, spec.attended))

    def by_device(a: Array, behind: int) -> Array:
        # Shapes in full, as in `_add_rows`.
        outer, inner = a.shape[: a.ndim - behind], a.shape[a.ndim - behind :]
        return a.reshape(devices, math.prod(outer) // devices, *inner).astype(jnp.float32)

    def gram(a: Array, weighted: Array) -> Array:
        return jnp.einsum("vbnhk,vbnhl->vhkl", a, weighted, precision=_HIGHEST)

    q, k = (by_device(taps[name], 3) for name in ("q", "k"))
    # What all keys have in common does not count, and would cancel only up to rounding.
    k = k - k.mean(axis=2, keepdims=True)
    attention, rows = by_device(taps["attention"], 3), by_device(rows, 1)[..., None, None]
    attended = jnp.einsum("vbhnm,vbmhk->vbnhk", attention, k, precision=_HIGHEST)
    received = (attention * rows[:, :, None, :, 0]).sum(axis=3).swapaxes(2, 3)[..., None]
    keys = gram(k, received * k) - gram(attended, rows * attended)
    return gram(q, rows * q), keys, rows.sum(axis=(1, 2, 3, 4))
