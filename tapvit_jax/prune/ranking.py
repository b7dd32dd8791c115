"""Rules that share pruning out by the scores of single units: local, global, isomorphic.

A rule is a function of one number t in [0, 1], as those of `prune.widths`, but its keep ratios are
by group key instead of by branch: 1 keeps everything, 0 nothing, and no ratio ever grows when t
falls. A ratio of r stands for the floor(r n) best of a group's n units (of every head, unless
ragged); what lies beyond the floor says how near the next unit is, for whoever fills up a budget.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.units import (
    WIDTH_FIELDS,
    WIDTH_KINDS,
    Kind,
    UnitGroup,
    check_unit_scores,
    unit_key,
    unit_table,
)
from tapvit_jax.prune.widths import GroupKeeps, Rule

Ranking = Literal["local", "global", "isomorphic"]


def ranking_rule(
    config: TransformerConfig,
    units: Mapping[str, Float[np.ndarray, "..."]],
    ranking: Ranking,
    *,
    costs: Mapping[str, float] | None = None,
    normalize: bool = False,
    ragged: bool = False,
    coupled: bool = False,
    kinds: Sequence[Kind] = WIDTH_KINDS,
) -> Rule:
    """The rule of that name: `local_rule`, `global_rule` or `isomorphic_rule`.

    Raises:
      InputError: an unknown name, or what the rule itself refuses.
    """
    if ranking == "local":
        return local_rule(config, kinds=kinds)
    options = {"costs": costs, "ragged": ragged, "coupled": coupled, "kinds": kinds}
    if ranking == "global":
        return global_rule(config, units, normalize=normalize, **options)
    if ranking == "isomorphic":
        return isomorphic_rule(config, units, **options)
    raise InputError(f"ranking is {ranking!r}, expected one of local, global, isomorphic")


def local_rule(config: TransformerConfig, *, kinds: Sequence[Kind] = WIDTH_KINDS) -> Rule:
    """Units compete within their group only: the ratio is t everywhere. Source: baseline."""
    keys = [group.key for group in _groups(config, kinds)]

    def rule(t: float) -> GroupKeeps:
        return dict.fromkeys(keys, float(t))

    return rule


def global_rule(
    config: TransformerConfig,
    units: Mapping[str, Float[np.ndarray, "..."]],
    *,
    costs: Mapping[str, float] | None = None,
    normalize: bool = False,
    ragged: bool = False,
    coupled: bool = False,
    kinds: Sequence[Kind] = WIDTH_KINDS,
) -> Rule:
    """One threshold over the units of all groups: t is the share of all units that stay.

    Equal scores are shared out evenly over the groups that have them. So that every head of a layer
    keeps equally many dims, dims compete position by position: the i-th best of a layer is the mean
    over its heads of each head's i-th best.

    Args:
      config: the dense model's.
      units: scores by group key.
      costs: cost of one unit by group key; scores are then divided by it (see `unit_costs`).
      normalize: divide scores, or scores by cost, by their mean over all units of their kind, so
        that kinds whose scores are of different size can compete. What one kind costs more than
        another then changes nothing, what its layers cost does.
      ragged: dims compete one by one; ratios are of all heads' dims together.
      coupled: queries, keys and values of a layer keep the same number, by their mean score.
      kinds: which kinds are ranked.

    Raises:
      InputError: scores missing, of another shape, not finite, or negative where they are to be
        divided; costs missing or not positive; unequal dims that are to be coupled.

    Source: global ranking is a baseline; by position, and ties, ours. Normalising kinds: ours, in
    the spirit of isomorphic pruning (arXiv 2407.04616).
    """
    groups = _groups(config, kinds)
    scores = check_unit_scores(config, units, kinds)
    values = _values(groups, scores, costs, normalize, ragged, coupled)
    return _threshold_rule([values], groups, coupled)


def isomorphic_rule(
    config: TransformerConfig,
    units: Mapping[str, Float[np.ndarray, "..."]],
    *,
    costs: Mapping[str, float] | None = None,
    ragged: bool = False,
    coupled: bool = False,
    kinds: Sequence[Kind] = WIDTH_KINDS,
) -> Rule:
    """One threshold for each kind of unit over all layers: t is the share of every kind that stays.

    Units of one kind have the same structure, so that only scores that mean the same are compared:
    MLP units, query-key dims, value dims and heads apart. Options as in `global_rule`.

    Raises:
      InputError: as `global_rule`.

    Source: isomorphic pruning (arXiv 2407.04616); by position, and ties, ours.
    """
    groups = _groups(config, kinds)
    scores = check_unit_scores(config, units, kinds)
    values = _values(groups, scores, costs, False, ragged, coupled)
    kind_of = {group.key: _scope(group, coupled) for group in groups}
    scopes = [
        {key: found for key, found in values.items() if kind_of[key] == kind}
        for kind in dict.fromkeys(kind_of.values())
    ]
    return _threshold_rule(scopes, groups, coupled)


def coupled_scores(
    config: TransformerConfig,
    units: Mapping[str, Float[np.ndarray, "..."]],
    *,
    normalize: bool = False,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Scores by which queries, keys and values of a layer keep the same dims: the mean of both.

    Args:
      config: the dense model's.
      units: scores by group key.
      normalize: as in `global_rule`, before the mean is taken.

    Raises:
      InputError: scores missing, of another shape, not finite, or negative where they are to be
        divided; unequal dims.

    Source: ours.
    """
    groups = _groups(config, WIDTH_KINDS)
    scores = check_unit_scores(config, units, WIDTH_KINDS)
    return _coupled(groups, _normalized(groups, scores) if normalize else scores)


def unit_costs(
    config: TransformerConfig, unit: Literal["macs", "params", "encoder_params"] = "macs"
) -> dict[str, float]:
    """Cost of one unit of kinds mlp, qk, vo and head by group key; a dim's is that in one head.

    Costs are linear in each of these widths. Source: ours.
    """
    full = getattr(cost(config), unit)
    costs = {}
    for group in _groups(config, tuple(WIDTH_FIELDS)):
        block = dataclasses.replace(config.blocks[group.block], **{WIDTH_FIELDS[group.kind]: 0})
        blocks = (*config.blocks[: group.block], block, *config.blocks[group.block + 1 :])
        without = getattr(cost(dataclasses.replace(config, blocks=blocks)), unit)
        costs[group.key] = (full - without) / max(group.size, 1)
    return costs


def _groups(config: TransformerConfig, kinds: Iterable[Kind]) -> list[UnitGroup]:
    return [group for group in unit_table(config) if group.kind in kinds and group.shape]


def _scope(group: UnitGroup, coupled: bool) -> str:
    return "qk" if coupled and group.kind == "vo" else group.kind


@dataclasses.dataclass(frozen=True)
class _Positions:
    """What competes in one group: values from the best on, and how many units each stands for."""

    values: Float[np.ndarray, "n"]
    weight: float


def _values(
    groups: list[UnitGroup],
    scores: dict[str, Float[np.ndarray, "..."]],
    costs: Mapping[str, float] | None,
    normalize: bool,
    ragged: bool,
    coupled: bool,
) -> dict[str, _Positions]:
    """Every group's positions; coupled groups are one, under the name of the queries and keys."""
    if costs is not None:
        _check_divisible(scores)
        scores = {group.key: scores[group.key] / _cost(group, costs) for group in groups}
    if normalize:
        # Behind the costs: a head is worth more than a dim by about what it costs more.
        scores = _normalized(groups, scores)
    sizes = {group.key: float(group.size) for group in groups}
    if coupled:
        scores = _coupled(groups, scores)
        for group in groups:
            if group.kind == "vo":
                del scores[group.key]
                sizes[unit_key(group.block, "qk")] += sizes[group.key]
    positions = {}
    for key, found in scores.items():
        if ragged or found.ndim == 1:
            values = -np.sort(-found, axis=None)
        else:
            values = -np.sort(-found, axis=1)
            values = values.mean(axis=0) if len(values) else np.zeros(values.shape[1])
        positions[key] = _Positions(values, sizes[key] / max(len(values), 1))
    return positions


def _check_divisible(scores: dict[str, Float[np.ndarray, "..."]]) -> None:
    for key, found in scores.items():
        if (found < 0).any():
            raise InputError(f"scores of {key} are negative, expected 0 or more to divide")


def _normalized(
    groups: list[UnitGroup], scores: dict[str, Float[np.ndarray, "..."]]
) -> dict[str, Float[np.ndarray, "..."]]:
    _check_divisible(scores)
    scaled = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        keys = [group.key for group in groups if group.kind == kind]
        every = np.concatenate([scores[key].ravel() for key in keys])
        mean = every.mean() if every.size else 0.0
        scaled |= {key: scores[key] / mean if mean > 0 else scores[key] for key in keys}
    return scaled


def _cost(group: UnitGroup, costs: Mapping[str, float]) -> float:
    value = costs.get(group.key)
    if value is None or (group.size and not 0 < value < np.inf):
        raise InputError(f"cost of a unit of {group.key} is {value}, expected a positive number")
    return value if group.size else 1.0


def _coupled(
    groups: list[UnitGroup], scores: dict[str, Float[np.ndarray, "..."]]
) -> dict[str, Float[np.ndarray, "..."]]:
    joined = dict(scores)
    for group in groups:
        if group.kind == "qk":
            other = unit_key(group.block, "vo")
            if other not in scores or scores[other].shape != group.shape:
                raise InputError(f"blocks_{group.block}: coupled ranking needs as many qk as vo")
            joined[group.key] = joined[other] = (scores[group.key] + scores[other]) / 2
    return joined


def _threshold_rule(
    scopes: list[dict[str, _Positions]], groups: list[UnitGroup], coupled: bool
) -> Rule:
    shares = {key: found for scope in scopes for key, found in _shares(scope).items()}

    def rule(t: float) -> GroupKeeps:
        keeps = {}
        for group in groups:
            partner = unit_key(group.block, "qk") if coupled and group.kind == "vo" else group.key
            knots = shares[partner]
            count = np.interp(t, knots, np.arange(len(knots)))
            keeps[group.key] = float(count / (len(knots) - 1)) if len(knots) > 1 else float(t)
        return keeps

    return rule


def _shares(scope: dict[str, _Positions]) -> dict[str, Float[np.ndarray, "n+1"]]:
    """At which share of a scope's units each group's first, second ... position is kept."""
    keys = list(scope)
    values = np.concatenate([scope[key].values for key in keys]) if keys else np.zeros(0)
    owner = np.repeat(np.arange(len(keys)), [len(scope[key].values) for key in keys])
    weights = np.array([scope[key].weight for key in keys])[owner] if keys else np.zeros(0)
    # Among equal scores, those first that are the nearest to their group's best: ties are shared
    # out evenly instead of all going to the first layers.
    depth = [(np.arange(n) + 1) / n for n in (len(scope[key].values) for key in keys) if n]
    depth = np.concatenate(depth) if depth else np.zeros(0)
    order = np.lexsort((owner, depth, -values))
    kept = np.empty(len(order))
    kept[order] = np.cumsum(weights[order])
    total = kept.max() if len(kept) else 1.0
    return {key: np.append(0.0, kept[owner == i] / total) for i, key in enumerate(keys)}
