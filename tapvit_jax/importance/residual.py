"""Scores that know of the recovery behind them: what least squares cannot make up for.

A unit that others reproduce costs nothing, however active it is. Units leave one after the other,
or a few at a time, each time those that are missed least once the rest has been solved for again.

Letters: f features, d outputs, h heads, k dims of a head.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.importance.neurons import Scores
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.moments import merge_all
from tapvit_jax.prune.recover import layer_scale
from tapvit_jax.prune.streams import Streams
from tapvit_jax.prune.units import unit_key

# Relative to the mean eigenvalue: what is predictable up to this much counts as predictable.
_RIDGE = 1e-3


def residual_importance(
    model: Model, batches: Iterable[Any], *, rounds: int = 64, mesh: Mesh | None = None
) -> Scores:
    """Squared error that a unit's going leaves in what its branch adds to the stream.

    MLP units are eliminated from h W, value dims of all heads from (V_1 ... V_h) W, and query-key
    dims from the head's logits Q K^T under the attention weights (see `eliminate`), all on the
    dense model's activations.

    Args:
      model: the dense model.
      batches: as in `recover`; labels are not used.
      rounds: units leave in at most so many rounds; 0 is one at a time.
      mesh: devices of this process that share every batch's images; by default all.

    Returns:
      Scores of kinds mlp, qk and vo: mean squared error when the unit left, per token, and for qk
      per pair of tokens.

    Raises:
      InputError: no images, activations that are not finite, or negative rounds.

    Source: ours; optimal brain surgeon (Hassibi and Stork, 1993) for whole units.
    """
    if rounds < 0:
        raise InputError(f"rounds is {rounds}, expected 0 or more")
    streams = Streams(model, batches, mesh)
    scores: Scores = {}
    for i in range(len(model.config.blocks)):
        dense = streams.begin(i, parallel=True)
        if "attn" in dense:
            queries, keys = streams.logit_moments(dense)
            found = [
                eliminate(key, _root(query), rounds)
                for query, key in zip(queries, keys, strict=True)
            ]
            heads, dims = len(queries), queries.shape[-1]
            scores[unit_key(i, "qk")] = np.reshape(found, (heads, dims))
            total = merge_all(streams.attention_moments(dense))
            weights = np.asarray(dense["attn"]["proj"]["kernel"], np.float64)
            flat = weights.reshape(-1, weights.shape[-1]) * layer_scale(dense, "ls1")
            found = eliminate(total.xx / total.weight, flat, rounds)
            scores[unit_key(i, "vo")] = found.reshape(weights.shape[:2])
        streams.see_dense_middle()
        if "mlp" in dense:
            total = merge_all(streams.hidden_moments(dense))
            weights = np.asarray(dense["mlp"]["fc2"]["kernel"], np.float64)
            weights = weights * layer_scale(dense, "ls2")
            scores[unit_key(i, "mlp")] = eliminate(total.xx / total.weight, weights, rounds)
        streams.leave()
    return scores


def eliminate(
    gram: Float[np.ndarray, "f f"], weights: Float[np.ndarray, "f d"], rounds: int = 0
) -> Float[np.ndarray, "f"]:
    """Squared error of x W that each feature's going adds, the cheapest leaving first.

        cost_u = |W_u|^2 / [G^-1]_uu,   W <- W - [G^-1]_:u W_u / [G^-1]_uu

    over the features that are left; G is `gram` with a small ridge. Scores never fall from one that
    leaves to the next, so that they rank features in the order of their going.

    Args:
      gram: second moments of the features.
      weights: of the layer behind them.
      rounds: features leave in at most so many rounds; 0 is one at a time.

    Source: optimal brain surgeon (Hassibi and Stork, 1993), exact for linear layers.
    """
    count = len(gram)
    scores = np.zeros(count)
    if count == 0:
        return scores
    scale = np.trace(gram) / count
    if scale <= 0:
        return scores
    inverse = np.linalg.inv(gram + _RIDGE * scale * np.eye(count))
    weights = np.array(weights, np.float64)
    left = np.arange(count)
    at_once = 1 if rounds == 0 else -(-count // rounds)
    worst = 0.0
    while len(left):
        costs = np.square(weights).sum(axis=1) / np.diag(inverse)
        order = np.argsort(costs, kind="stable")
        going, staying = order[:at_once], np.sort(order[at_once:])
        scores[left[going]] = np.maximum.accumulate(np.maximum(costs[going], worst))
        worst = scores[left[going]].max()
        # Solve for what stays; then the inverse of what stays alone.
        share = np.linalg.solve(inverse[np.ix_(going, going)], inverse[np.ix_(going, staying)]).T
        weights = weights[staying] - share @ weights[going]
        inverse = inverse[np.ix_(staying, staying)] - share @ inverse[np.ix_(going, staying)]
        left = left[staying]
    return scores


def _root(gram: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(np.maximum(values, 0.0))
