"""Rules that share pruning out over layers: from layer scores to keep ratios.

A rule is a function of one number t in [0, 1]: 1 keeps everything, 0 nothing, and cost never grows
when t falls. `allocate` finds the largest t that fits a budget. Rules by the scores of single units
are in `prune.ranking`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.prune.units import unit_table

BRANCHES = ("mlp", "attn")

PARTS = {"mlp": ("mlp",), "attn": ("qk", "vo", "head"), "qk": ("qk",), "vo": ("vo",)}
"""What layer scores may be about, and the kinds of units in it."""

Keeps = dict[str, Float[np.ndarray, "l"]]
"""Keep ratio of every block's part, by the names of `PARTS`; 0 where it is absent."""

GroupKeeps = dict[str, float]
"""Keep ratio by group key."""

Rule = Callable[[float], GroupKeeps]

# Divergence falls faster than the pruned share, else single units would matter more than layers.
_LEAST_POWER, _MOST_POWER = 1.2, 8.0
_NO_DIVERGENCE = 1e-12


class BranchScores(Protocol):
    """What the rules ask of layer scores (see `importance.layers.LayerScores`)."""

    sparsity: tuple[float, ...]
    mlp: Float[np.ndarray, "s l"]
    attn: Float[np.ndarray, "s l"]
    qk: Float[np.ndarray, "s l"] | None
    vo: Float[np.ndarray, "s l"] | None


def scored_parts(layers: BranchScores) -> tuple[str, ...]:
    """The parts of a block that compete: attention whole, or in two where it was probed so."""
    return BRANCHES if layers.qk is None else ("mlp", "qk", "vo")


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


def present_parts(
    dense: TransformerConfig, parts: tuple[str, ...] = BRANCHES
) -> dict[str, np.ndarray]:
    """Which blocks have each part."""
    branches = {part: "mlp" if part == "mlp" else "attn" for part in parts}
    return {
        part: np.array([getattr(block, branch) for block in dense.blocks])
        for part, branch in branches.items()
    }


def by_group(dense: TransformerConfig, keeps: Keeps) -> GroupKeeps:
    """Keep ratios of groups of units from those of the parts that they lie in."""
    part_of = {kind: part for part in keeps for kind in PARTS[part]}
    return {
        group.key: float(keeps[part_of[group.kind]][group.block])
        for group in unit_table(dense)
        if group.kind in part_of
    }


def check_scores(dense: TransformerConfig, layers: BranchScores) -> None:
    """Refuse layer scores that do not belong to the model.

    Raises:
      InputError: another shape, negative, or not finite.
    """
    shape = (len(layers.sparsity), len(dense.blocks))
    for part in {*BRANCHES, *scored_parts(layers)}:
        scores = np.asarray(getattr(layers, part))
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
    present = present_parts(dense)
    weights = {}
    for branch, there in present.items():
        scores = np.zeros(len(there)) if layers is None else getattr(layers, branch).mean(axis=0)
        weights[branch] = layer_softmax(alpha * scores[there]) if there.any() else np.zeros(0)

    def rule(t: float) -> GroupKeeps:
        # Below t = 0.2 attention follows to zero, so that every feasible budget can be reached.
        attn = (1.0 - attn_share * (1.0 - t)) * min(1.0, t / 0.2)
        averages = {"mlp": t, "attn": attn}
        keeps = {branch: np.zeros(len(there)) for branch, there in present.items()}
        for branch, there in present.items():
            if there.any():
                keeps[branch][there] = share(weights[branch], averages[branch])
        return by_group(dense, keeps)

    return rule


def divergence_curves(
    layers: BranchScores,
) -> dict[str, tuple[Float[np.ndarray, "l"], Float[np.ndarray, "l"]]]:
    """Fit KL(s) = a s^p to every part's probes; returns (a, p) by part.

    Least squares in logarithms; p is kept in [1.2, 8], so that curves are convex, and is 2 when
    there is but one probe. Source: ours.
    """
    x = np.log(np.asarray(layers.sparsity, np.float64))
    curves = {}
    for part in scored_parts(layers):
        y = _log_divergence(layers, part)
        if len(x) > 1:
            centred = x - x.mean()
            power = (centred[:, None] * y).sum(axis=0) / (centred**2).sum()
        else:
            power = np.full(y.shape[1], 2.0)
        power = np.clip(power, _LEAST_POWER, _MOST_POWER)
        curves[part] = np.exp((y - power * x[:, None]).mean(axis=0)), power
    return curves


def _log_divergence(layers: BranchScores, part: str) -> Float[np.ndarray, "s l"]:
    return np.log(np.maximum(np.asarray(getattr(layers, part), np.float64), _NO_DIVERGENCE))


def sensitivity_rule(
    dense: TransformerConfig, layers: BranchScores, part_costs: Mapping[str, Float[np.ndarray, "l"]]
) -> Rule:
    """Prune where divergence rises least per unit of cost, over all parts of blocks together.

        minimise sum_l a_l s_l^p_l  for a given total cost
        =>  a_l p_l s_l^(p_l - 1) = lambda c_l,  keep_l = 1 - min(s_l, 1)

    with each part's fitted curve (a, p) and its cost c; t stands for lambda. MLPs and attention
    compete for the same budget, which the published rule does not let them do.

    Source: ours (first-order conditions of the separable problem).
    """
    curves = divergence_curves(layers)
    present = present_parts(dense, scored_parts(layers))
    # Pruning what costs nothing (a fitted time can be zero) gains nothing.
    priced = {part: there & (part_costs[part] > 0) for part, there in present.items()}
    slopes = [
        (curves[p][0] * curves[p][1])[some] / part_costs[p][some] for p, some in priced.items()
    ]
    slopes = np.concatenate(slopes)
    scale = float(np.median(slopes)) if len(slopes) else 1.0

    def rule(t: float) -> GroupKeeps:
        keeps = {}
        for part, there in present.items():
            a, p = curves[part]
            if t <= 0.0:
                pruned = np.ones(len(there))
            else:
                price = scale * ((1.0 - t) / t) ** 4
                ratio = price * part_costs[part] / (a * p)
                pruned = np.minimum(ratio ** (1.0 / (p - 1.0)), 1.0)
                pruned = np.where(priced[part], pruned, 0.0)
            keeps[part] = np.where(there, 1.0 - pruned, 0.0)
        return by_group(dense, keeps)

    return rule


def measured_divergence(
    layers: BranchScores, part: str, sparsity: Float[np.ndarray, "v"]
) -> Float[np.ndarray, "v l"]:
    """Divergence at any sparsity, straight lines between the probes in logarithms.

    Never falling with sparsity; beyond the probes the next line goes on, its power kept in
    [1.2, 8]. Source: ours.
    """
    order = np.argsort(layers.sparsity)
    x = np.log(np.asarray(layers.sparsity, np.float64)[order])
    y = np.maximum.accumulate(_log_divergence(layers, part)[order], axis=0)
    slopes = np.diff(y, axis=0) / np.diff(x)[:, None] if len(x) > 1 else np.full_like(y, 2.0)
    first, last = (np.clip(slopes[end], _LEAST_POWER, _MOST_POWER) for end in (0, -1))
    found = np.zeros((len(sparsity), y.shape[1]))
    some = sparsity > 0
    at = np.log(sparsity[some])[:, None]
    inside = np.stack([np.interp(at[:, 0], x, column) for column in y.T], axis=1)
    inside = np.where(at < x[0], y[0] + first * (at - x[0]), inside)
    found[some] = np.exp(np.where(at > x[-1], y[-1] + last * (at - x[-1]), inside))
    return found
