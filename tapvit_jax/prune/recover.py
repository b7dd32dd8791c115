"""Closed-form recovery: least squares for what is left, so that little is left to fine-tune.

Pruned units are nearly linear in the kept ones, on the images that matter to a device. What they
contributed is solved for in the layer behind them, from second moments over the metric dataset; no
labels, no gradients. Queries, keys and values may also change their basis, since nothing but matrix
products lies between them and what they are for: a head of r dims then holds the best subspace of
that many dims, not r of the old ones.

Letters: b images, n tokens, d embedding, h heads, k dims of a head, f MLP hidden.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.neurons import unpack_batch
from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block,
    apply_block_with_taps,
    block_params,
    classify,
    embed,
    pool,
)
from tapvit_jax.models.layers import BlockSpec, from_windows
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import ViTConfig
from tapvit_jax.prune.mask import Plan, apply_masks, check_plan
from tapvit_jax.prune.moments import Moments, Ridge, merge, merge_all, on_host, row_moments
from tapvit_jax.sharding import data_mesh, replicate, shard_rows
from tapvit_jax.structs import check_choices, to_plain

Method = Literal["none", "mean", "ridge"]

# Keeps Cholesky factors of Gram matrices finite: relative to the mean eigenvalue.
_JITTER = 1e-6


@dataclasses.dataclass(frozen=True)
class RecoverConfig:
    """How a pruned model is recovered without training.

    Attributes:
      method: "ridge" solves the layer behind every pruned group; "mean" only folds what pruned
        units contribute on average into its bias (VBP, arXiv 2507.12988); "none" does nothing.
      order: "sequential" goes block by block on the already recovered prefix and aims at the dense
        model's residual stream, so that later blocks repair what earlier ones lost; "parallel" lets
        all blocks see the dense model's activations, as CORP does (arXiv 2602.05243).
      attention: "low_rank" gives each head the best subspace of its width, for queries and keys in
        the sense of the attention logits, for values in the sense of the branch's output; "kept"
        keeps the dims that the plan names and solves around them.
      head: also solve the classifier, towards the dense logits.
    """

    method: Method = "ridge"
    order: Literal["sequential", "parallel"] = "sequential"
    attention: Literal["low_rank", "kept"] = "low_rank"
    head: bool = True

    def __post_init__(self):
        check_choices(self)


def recover(
    model: Model,
    plan: Plan,
    batches: Iterable[Any],
    method: Method | None = None,
    *,
    config: RecoverConfig | None = None,
    mesh: Mesh | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> Model:
    """Prune by a plan and make up for it in closed form.

        MLP          min |h_S W + b - t|^2,  t = dense stream behind the block - stream before it
        V and O      values V_h T_h, W over all heads at once against the same kind of target
        Q and K      min |Q_h (I - T T'^T) K_h^T| under the attention weights
        classifier   min |x W + b - dense logits|^2

    each with a ridge towards what a simpler recovery gives, its weight chosen on held-out images.
    A plan that keeps everything returns the model as it is.

    Args:
      model: the dense model.
      plan: what is kept; it may come from any criterion.
      batches: images of the metric dataset, as in `neuron_importance`; labels are not used. Of
        several processes, each brings its own. All tokens of all images are kept, twice.
      method: overrides the config's.
      config: see `RecoverConfig`.
      mesh: devices of this process that share every batch's images; by default all.
      on_share: called with every share of the work that is done.

    Returns:
      The masked model: dense shapes, pruned entries zero, so that `reshape` makes it smaller.

    Raises:
      InputError: a plan for another config, no images, or activations that are not finite.

    Source: ours; least squares behind pruned units as in CORP (arXiv 2602.05243) and NuWa (arXiv
    2504.03118), low-rank attention as NuWa's, in the activations' metric.
    """
    check_plan(model, plan)
    config = config or RecoverConfig()
    if method is not None:
        config = dataclasses.replace(config, method=method)
    masked = apply_masks(model, plan)
    if config.method == "none" or all(mask.all() for mask in plan.keep.values()):
        return masked
    streams = _Streams(model, batches, mesh)
    params = jax.tree.map(np.asarray, masked.params)
    untouched = True
    for i in range(len(model.config.blocks)):
        name = f"blocks_{i}"
        keep = {
            key.partition("/")[2]: m for key, m in plan.keep.items() if key.startswith(f"{name}/")
        }
        untouched = untouched and all(mask.all() for mask in keep.values())
        if untouched:
            streams.skip(i)
        else:
            params = params | {name: _recover_block(streams, i, params.get(name, {}), keep, config)}
        on_share(1.0 / len(model.config.blocks))
    if config.head and config.method == "ridge" and not getattr(model.config, "distilled", False):
        params = params | {"head": streams.solve_head(params)}
    history = {**model.history, "recovered": to_plain(config)}
    return model.replace(params=jax.tree.map(jnp.asarray, params), history=history)


def _recover_block(
    streams: "_Streams",
    i: int,
    part: Params,
    keep: dict[str, Bool[np.ndarray, "..."]],
    config: RecoverConfig,
) -> Params:
    """A block's recovered parameters in dense shapes; takes the streams through it."""
    dense = streams.begin(i, parallel=config.order == "parallel")
    ridge = config.method == "ridge"
    low_rank = ridge and config.attention == "low_rank"
    if "attn" in dense and keep["attn_branch"]:
        queries_keys = keep["qk"] & keep["head"][:, None]
        if ridge and not queries_keys.all():
            solved = solve_queries_keys(
                dense["attn"], *streams.logit_moments(dense), queries_keys, low_rank
            )
            part = part | {"attn": part["attn"] | solved}
        # Queries and keys as recovered, and all values.
        whole = part["attn"] | {name: dense["attn"][name] for name in ("v", "proj")}
        folds = streams.attention_moments(part | {"attn": whole})
        values = keep["vo"] & keep["head"][:, None]
        scale = _layer_scale(dense, "ls1")
        solved, branch = solve_values(dense["attn"], folds, values, ridge, low_rank, scale)
        part = part | {"attn": part["attn"] | solved}
        streams.pass_attention(*branch)
    else:
        streams.pass_no_attention()
    if "mlp" in dense and keep["mlp_branch"]:
        folds = streams.hidden_moments(part | {"mlp": dense["mlp"]})
        solved = solve_mlp(dense["mlp"], folds, keep["mlp"], ridge, _layer_scale(dense, "ls2"))
        part = part | {"mlp": solved}
    streams.pass_mlp(part)
    return part


def _layer_scale(part: Params, name: str) -> Float[np.ndarray, "d"] | float:
    return np.asarray(part[name]["gamma"], np.float64) if name in part else 1.0


def solve_mlp(
    mlp: Params,
    folds: Sequence[Moments],
    keep: Bool[np.ndarray, "f"],
    ridge: bool = True,
    scale: Float[np.ndarray, "d"] | float = 1.0,
) -> Params:
    """An MLP's parameters with its pruned units at zero and made up for.

    Args:
      mlp: dense parameters.
      folds: moments of all hidden units and what the branch should add to the stream.
      keep: units that stay.
      ridge: solve the second layer, else its bias only.
      scale: layer scale behind the branch.
    """
    kept = np.flatnonzero(keep)
    dense = np.asarray(mlp["fc2"]["kernel"], np.float64) * scale
    inputs = [fold.select(kept) for fold in folds]
    linear = [fold.with_linear_target(dense).select(kept) for fold in folds]
    found, bias = _solve(inputs, linear, dense[kept], ridge)
    kernel = np.zeros_like(dense)
    kernel[kept] = found
    first = {name: np.where(keep, leaf, 0.0) for name, leaf in mlp["fc1"].items()}
    return _float32({"fc1": first, "fc2": _unscaled(kernel, bias, mlp["fc2"], scale)})


def solve_values(
    attn: Params,
    folds: Sequence[Moments],
    keep: Bool[np.ndarray, "h v"],
    ridge: bool = True,
    low_rank: bool = True,
    scale: Float[np.ndarray, "d"] | float = 1.0,
) -> tuple[Params, tuple[Float[np.ndarray, "hv d"], Float[np.ndarray, "d"]]]:
    """Values and projection with as many dims a head as are kept.

    Args:
      attn: dense parameters.
      folds: moments of all heads' outputs and what the branch should add to the stream.
      keep: dims that stay; with `low_rank` their number counts, and they are where the new basis
        is put.
      ridge: solve the projection over all heads at once, else its bias only.
      low_rank: give each head the subspace that its part of the projection needs most,
        T = W V_r with V the right singular vectors of C^(1/2) W.
      scale: layer scale behind the branch.

    Returns:
      The parameters, and the kernel and bias that take the outputs of the heads with all their
      values to the stream.
    """
    heads, dims = keep.shape
    dense = np.asarray(attn["proj"]["kernel"], np.float64)
    dense = dense.reshape(heads * dims, dense.shape[-1]) * scale
    total = merge_all(folds)
    # A model that was pruned before may have no heads.
    basis, centre, slots = [np.zeros((heads * dims, 0))], [dense[:0]], []
    values = {name: np.zeros_like(leaf) for name, leaf in attn["v"].items()}
    for h in range(heads):
        rows, kept = slice(h * dims, (h + 1) * dims), np.flatnonzero(keep[h])
        turn = np.eye(dims)[:, kept]
        if low_rank and 0 < len(kept) < dims:
            turn = _value_basis(total.xx[rows, rows], dense[rows], len(kept))
        for name, leaf in attn["v"].items():
            values[name][..., h, kept] = np.asarray(leaf)[..., h, :] @ turn
        whole = np.zeros((heads * dims, len(kept)))
        whole[rows] = turn
        basis.append(whole)
        centre.append(np.linalg.pinv(turn) @ dense[rows] if len(kept) else turn.T @ dense[rows])
        slots += list(h * dims + kept)
    turn = np.concatenate(basis, axis=1)
    inputs = [fold.project(turn) for fold in folds]
    linear = [fold.with_linear_target(dense).project(turn) for fold in folds]
    found, bias = _solve(inputs, linear, np.concatenate(centre), ridge)
    kernel = np.zeros_like(dense)
    kernel[slots] = found
    solved = _unscaled(kernel, bias, attn["proj"], scale)
    branch = _float32((turn @ found, bias))
    return _float32({"v": values, "proj": solved}), branch


def _value_basis(
    covariance: Float[np.ndarray, "v v"], weights: Float[np.ndarray, "v d"], rank: int
) -> Float[np.ndarray, "v r"]:
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    right = np.linalg.svd(root @ weights, full_matrices=False)[2][:rank]
    turn = weights @ right.T
    return turn / np.maximum(np.linalg.norm(turn, axis=0), np.finfo(np.float64).tiny)


def _solve(
    inputs: Sequence[Moments],
    linear: Sequence[Moments],
    centre: Float[np.ndarray, "f d"],
    ridge: bool,
) -> tuple[Float[np.ndarray, "f d"], Float[np.ndarray, "d"]]:
    """First reproduce what the dense layer makes of its inputs, then what the stream lacks."""
    if not ridge or centre.shape[0] == 0:
        total = merge_all(inputs)
        return centre, total.mean_y - total.mean_x @ centre
    solver = Ridge(inputs)
    centre, _ = solver.solve(linear, centre)
    return solver.solve(inputs, centre)


def _unscaled(
    kernel: Float[np.ndarray, "f d"],
    bias: Float[np.ndarray, "d"],
    dense: Params,
    scale: Float[np.ndarray, "d"] | float,
) -> Params:
    """A layer's parameters in front of its layer scale; a scale of zero hides what they are."""
    seen = np.not_equal(scale, 0.0)
    divisor = np.where(seen, scale, 1.0)
    kernel = np.where(seen, kernel / divisor, 0.0)
    bias = np.where(seen, bias / divisor, dense["bias"])
    return {"kernel": kernel.reshape(np.shape(dense["kernel"])), "bias": bias}


def solve_queries_keys(
    attn: Params,
    queries: Float[np.ndarray, "h k k"],
    keys: Float[np.ndarray, "h k k"],
    keep: Bool[np.ndarray, "h k"],
    low_rank: bool = True,
) -> Params:
    """Queries and keys with as many dims a head as are kept.

        minimise |L_q^T (I - T T'^T) L_k|,   queries = L_q L_q^T,  keys = L_k L_k^T

    With `low_rank`, T = L_q^-T U_r and T' = L_q U_r for the leading left singular vectors U of
    L_q^T L_k; else T' picks the kept dims and T solves for them.

    Args:
      attn: dense parameters.
      queries: sum of q q^T over all tokens.
      keys: sum over queries of the covariance of the keys that they attend to: the softmax ignores
        what all keys have in common, and what is not attended to.
      keep: dims that stay.
      low_rank: see above.
    """
    names = ("q", "k")
    solved = {n: {leaf: np.zeros_like(a) for leaf, a in attn[n].items()} for n in names}
    for h, kept_mask in enumerate(keep):
        kept = np.flatnonzero(kept_mask)
        rank, dims = len(kept), len(kept_mask)
        turns = (np.eye(dims)[:, kept],) * 2
        if 0 < rank < dims:
            left, right = _jittered(queries[h]), _jittered(keys[h])
            if low_rank:
                root, other = np.linalg.cholesky(left), np.linalg.cholesky(right)
                basis = np.linalg.svd(root.T @ other)[0][:, :rank]
                turns = np.linalg.solve(root.T, basis), root @ basis
                balance = np.sqrt(
                    np.linalg.norm(turns[1], axis=0) / np.linalg.norm(turns[0], axis=0)
                )
                turns = turns[0] * balance, turns[1] / balance
            else:
                turns = right[:, kept] @ np.linalg.inv(right[kept][:, kept]), turns[1]
        for name, turn in zip(names, turns, strict=True):
            for leaf, array in attn[name].items():
                solved[name][leaf][..., h, kept] = np.asarray(array)[..., h, :] @ turn
    return _float32(solved)


def _jittered(gram: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    # What float32 leaves of linearly dependent dims may be further below zero than the jitter.
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    return (vectors * (values + _JITTER * values.mean() + np.finfo(np.float32).tiny)) @ vectors.T


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def _token_weights(config: TransformerConfig, i: int) -> Float[np.ndarray, "n"]:
    """Which tokens behind a block anything depends on: behind a ViT's last, those it classifies."""
    weights = np.ones(config.block_spec(i).tokens, np.float32)
    if isinstance(config, ViTConfig) and i == len(config.blocks) - 1:
        prefix = config.num_prefix_tokens
        unused = slice(prefix, None) if config.pool == "cls" else slice(prefix)
        weights[unused] = 0.0
    return weights


class _Streams:
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
            self._target.append(_embed(self._config, self._dense, rows))
        if not all(distributed.gather(np.array(bool(self._real)))):
            raise InputError("recovery needs at least one batch of images in every process")
        self._found = list(self._target)
        # What the dense model has behind the block's attention branch and behind the block.
        self._middle: list[Array] = []
        self._behind: list[Array] = []
        self._heads: list[Array] = []
        self._part: Params = {}
        self._block = 0
        self._parallel = False

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
    def _spec(self) -> BlockSpec:
        return self._config.block_spec(self._block)

    def skip(self, i: int) -> None:
        """Pass a block that is as it was, behind blocks that are as they were."""
        self.begin(i, parallel=False)
        self._found = self._target = self._behind

    def begin(self, i: int, parallel: bool) -> Params:
        """Enter a block; returns its dense parameters. In parallel, it sees what dense ones see."""
        self._block, self._parallel = i, parallel
        part = self._part = block_params(self._dense, i)
        passed = [_pass_block(self._spec, part, x) for x in self._target]
        self._middle, self._behind = [mid for mid, _ in passed], [out for _, out in passed]
        if parallel:
            self._found = list(self._target)
        return jax.tree.map(np.asarray, part)

    def logit_moments(self, part: Params) -> tuple[np.ndarray, np.ndarray]:
        """Of queries and keys in every head; see `solve_queries_keys`."""
        run = functools.partial(_logit_sums, self._spec, self._mesh.size)
        weights = _token_weights(self._config, self._block)
        total = None
        for x, real in zip(self._found, self._real, strict=True):
            found = run(part, x, real, weights)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        own = jax.tree.map(lambda a: np.asarray(a, np.float64).sum(axis=0), jax.device_get(total))
        sums = distributed.sum_over_processes(own)
        _check_finite(sums)
        return sums

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
        self._found = [_merge_patches(self._spec, self._part, x) for x in self._found]
        self._rejoin()

    def _rejoin(self) -> None:
        if self._parallel:
            self._found = list(self._middle)

    def hidden_moments(self, part: Params) -> list[Moments]:
        """Of all hidden units, and what the MLP should add to the stream."""
        weights = _token_weights(self._config, self._block)
        sums = None
        for x, target, real in zip(self._found, self._behind, self._real, strict=True):
            sums = _add_hidden(self._spec, self._mesh.size, part, x, target, real, weights, sums)
        return _checked(sums)

    def pass_mlp(self, part: Params) -> None:
        """Take both streams out of the block."""
        self._found = [_pass_mlp(self._spec, part, x) for x in self._found]
        self._target = self._behind

    def solve_head(self, params: Params) -> Params:
        """The classifier that makes the dense logits of the recovered features."""
        dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self._dense["head"])
        if self._parallel:
            return _float32(dense)
        sums = None
        for x, target, real in zip(self._found, self._target, self._real, strict=True):
            features = _features(self._config, self._dense, x)
            logits = _logits(self._config, self._dense, target)
            sums = _add_rows(self._mesh.size, features, logits, real[:, None], sums)
        folds = _checked(sums)
        kernel, bias = Ridge(folds).solve(folds, dense["kernel"])
        return _float32({"kernel": kernel, "bias": bias})

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_hidden(
    spec: BlockSpec,
    devices: int,
    part: Params,
    x: Float[Array, "b n d"],
    target: Float[Array, "b n d"],
    real: Float[Array, "b"],
    weights: Float[Array, "n"],
    sums: tuple[Moments, ...] | None,
) -> tuple[Moments, ...]:
    """Add the moments of an MLP's hidden units, which take too much memory to keep."""
    hidden = apply_block_with_taps(_behind_attention(spec), part, x)[1]["mlp"]
    return _add_rows(devices, hidden, target - x, real[:, None] * weights, sums)


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
def _embed(config: TransformerConfig, params: Params, images: Array) -> Array:
    return embed(config, params, images)


@functools.partial(jax.jit, static_argnums=0)
def _features(config: TransformerConfig, params: Params, x: Array) -> Float[Array, "b 1 e"]:
    return pool(config, params, x)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: TransformerConfig, params: Params, x: Array) -> Float[Array, "b 1 c"]:
    return classify(config, params, x)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logit_sums(
    spec: BlockSpec,
    devices: int,
    part: Params,
    x: Float[Array, "b n d"],
    real: Float[Array, "b"],
    weights: Float[Array, "n"],
) -> tuple[Float[Array, "v h k k"], Float[Array, "v h k k"]]:
    taps = apply_block_with_taps(_only(spec, "attn"), part, x)[1]
    rows = real[:, None] * weights
    if spec.window:
        windows = spec.tokens // spec.attended
        rows = jnp.broadcast_to(real[:, None, None], (len(real), windows, spec.attended))

    def by_device(a: Array, behind: int) -> Array:
        return a.reshape(devices, -1, *a.shape[a.ndim - behind :]).astype(jnp.float32)

    def gram(a: Array, weighted: Array) -> Array:
        return jnp.einsum("vbnhk,vbnhl->vhkl", a, weighted)

    q, k = (by_device(taps[name], 3) for name in ("q", "k"))
    attention, rows = by_device(taps["attention"], 3), by_device(rows, 1)[..., None, None]
    attended = jnp.einsum("vbhnm,vbmhk->vbnhk", attention, k)
    received = (attention * rows[:, :, None, :, 0]).sum(axis=3).swapaxes(2, 3)[..., None]
    keys = gram(k, received * k) - gram(attended, rows * attended)
    return gram(q, rows * q), keys
