"""From scores and a budget to widths, and from widths to the units that stay."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.vit import BlockConfig, ViTConfig
from tapvit_jax.prune.budget import Budget, within
from tapvit_jax.prune.cost import Cost, cost
from tapvit_jax.prune.mask import Plan, top_k_mask
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.prune.units import UnitGroup, unit_key, unit_table
from tapvit_jax.prune.widths import (
    BRANCHES,
    BranchScores,
    Keeps,
    Rule,
    check_scores,
    sensitivity_rule,
    softmax_keep,
    softmax_rule,
)

Counts = dict[str, int]
"""Units to keep by group key; for qk and vo the count is per head, unless ragged."""


@dataclasses.dataclass(frozen=True)
class AllocateConfig:
    """How widths follow from layer scores.

    Attributes:
      widths: "sensitivity" prunes where the divergence rises least per unit of cost, MLPs and
        attention together; "softmax" is the published rule, with a fixed ratio between the two.
      alpha: temperature of the softmax over layers (published: 1.1).
      attn_share: for the softmax, how much of the MLPs' pruned share the attention branches lose on
        average; the published budgets prune .216 of attention where they prune .342 of MLPs.
      min_keep: no branch keeps less than this share of its units.
      min_dim: no branch keeps fewer units than this (dims per head for attention).
      round_to: widths become multiples of this where the dense width allows it.
      ragged: kept attention dims may differ from head to head (as published); reshaping pads them
        to the widest head, and the cost counts the padding.
      coupled: queries, keys and values keep the same index set (as published).
      clip: for the softmax: "water_fill" hands what it gives beyond a full layer to the other
        layers; "clip" drops it, as published, and so falls short of the budget.
    """

    widths: Literal["sensitivity", "softmax"] = "sensitivity"
    alpha: float = 1.1
    attn_share: float = 0.216 / 0.342
    min_keep: float = 0.1
    min_dim: int = 1
    round_to: int = 1
    ragged: bool = False
    coupled: bool = False
    clip: Literal["water_fill", "clip"] = "water_fill"

    def __post_init__(self):
        if self.round_to < 1 or self.min_dim < 1:
            raise InputError("round_to and min_dim must be 1 or more")
        if not 0 <= self.min_keep <= 1 or not 0 < self.attn_share <= 1:
            raise InputError("min_keep must lie in [0, 1] and attn_share in (0, 1]")

    @classmethod
    def as_published(cls) -> "AllocateConfig":
        """Softmax, clipped, ragged and coupled, as in TAP-ViTs (arXiv 2601.02437)."""
        return cls(widths="softmax", min_keep=0.0, ragged=True, coupled=True, clip="clip")


def allocate(
    model: Any,
    units: Mapping[str, Float[np.ndarray, "..."]],
    layers: BranchScores | None,
    budget: Budget,
    *,
    config: AllocateConfig | None = None,
) -> Plan:
    """Choose every width and every kept unit of a model under a budget.

    A rule (see `prune.widths`) turns layer scores and one number t into keep ratios; t is the
    largest that fits the budget; then single steps fill what rounding left, until no further step
    of any width fits. So the result never exceeds the budget and cannot be grown inside it.

    Args:
      model: a `Model` or its config.
      units: scores by group key for kinds mlp, qk and vo.
      layers: layer scores; None treats all layers alike, under the softmax rule.
      budget: bounds on parameters, MACs or both.
      config: temperature, floors, rounding, published switches.

    Raises:
      InputError: an infeasible budget (names the smallest feasible value), or missing scores.

    Source: softmax as published (arXiv 2601.02437); all else is ours.
    """
    dense: ViTConfig = getattr(model, "config", model)
    config = config or AllocateConfig()
    check_budget(dense, budget, config)
    limits = budget.limits(dense)
    groups = [group for group in unit_table(dense) if group.kind in ("mlp", "qk", "vo")]
    missing = [group.key for group in groups if group.key not in units]
    if missing:
        raise InputError(f"no scores for {', '.join(missing)}")
    planner = _Planner(dense, config, groups, units)
    rule = _rule(dense, config, layers, limits)

    low, high = 0.0, 1.0
    best = planner.counts(rule(0.0))
    if not planner.fits(best, limits):
        # Only ragged plans get here: how widely they pad is not known before the scores are.
        least = cost(planner.config_of(best))
        raise InputError(f"infeasible budget: {_too_small(least, dense, budget)}")
    if planner.fits(full := planner.counts(rule(1.0)), limits):
        best, low = full, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        counts = planner.counts(rule(middle))
        if planner.fits(counts, limits):
            best, low = counts, middle
        else:
            high = middle
    if config.clip == "clip" and config.widths == "softmax":
        clipped = softmax_rule(dense, layers, config.alpha, config.attn_share, softmax_keep)
        return planner.plan(planner.counts(clipped(low)))
    return planner.plan(planner.fill(best, planner.ideal(rule(low)), limits))


def check_budget(model: Any, budget: Budget, config: AllocateConfig | None = None) -> None:
    """Refuse a budget that even the narrowest widths exceed, before any work is done.

    Raises:
      InputError: names every infeasible bound and its smallest feasible value.
    """
    dense: ViTConfig = getattr(model, "config", model)
    problems = _too_small(smallest_cost(dense, config or AllocateConfig()), dense, budget)
    if problems:
        raise InputError(f"infeasible budget: {problems}")


def _too_small(smallest: Cost, dense: ViTConfig, budget: Budget) -> str:
    full = cost(dense)
    problems = []
    for unit, limit in budget.limits(dense).items():
        least = getattr(smallest, unit)
        if least > limit:
            problems.append(
                f"{unit}={budget.bounds()[unit]} allows {limit}, the smallest feasible is {least} "
                f"(a fraction of {_round_up(least / getattr(full, unit)):.4f})"
            )
    return "; ".join(problems)


def smallest_cost(dense: ViTConfig, config: AllocateConfig) -> Cost:
    """Cost of the model at its narrowest widths."""
    blocks = []
    for i, block in enumerate(dense.blocks):
        least = {}
        for group in unit_table(dense):
            if group.block == i and group.kind in ("mlp", "qk", "vo"):
                size = group.shape[-1]
                least[group.kind] = _round_count(_floor(size, config), size, config.round_to)
        blocks.append(
            dataclasses.replace(
                block,
                qk_dim=least.get("qk", block.qk_dim),
                v_dim=least.get("vo", block.v_dim),
                mlp_dim=least.get("mlp", block.mlp_dim),
            )
        )
    return cost(dataclasses.replace(dense, blocks=tuple(blocks)))


def _round_up(fraction: float) -> float:
    return np.ceil(fraction * 1e4) / 1e4


def _floor(size: int, config: AllocateConfig) -> int:
    return min(size, max(config.min_dim, int(np.ceil(config.min_keep * size))))


def _round_count(count: int, size: int, step: int) -> int:
    # Up to a multiple, so that a floor stays a floor; a width below one step stays whole.
    return min(size, -(-count // step) * step)


def _rule(
    dense: ViTConfig, config: AllocateConfig, layers: BranchScores | None, limits: dict[str, int]
) -> Rule:
    if layers is not None:
        check_scores(dense, layers)
    if config.widths == "softmax" or layers is None:
        return softmax_rule(dense, layers, config.alpha, config.attn_share)
    return sensitivity_rule(dense, layers, _branch_costs(dense, limits))


def _branch_costs(dense: ViTConfig, limits: dict[str, int]) -> dict[str, Float[np.ndarray, "l"]]:
    """Share of the bounds that each branch's units take; several bounds add up."""
    full = cost(dense)
    costs = {branch: np.zeros(len(dense.blocks)) for branch in BRANCHES}
    for i, block in enumerate(dense.blocks):
        for branch, bare in (
            ("mlp", dataclasses.replace(block, mlp_dim=0)),
            ("attn", dataclasses.replace(block, qk_dim=0, v_dim=0)),
        ):
            blocks = (*dense.blocks[:i], bare, *dense.blocks[i + 1 :])
            without = cost(dataclasses.replace(dense, blocks=blocks))
            costs[branch][i] = sum(
                (getattr(full, unit) - getattr(without, unit)) / limit
                for unit, limit in limits.items()
            )
    return costs


class _Planner:
    """Counts, costs and masks of one dense model under one allocation config."""

    def __init__(self, dense, config, groups, units):
        self.dense: ViTConfig = dense
        self.config: AllocateConfig = config
        self.groups: list[UnitGroup] = groups
        self.units = units
        self.sizes = {group.key: self._size(group) for group in groups}
        self.floors = {group.key: self._group_floor(group) for group in groups}

    def _size(self, group: UnitGroup) -> int:
        return group.size if self.config.ragged else group.shape[-1]

    def _group_floor(self, group: UnitGroup) -> int:
        size = group.shape[-1]
        least = _round_count(_floor(size, self.config), size, self.config.round_to)
        return least * group.shape[0] if self.config.ragged and group.kind != "mlp" else least

    def ideal(self, keeps: Keeps) -> dict[str, float]:
        """Fractional counts."""
        return {
            group.key: keeps["mlp" if group.kind == "mlp" else "attn"][group.block]
            * self.sizes[group.key]
            for group in self.groups
        }

    def counts(self, keeps: Keeps) -> Counts:
        """Whole counts: rounded down to steps, but not below the floors."""
        step = self.config.round_to
        counts = {}
        for key, value in self.ideal(keeps).items():
            size = self.sizes[key]
            count = size if value >= size - 1e-9 else int(value + 1e-9) // step * step
            counts[key] = max(count, self.floors[key])
        return counts

    def config_of(self, counts: Counts) -> ViTConfig:
        if self.config.ragged:
            return reshaped_config(self.plan(counts))
        blocks = []
        for i, block in enumerate(self.dense.blocks):
            blocks.append(
                BlockConfig(
                    num_heads=block.num_heads,
                    qk_dim=counts.get(unit_key(i, "qk"), block.qk_dim),
                    v_dim=counts.get(unit_key(i, "vo"), block.v_dim),
                    mlp_dim=counts.get(unit_key(i, "mlp"), block.mlp_dim),
                    attn=block.attn,
                    mlp=block.mlp,
                )
            )
        return dataclasses.replace(self.dense, blocks=tuple(blocks))

    def fits(self, counts: Counts, limits: dict[str, int]) -> bool:
        return within(cost(self.config_of(counts)), limits)

    def fill(self, counts: Counts, ideal: dict[str, float], limits: dict[str, int]) -> Counts:
        """Grow widths step by step, those furthest below their ideal first, while any step fits."""
        counts = dict(counts)
        open_steps = self._steps()
        while open_steps:
            open_steps.sort(key=lambda keys: self._gap(keys, counts, ideal))
            keys = open_steps.pop()
            grown = dict(counts)
            for key in keys:
                grown[key] = min(self.sizes[key], counts[key] + self.config.round_to)
            # Costs only grow, so that a step that does not fit now never will.
            if grown != counts and self.fits(grown, limits):
                counts = grown
                open_steps.append(keys)
        return counts

    def _steps(self) -> list[tuple[str, ...]]:
        if not self.config.coupled:
            return [(group.key,) for group in self.groups]
        steps = [(group.key,) for group in self.groups if group.kind == "mlp"]
        blocks = sorted({group.block for group in self.groups if group.kind == "qk"})
        return steps + [(unit_key(i, "qk"), unit_key(i, "vo")) for i in blocks]

    def _gap(self, keys: tuple[str, ...], counts: Counts, ideal: dict[str, float]) -> float:
        return max((ideal[key] - counts[key]) / self.sizes[key] for key in keys)

    def plan(self, counts: Counts) -> Plan:
        """The kept units: the highest scores, exactly as many as counted."""
        keep = {}
        for group in self.groups:
            scores, count = np.asarray(self.units[group.key]), counts[group.key]
            if scores.shape != group.shape:
                raise InputError(
                    f"scores of {group.key} have shape {scores.shape}, expected {group.shape}"
                )
            if group.kind == "mlp" or self.config.ragged:
                keep[group.key] = top_k_mask(scores, count)
            else:
                keep[group.key] = np.stack([top_k_mask(row, count) for row in scores])
        return Plan(self.dense, keep)
