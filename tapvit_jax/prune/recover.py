"""Closed-form recovery: least squares for what is left, so that little is left to fine-tune.

Pruned units are nearly linear in the kept ones, on the images that matter to a device. What they
contributed is solved for in the layer behind them, from second moments over the metric dataset; no
labels, no gradients. Queries, keys and values may also change their basis, since nothing but matrix
products lies between them and what they are for: a head of r dims then holds the best subspace of
that many dims, not r of the old ones.

Letters: b images, n tokens, d embedding, h heads, k dims of a head, f MLP hidden.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan, apply_masks, check_plan
from tapvit_jax.prune.moments import Moments, Ridge, merge_all
from tapvit_jax.prune.streams import Streams
from tapvit_jax.prune.units import unit_key
from tapvit_jax.structs import check_fields, to_plain
from tapvit_jax.train.classes import prior_weights

Method = Literal["none", "prior", "mean", "ridge"]

# Beyond this share of an MLP's units, products with all of them cost less than a target more.
_MOSTLY_KEPT = 0.75
# Keeps Cholesky factors of Gram matrices finite: relative to the mean eigenvalue.
_JITTER = 1e-6


@dataclasses.dataclass(frozen=True)
class RecoverConfig:
    """How a pruned model is recovered without training.

    Attributes:
      method: "ridge" solves the layer behind every pruned group; "mean" only folds what pruned
        units contribute on average into its bias (VBP, arXiv 2507.12988); "prior" only moves the
        classes' prior; "none" does nothing.
      order: "sequential" goes block by block on the already recovered prefix and aims at the dense
        model's residual stream, so that later blocks repair what earlier ones lost; "parallel" lets
        all blocks see the dense model's activations, as CORP does (arXiv 2602.05243), but for what
        a branch that is gone right before them would have added. In both, what branches that are
        gone at the end would have added is left to the classifier where that is solved, else its
        mean goes into the bias of the last branch that stays.
      attention: "low_rank" gives each head the best subspace of its width, for queries and keys in
        the sense of the attention logits, for values in the sense of the branch's output; "kept"
        keeps the dims that the plan names and solves around them; "weights" takes the subspace of
        the weights alone, as NuWa does (arXiv 2504.03118).
      head: also solve the classifier, towards the dense logits; in sequential order, and where one
        token alone is classified (not DeiT's distilled models, whose two classifiers stay).
      prior: moves the classifier's bias to the classes that the device sees, whatever the plan is
        (see `prior_weights`): more accurate on a device that sees some classes, less faithful to
        the dense model. They follow from the device's mixture (see `proxy.shares`) with "mixture",
        from the dense model's mean prediction on the metric dataset with "metric". "dense" leaves
        the bias alone, and so does a dense model whose own was moved before.
    """

    method: Method = "ridge"
    order: Literal["sequential", "parallel"] = "sequential"
    attention: Literal["low_rank", "kept", "weights"] = "low_rank"
    head: bool = True
    prior: Literal["dense", "metric", "mixture"] = "dense"

    def __post_init__(self):
        check_fields(self)
        if self.method == "prior" and self.prior == "dense":
            raise InputError("method 'prior' does nothing with prior 'dense', expected another")

    @property
    def moves_prior(self) -> bool:
        """Whether what it recovers gets a device's prior."""
        return self.method != "none" and self.prior != "dense"


def recover(
    model: Model,
    plan: Plan,
    batches: Iterable[Any],
    method: Method | None = None,
    *,
    config: RecoverConfig | None = None,
    prior: Float[np.ndarray, "c"] | None = None,
    mesh: Mesh | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> Model:
    """Prune by a plan and make up for it in closed form.

        MLP          min |h_S W + b - t|^2,  t = dense stream behind the block - stream before it
        V and O      values V_h T_h, W over all heads at once against the same kind of target
        Q and K      min |Q_h (I - T T'^T) K_h^T| under the attention weights
        classifier   min |x W + b - dense logits|^2

    each with a ridge towards what a simpler recovery gives, its weight chosen on held-out images.
    A plan that keeps everything returns the model as it is, but for the classes' prior if asked.

    Args:
      model: the dense model.
      plan: what is kept; it may come from any criterion.
      batches: images of the metric dataset, as in `neuron_importance`; labels are not used. Of
        several processes, each brings its own. The tokens of all images are kept, in a block up to
        four times: 4 x images x tokens x embed_dim x 4 bytes, and once all heads' outputs.
      method: overrides the config's.
      config: see `RecoverConfig`.
      prior: weights of the classes (see `prior_weights`) for the config's prior; without them,
        "metric" predicts the batches itself. A model that has a prior keeps it.
      mesh: devices of this process that share every batch's images; by default all.
      on_share: called with every share of the work that is done.

    Returns:
      The masked model: dense shapes, pruned entries zero, so that `reshape` makes it smaller.

    Raises:
      InputError: a plan for another config, no images, activations that are not finite, or a prior
        that is missing, that nothing uses, or that is no weight above 0 for every class.

    Source: ours; least squares behind pruned units as in CORP (arXiv 2602.05243) and NuWa (arXiv
    2504.03118), low-rank attention as NuWa's, in the activations' metric.
    """
    check_plan(model, plan)
    config = config or RecoverConfig()
    if method is not None:
        config = dataclasses.replace(config, method=method)
    _check_prior(model, config, prior)
    masked = apply_masks(model, plan)
    whole = all(mask.all() for mask in plan.keep.values())
    shifts = config.moves_prior and not model.prior
    recovers = config.method in ("mean", "ridge") and not whole
    if not (recovers or shifts):
        return masked
    streams = Streams(model, batches, mesh)
    params = jax.tree.map(np.asarray, masked.params)
    untouched = True
    for i in range(len(model.config.blocks)):
        name = f"blocks_{i}"
        keep = {
            key.partition("/")[2]: m for key, m in plan.keep.items() if key.startswith(f"{name}/")
        }
        untouched = untouched and all(mask.all() for mask in keep.values())
        if untouched or not recovers:
            streams.skip(i)
        else:
            part = _recover_block(streams, i, params.get(name, {}), keep, config)
            # A block without branches has no parameters, and no masks.
            params = params | ({name: part} if part else {})
        on_share(1.0 / len(model.config.blocks))
    # In parallel, the classifier is left to what it has always seen.
    solvable = config.order == "sequential" and not getattr(model.config, "distilled", False)
    if config.head and config.method == "ridge" and recovers and solvable:
        params = params | {"head": _solve_head(model, streams.head_moments())}
    elif recovers and (last := _last_before_gone(plan)) is not None:
        params = params | _with_mean(params, *last, streams.missing_mean())
    done = config if shifts else dataclasses.replace(config, prior="dense")
    found = model.replace(
        params=jax.tree.map(jnp.asarray, params),
        history={**model.history, "recovered": to_plain(done)},
    )
    if not shifts:
        return found
    return move_prior(found, prior_weights(*streams.class_shares()) if prior is None else prior)


def move_prior(model: Model, weights: Float[np.ndarray, "c"]) -> Model:
    """Move the classifier's bias to the classes that a device sees: b + log w, once.

    Args:
      model: dense or pruned; a distilled one has two classifiers.
      weights: of the classes, see `prior_weights`.

    Raises:
      InputError: a model that has a device's prior, or weights that are not above 0 and finite, one
        a class.

    Source: label shift (Saerens et al., 2002).
    """
    if model.prior:
        raise InputError(f"{model.name}: has a device's prior already, which counts once")
    _check_weights(weights, model.config.num_classes)
    shift = np.log(weights).astype(np.float32)
    heads = {n: model.params[n] for n in ("head", "head_dist") if n in model.params}
    moved = {name: head | {"bias": head["bias"] + shift} for name, head in heads.items()}
    return model.replace(params={**model.params, **moved}, prior=True)


def _check_prior(model: Model, config: RecoverConfig, prior: Float[np.ndarray, "c"] | None) -> None:
    if prior is None:
        if config.moves_prior and config.prior == "mixture" and not model.prior:
            raise InputError("prior is missing, expected weights of the classes for 'mixture'")
        return
    if not config.moves_prior:
        raise InputError("prior: nothing uses it, expected config.prior 'mixture' or 'metric'")
    _check_weights(prior, model.config.num_classes)


def _check_weights(prior: Float[np.ndarray, "c"], count: int) -> None:
    weights = np.asarray(prior)
    if weights.shape != (count,):
        raise InputError(f"prior has shape {weights.shape}, expected ({count},)")
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise InputError("prior holds no weights, expected finite ones above 0")


def _recover_block(
    streams: Streams,
    i: int,
    part: Params,
    keep: dict[str, Bool[np.ndarray, "..."]],
    config: RecoverConfig,
) -> Params:
    """A block's recovered parameters in dense shapes; takes the streams through it."""
    dense = streams.begin(i, parallel=config.order == "parallel")
    ridge = config.method == "ridge"
    low_rank = ridge and config.attention != "kept"
    by_weights = ridge and config.attention == "weights"
    if "attn" in dense and keep["attn_branch"]:
        queries_keys = keep["qk"] & keep["head"][:, None]
        if ridge and not queries_keys.all():
            if by_weights:
                grams = tuple(_weight_gram(dense["attn"], name) for name in ("q", "k"))
            else:
                grams = streams.logit_moments(dense)
            solved = solve_queries_keys(dense["attn"], *grams, queries_keys, low_rank)
            part = part | {"attn": part["attn"] | solved}
        # Queries and keys as recovered, and all values.
        whole = part["attn"] | {name: dense["attn"][name] for name in ("v", "proj")}
        folds = streams.attention_moments(part | {"attn": whole})
        values = keep["vo"] & keep["head"][:, None]
        scale = layer_scale(dense, "ls1")
        gram = _weight_gram(dense["attn"], "v") if by_weights else None
        solved, branch = solve_values(dense["attn"], folds, values, ridge, low_rank, scale, gram)
        part = part | {"attn": part["attn"] | solved}
        streams.pass_attention(*branch)
    else:
        streams.pass_no_attention()
    if "mlp" in dense and keep["mlp_branch"]:
        mlp, kept, scale = dense["mlp"], keep["mlp"], layer_scale(dense, "ls2")
        kernel = np.asarray(mlp["fc2"]["kernel"], np.float64) * scale
        if np.sum(kept) >= _MOSTLY_KEPT * len(kept):
            folds = kept_moments(streams.hidden_moments(part | {"mlp": mlp}), kept, kernel)
        else:
            folds = streams.kept_hidden_moments(part | {"mlp": mlp}, kept, kernel)
        solved = solve_mlp(mlp, *folds, kept, ridge, scale)
        part = part | {"mlp": solved}
        streams.pass_mlp(part, kept)
    else:
        streams.pass_no_mlp()
    return part


def _last_before_gone(plan: Plan) -> tuple[str, str] | None:
    """Block and branch that stay, behind which branches go and nothing else reads the stream."""
    gone = False
    for i in reversed(range(len(plan.config.blocks))):
        for branch in ("mlp", "attn"):
            if not getattr(plan.config.blocks[i], branch):
                continue
            if plan.keep[unit_key(i, f"{branch}_branch")]:
                return (f"blocks_{i}", branch) if gone else None
            gone = True
        if plan.config.block_spec(i).merge:
            return None
    return None


def _with_mean(params: Params, block: str, branch: str, mean: Float[np.ndarray, "d"]) -> Params:
    """A block whose branch adds a constant more."""
    part = params[block]
    name, scale = ("fc2", "ls2") if branch == "mlp" else ("proj", "ls1")
    layer, scale = part[branch][name], layer_scale(part, scale)
    more = np.divide(mean, scale, out=np.zeros_like(mean), where=np.not_equal(scale, 0.0))
    layer = layer | {"bias": np.asarray(layer["bias"] + more, np.float32)}
    return {block: part | {branch: part[branch] | {name: layer}}}


def _solve_head(model: Model, folds: Sequence[Moments]) -> Params:
    """The classifier that makes the dense logits of the recovered features."""
    kernel = np.asarray(model.params["head"]["kernel"], np.float64)
    kernel, bias = Ridge(folds).solve(folds, kernel)
    return _float32({"kernel": kernel, "bias": bias})


def _weight_gram(attn: Params, name: str) -> Float[np.ndarray, "h k k"]:
    """Second moments of a projection's outputs if all its inputs were white."""
    kernel = np.asarray(attn[name]["kernel"], np.float64)
    return np.einsum("dhk,dhl->hkl", kernel, kernel)


def layer_scale(part: Params, name: str) -> Float[np.ndarray, "d"] | float:
    """The layer scale of that name, 1 without one."""
    return np.asarray(part[name]["gamma"], np.float64) if name in part else 1.0


def kept_moments(
    folds: Sequence[Moments], keep: Bool[np.ndarray, "f"], kernel: Float[np.ndarray, "f d"]
) -> tuple[list[Moments], list[Moments]]:
    """From moments of all features, those of the kept ones, with the targets and with what all
    features make of a kernel for targets.
    """
    kept, kernel = np.flatnonzero(keep), np.asarray(kernel, np.float64)
    linear = [fold.with_linear_target(kernel).select(kept) for fold in folds]
    return [fold.select(kept) for fold in folds], linear


def solve_mlp(
    mlp: Params,
    inputs: Sequence[Moments],
    linear: Sequence[Moments],
    keep: Bool[np.ndarray, "f"],
    ridge: bool = True,
    scale: Float[np.ndarray, "d"] | float = 1.0,
) -> Params:
    """An MLP's parameters with its pruned units at zero and made up for.

    Args:
      mlp: dense parameters.
      inputs: moments of the kept hidden units and what the branch should add to the stream.
      linear: of the kept units and what the dense second layer makes of all of them.
      keep: units that stay.
      ridge: solve the second layer, else its bias only.
      scale: layer scale behind the branch.
    """
    kept = np.flatnonzero(keep)
    dense = np.asarray(mlp["fc2"]["kernel"], np.float64) * scale
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
    grams: Float[np.ndarray, "h v v"] | None = None,
) -> tuple[Params, tuple[Float[np.ndarray, "hv d"], Float[np.ndarray, "d"]]]:
    """Values and projection with as many dims a head as are kept.

    Args:
      attn: dense parameters.
      folds: moments of all heads' outputs and what the branch should add to the stream.
      keep: dims that stay; with `low_rank` their number counts, and they are where the new basis
        is put.
      ridge: solve the projection over all heads at once, else its bias only.
      low_rank: give each head the subspace that its part of the projection needs most,
        T = W V_r with V the right singular vectors of C^(1/2) W; beyond as many dims as the stream
        has, any orthogonal ones.
      scale: layer scale behind the branch.
      grams: C of each head; None takes it from `folds`.

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
            gram = total.xx[rows, rows] if grams is None else grams[h]
            turn = _value_basis(gram, dense[rows], len(kept))
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
    # A layer scale of zero adds nothing, whatever the stream lacks there.
    seen = np.not_equal(scale, 0.0)
    branch = _float32((turn @ found * seen, bias * seen))
    return _float32({"v": values, "proj": solved}), branch


def _value_basis(
    covariance: Float[np.ndarray, "v v"], weights: Float[np.ndarray, "v d"], rank: int
) -> Float[np.ndarray, "v r"]:
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    right = np.linalg.svd(root @ weights, full_matrices=False)[2][:rank]
    turn = weights @ right.T
    turn = turn / np.maximum(np.linalg.norm(turn, axis=0), np.finfo(np.float64).tiny)
    # A head wider than the stream needs no more dims than that; others may tell what else it lacks.
    rest = np.linalg.qr(turn, mode="complete")[0][:, turn.shape[1] : rank]
    return np.concatenate([turn, rest], axis=1)


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
      queries: mean of q q^T over all tokens.
      keys: mean over queries of the covariance of the keys that they attend to: the softmax ignores
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
