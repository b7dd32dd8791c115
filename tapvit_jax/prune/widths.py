"""Rules that share pruning out over layers: from layer scores to keep ratios.

A rule is a function of one number t in [0, 1]: 1 keeps everything, 0 nothing, and no ratio ever
grows when t falls. `allocate` finds the largest t that fits a budget.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig

BRANCHES = ("mlp", "attn")

Keeps = dict[str, Float[np.ndarray, "l"]]
"""Keep ratio of every block's branch; 0 where the branch is absent."""

Rule = Callable[[float], Keeps]

# Divergence falls faster than the pruned share, else single units would matter more than layers.
_LEAST_POWER, _MOST_POWER = 1.2, 8.0
_NO_DIVERGENCE = 1e-12


class BranchScores(Protocol):
    """What the rules ask of layer scores (see `importance.layers.LayerScores`)."""

    sparsity: tuple[float, ...]
    mlp: Float[np.ndarray, "s l"]
    attn: Float[np.ndarray, "s l"]


def softmax_keep(weights: Float[np.ndarray, "l"], average: float) -> Float[np.ndarray, "l"]:
    """Keep ratios as published, from softmax weights w: clip(w_l L average, 0, 1).

    Clipping loses what it cuts, so that the mean falls short of `average`; `water_fill` does not.

    Source: TAP-ViTs (arXiv 2601.02437).
    """
    return np.clip(np.asarray(weights) * len(weights) * average, 0.0, 1.0)


def water_fill(
    weights: Float[np.ndarray, "l"], average: float, low: float = 0.0
) -> Float[np.ndarray, "l"]:
    """Keep ratios proportional to weights, inside [low, 1], whose mean is exactly `average`.

        keep_l = clip(c w_l, low, 1),  c such that mean(keep) = average

    Source: ours.

    Raises:
      InputError: `average` outside [low, 1], or weights that are not positive.
    """
    weights = np.asarray(weights, np.float64)
    if not low <= average <= 1:
        raise InputError(f"average keep ratio {average} lies outside [{low}, 1]")
    if not np.all(weights > 0) or not np.all(np.isfinite(weights)):
        raise InputError("layer weights must be positive and finite")
    # The mean grows with c in straight pieces that end where a layer reaches low or 1: find the
    # piece, then solve it exactly.
    knots = np.unique(np.concatenate([low / weights, 1.0 / weights]))
    means = np.clip(knots[:, None] * weights, low, 1.0).mean(axis=1)
    if average >= means[-1]:
        return np.ones_like(weights)
    right = int(np.searchsorted(means, average, side="right"))
    if right == 0:
        return np.clip(average / max(means[0], 1e-300) * knots[0] * weights, low, 1.0)
    step = (average - means[right - 1]) / (means[right] - means[right - 1])
    return np.clip(
        (knots[right - 1] + step * (knots[right] - knots[right - 1])) * weights, low, 1.0
    )


def layer_softmax(x: Float[np.ndarray, "l"]) -> Float[np.ndarray, "l"]:
    """Softmax over layers, floored so that a full budget can fill even a hopeless layer."""
    shifted = np.exp(np.maximum(x - x.max(), -60.0))
    return shifted / shifted.sum()


def present_branches(dense: TransformerConfig) -> dict[str, np.ndarray]:
    """Which blocks have each branch."""
    return {
        branch: np.array([getattr(block, branch) for block in dense.blocks]) for branch in BRANCHES
    }


def check_scores(dense: TransformerConfig, layers: BranchScores) -> None:
    """Refuse layer scores that do not belong to the model.

    Raises:
      InputError: another shape, negative, or not finite.
    """
    shape = (len(layers.sparsity), len(dense.blocks))
    for branch in BRANCHES:
        scores = np.asarray(getattr(layers, branch))
        if scores.shape != shape:
            raise InputError(f"layer scores have shape {scores.shape}, expected {shape}")
        # Rounding can push a divergence of nothing a little below zero.
        if not np.isfinite(scores).all() or scores.min() < -1e-4:
            raise InputError("layer scores must be divergences: finite and not negative")


def softmax_rule(
    dense: TransformerConfig,
    layers: BranchScores | None,
    alpha: float,
    attn_share: float,
    share: Callable[[Float[np.ndarray, "l"], float], Float[np.ndarray, "l"]] = water_fill,
) -> Rule:
    """The published rule: a softmax over layers, for MLPs and attention apart.

        keep_l = share(softmax(alpha R), average)_l
        average = t for MLPs and 1 - attn_share (1 - t) for attention

    R is the mean over the probes. Without scores all layers are alike.

    Source: TAP-ViTs (arXiv 2601.02437), where `share` is `softmax_keep`.
    """
    present = present_branches(dense)
    weights = {}
    for branch, there in present.items():
        scores = np.zeros(len(there)) if layers is None else getattr(layers, branch).mean(axis=0)
        weights[branch] = layer_softmax(alpha * scores[there]) if there.any() else np.zeros(0)

    def rule(t: float) -> Keeps:
        # Below t = 0.2 attention follows to zero, so that every feasible budget can be reached.
        attn = (1.0 - attn_share * (1.0 - t)) * min(1.0, t / 0.2)
        averages = {"mlp": t, "attn": attn}
        keeps = {branch: np.zeros(len(there)) for branch, there in present.items()}
        for branch, there in present.items():
            if there.any():
                keeps[branch][there] = share(weights[branch], averages[branch])
        return keeps

    return rule


def divergence_curves(
    layers: BranchScores,
) -> dict[str, tuple[Float[np.ndarray, "l"], Float[np.ndarray, "l"]]]:
    """Fit KL(s) = a s^p to every branch's probes; returns (a, p) by branch.

    Least squares in logarithms; p is kept in [1.2, 8], so that curves are convex, and is 2 when
    there is but one probe. Source: ours.
    """
    x = np.log(np.asarray(layers.sparsity, np.float64))
    curves = {}
    for branch in BRANCHES:
        y = np.log(np.maximum(np.asarray(getattr(layers, branch), np.float64), _NO_DIVERGENCE))
        if len(x) > 1:
            centred = x - x.mean()
            power = (centred[:, None] * y).sum(axis=0) / (centred**2).sum()
        else:
            power = np.full(y.shape[1], 2.0)
        power = np.clip(power, _LEAST_POWER, _MOST_POWER)
        curves[branch] = np.exp((y - power * x[:, None]).mean(axis=0)), power
    return curves


def sensitivity_rule(
    dense: TransformerConfig, layers: BranchScores, branch_costs: dict[str, Float[np.ndarray, "l"]]
) -> Rule:
    """Prune where divergence rises least per unit of cost, over all branches together.

        minimise sum_l a_l s_l^p_l  for a given total cost
        =>  a_l p_l s_l^(p_l - 1) = lambda c_l,  keep_l = 1 - min(s_l, 1)

    with each branch's fitted curve (a, p) and its cost c; t stands for lambda. MLPs and attention
    compete for the same budget, which the published rule does not let them do.

    Source: ours (first-order conditions of the separable problem).
    """
    curves = divergence_curves(layers)
    present = present_branches(dense)
    # Pruning what costs nothing (a fitted time can be zero) gains nothing.
    priced = {b: there & (branch_costs[b] > 0) for b, there in present.items()}
    slopes = [
        (curves[b][0] * curves[b][1])[some] / branch_costs[b][some] for b, some in priced.items()
    ]
    slopes = np.concatenate(slopes)
    scale = float(np.median(slopes)) if len(slopes) else 1.0

    def rule(t: float) -> Keeps:
        keeps = {}
        for branch, there in present.items():
            a, p = curves[branch]
            if t <= 0.0:
                pruned = np.ones(len(there))
            else:
                price = scale * ((1.0 - t) / t) ** 4
                ratio = price * branch_costs[branch] / (a * p)
                pruned = np.minimum(ratio ** (1.0 / (p - 1.0)), 1.0)
                pruned = np.where(priced[branch], pruned, 0.0)
            keeps[branch] = np.where(there, 1.0 - pruned, 0.0)
        return keeps

    return rule
