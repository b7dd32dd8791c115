"""From scores and a budget to widths, and from widths to the units that stay."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig, check_prunable
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.prune.budget import Budget, Limits
from tapvit_jax.prune.choices import (
    Counts,
)
from tapvit_jax.prune.cost import Cost, Latency, cost
from tapvit_jax.prune.mask import Plan
from tapvit_jax.prune.planner import Planner, part_costs
from tapvit_jax.prune.ranking import Ranking, coupled_scores, ranking_rule, unit_costs
from tapvit_jax.prune.units import (
    HEAD_KINDS,
    WIDTH_FIELDS,
    WIDTH_KINDS,
    Kind,
    check_unit_scores,
    unit_table,
)
from tapvit_jax.prune.widths import (
    BranchScores,
    Rule,
    check_scores,
    sensitivity_rule,
    softmax_keep,
    softmax_rule,
)
from tapvit_jax.structs import check_fields

Widths = Literal["sensitivity", "greedy", "exact", "softmax", "local", "global", "isomorphic"]


@dataclasses.dataclass(frozen=True)
class RoundTo:
    """Multiples that widths are rounded to, by kind of unit; hardware likes some more than others.

    Attributes:
      mlp: hidden units of an MLP.
      qk: query-key dims of a head.
      vo: value dims of a head.
    """

    mlp: int = 1
    qk: int = 1
    vo: int = 1

    def __post_init__(self):
        check_fields(self)
        for kind, step in dataclasses.asdict(self).items():
            if step < 1:
                raise InputError(f"round_to of {kind} is {step}, expected 1 or more")

    @classmethod
    def parse(cls, text: str) -> "RoundTo":
        """Read "8" (all kinds) or "mlp=64,qk=8,vo=8".

        Raises:
          InputError: an unknown kind or a value that is no number.
        """
        kinds = [f.name for f in dataclasses.fields(cls)]
        steps = {}
        for part in text.split(","):
            kind, equals, step = part.rpartition("=")
            # No width has more digits; from some thousands on, int refuses them.
            number = step.strip().isdecimal() and len(step.strip()) < 10
            if not number or (equals and kind.strip() not in kinds):
                raise InputError(f"round_to {part[:40]!r}: expected NUMBER or KIND=NUMBER, {kinds}")
            steps |= dict.fromkeys([kind.strip()] if equals else kinds, int(step))
        return cls(**steps)


@dataclasses.dataclass(frozen=True)
class AllocateConfig:
    """How widths follow from layer scores.

    Attributes:
      widths: "sensitivity" prunes where the divergence rises least per unit of cost, MLPs and
        attention together, along curves fitted to the probes; "greedy" and "exact" do so along the
        measured curves, step by step or by dynamic programming, and choose among the very widths
        that floors and multiples admit; "softmax" is the published rule, with a fixed ratio between
        MLPs and attention. By the scores of single units and without layer scores: "local" takes
        the same share of every layer, "global" has one threshold for all units, "isomorphic" one
        for each kind.
      alpha: temperature of the softmax over layers (published: 1.1).
      attn_share: for the softmax, how much of the MLPs' pruned share the attention branches lose on
        average; the published budgets prune .216 of attention where they prune .342 of MLPs.
      attention: lose "dims" of every head, or whole "heads"; layers are to be probed alike. Not
        under bounds on latency, whose model is fitted to prunings of dims.
      branches: whole branches may go (depth), where that loses least; for "greedy" and "exact",
        with layers that were probed at sparsity 1.
      min_keep: no branch that stays keeps less than this share of its units.
      min_dim: no branch that stays keeps fewer units than this (dims per head for attention, and
        one head at least).
      round_to: widths become multiples of this where the dense width allows it; one number, or one
        for every kind of unit.
      ragged: kept attention dims may differ from head to head (as published); reshaping pads them
        to the widest head, and the cost counts the padding. Dims of all heads are counted together,
        so that `min_dim` and the multiples of qk and vo have to be 1.
      coupled: queries, keys and values keep the same index set (as published), by the mean of their
        scores; attention counts as one part, however it was probed.
      per_cost: for "global" and "isomorphic": scores count per MAC that a unit costs, or per
        parameter where parameters alone are bounded.
      normalize: for "global": scores count by the mean of their kind of unit.
      clip: for the softmax: "water_fill" hands what it gives beyond a full layer to the other
        layers; "clip" drops it, as published, and so falls short of the budget.
    """

    widths: Widths = "sensitivity"
    alpha: float = 1.1
    attn_share: float = 0.216 / 0.342
    attention: Literal["dims", "heads"] = "dims"
    branches: bool = False
    min_keep: float = 0.1
    min_dim: int = 1
    round_to: int | RoundTo = 1
    ragged: bool = False
    coupled: bool = False
    per_cost: bool = False
    normalize: bool = False
    clip: Literal["water_fill", "clip"] = "water_fill"

    def __post_init__(self):
        check_fields(self)
        for name in ("min_dim", "round_to"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{name} is {value}, expected 1 or more")
        if self.branches and (self.widths not in ("greedy", "exact") or self.ragged):
            raise InputError("branches needs widths 'greedy' or 'exact', and no ragged heads")
        if self.attention == "heads" and (self.ragged or self.coupled):
            raise InputError("attention 'heads' goes neither with ragged nor with coupled")
        steps = self.step("qk"), self.step("vo"), self.min_dim
        if self.ragged and max(steps) > 1:
            raise InputError(
                "ragged heads have no common width: round_to of qk and vo and min_dim are "
                f"{steps}, expected 1"
            )
        if self.per_cost and self.widths not in ("global", "isomorphic"):
            raise InputError("per_cost needs widths 'global' or 'isomorphic'")
        if self.normalize and self.widths != "global":
            raise InputError("normalize needs widths 'global'")
        if self.coupled and self.step("qk") != self.step("vo"):
            raise InputError("coupled qk and vo need the same round_to")
        if not math.isfinite(self.alpha):
            raise InputError(f"alpha is {self.alpha}, expected a finite number")
        if not 0 <= self.min_keep <= 1:
            raise InputError(f"min_keep is {self.min_keep}, expected 0 to 1")
        if not 0 < self.attn_share <= 1:
            raise InputError(f"attn_share is {self.attn_share}, expected above 0, at most 1")

    def step(self, kind: str) -> int:
        """The multiple that widths of a kind are rounded to; heads are not."""
        if kind == "head":
            return 1
        return self.round_to if isinstance(self.round_to, int) else getattr(self.round_to, kind)

    def least_units(self, kind: Kind, size: int) -> int:
        """Fewest units of a branch that stays, of those of an MLP, a head's dims or the heads."""
        fewest = 1 if kind == "head" else self.min_dim
        floor = min(size, max(fewest, math.ceil(self.min_keep * size)))
        step = self.step(kind)
        # Up to a multiple, so that a floor stays a floor; a width below one step stays whole.
        return min(size, -(-floor // step) * step)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of units whose counts are chosen."""
        return HEAD_KINDS if self.attention == "heads" else WIDTH_KINDS

    @property
    def reads_layers(self) -> bool:
        """Whether widths depend on layer scores, which cost far more than those of units."""
        return self.widths not in get_args(Ranking)

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
    latency: Latency | None = None,
) -> Plan:
    """Choose every width and every kept unit of a model under a budget.

    A rule (see `prune.widths`) turns layer scores and one number t into keep ratios; t is the
    largest that fits the budget. "greedy" and "exact" solve for admissible widths instead (see
    `prune.choices`). Then single steps fill what is left, until no further step of any width fits:
    those furthest below their ratio first, or those that save most divergence by cost. So the
    result never exceeds the budget and cannot be grown inside it.

    Args:
      model: a `Model` or its config.
      units: scores by group key for kinds mlp, qk and vo, or mlp and head.
      layers: layer scores; None treats all layers alike, under the softmax rule. Rules by the
        scores of single units ignore them.
      budget: bounds on parameters, MACs, memory or latency, one or several.
      config: temperature, floors, rounding, published switches.
      latency: predicts the time of a forward pass, for bounds on latency.

    Raises:
      InputError: an infeasible budget (names the smallest feasible value), scores missing, of
        another shape or not finite, or unequal dims that are to be coupled.

    Source: softmax as published (arXiv 2601.02437); rankings in `prune.ranking`; all else is ours.
    """
    dense: TransformerConfig = getattr(model, "config", model)
    config = config or AllocateConfig()
    check_budget(dense, budget, config, latency)
    layers = layers if config.reads_layers else None
    if config.branches and (layers is None or 1.0 not in layers.sparsity):
        raise InputError("branches needs layers that were probed at sparsity 1")
    limits = budget.limits(dense, latency)
    if config.attention == "heads" and layers is not None and layers.qk is not None:
        raise InputError("attention 'heads' needs layers that were probed by heads")
    groups = [group for group in unit_table(dense) if group.kind in config.kinds]
    units = check_unit_scores(dense, units, config.kinds)
    if config.coupled:
        units = coupled_scores(dense, units, normalize=config.normalize)
        layers = None if layers is None else dataclasses.replace(layers, qk=None, vo=None)
    planner = Planner(dense, config, groups, units, limits, latency)
    if layers is not None:
        check_scores(dense, layers)
    rule = None
    if config.widths in ("greedy", "exact") and layers is not None:
        solve = planner.knapsack(layers)
    else:
        rule = _rule(dense, config, units, layers, limits, latency)

        def solve(t: float) -> Counts:
            return planner.counts(rule(t))

    low, high = 0.0, 1.0
    best = solve(0.0)
    if not planner.fits(best):
        # Only ragged plans get here: how widely they pad is not known before the scores are.
        least = cost(planner.config_of(best), latency)
        problems = _too_small(least, cost(dense, latency), limits, budget)
        raise InputError(f"infeasible budget: {problems}")
    if planner.fits(full := solve(1.0)):
        best, low = full, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        counts = solve(middle)
        if planner.fits(counts):
            best, low = counts, middle
        else:
            high = middle
    if config.clip == "clip" and config.widths == "softmax":
        clipped = softmax_rule(dense, layers, config.alpha, config.attn_share, softmax_keep)
        return planner.plan(planner.counts(clipped(low)))
    urgency = planner.gains(layers) if rule is None else planner.gaps(rule(low))
    return planner.plan(planner.fill(best, urgency))


def check_budget(
    model: Any,
    budget: Budget,
    config: AllocateConfig | None = None,
    latency: Latency | None = None,
) -> None:
    """Refuse a budget that even the narrowest widths exceed, before any work is done.

    Raises:
      InputError: names every infeasible bound and its smallest feasible value; a backbone without
        prunable units; a bound on latency without a latency model, or where heads go.

    Source: ours.
    """
    dense: TransformerConfig = getattr(model, "config", model)
    check_prunable(dense)
    config = config or AllocateConfig()
    if config.attention == "heads" and budget.needs_latency:
        raise InputError("attention 'heads' goes not with a bound on latency")
    smallest = smallest_cost(dense, config, latency)
    limits = budget.limits(dense, latency)
    problems = _too_small(smallest, cost(dense, latency), limits, budget)
    if problems:
        raise InputError(f"infeasible budget: {problems}")


def _too_small(smallest: Cost, full: Cost, limits: Limits, budget: Budget) -> str:
    problems = []
    for unit, limit in limits.items():
        least = getattr(smallest, unit)
        if least > limit:
            problems.append(
                f"{budget} allows {limit:.7g} {unit}, the smallest feasible is {least:.7g} "
                f"(a fraction of {_round_up(least / getattr(full, unit)):.4f})"
            )
    return "; ".join(problems)


def smallest_cost(
    dense: TransformerConfig, config: AllocateConfig, latency: Latency | None = None
) -> Cost:
    """Cost of the model at its narrowest widths, or without any branch where those may go."""
    if config.branches:
        return cost(dataclasses.replace(dense, blocks=(_NO_BRANCHES,) * len(dense.blocks)), latency)
    blocks = []
    for i, block in enumerate(dense.blocks):
        least = {}
        for group in unit_table(dense):
            if group.block == i and group.kind in config.kinds:
                least[WIDTH_FIELDS[group.kind]] = config.least_units(group.kind, group.shape[-1])
        blocks.append(dataclasses.replace(block, **least))
    return cost(dataclasses.replace(dense, blocks=tuple(blocks)), latency)


_NO_BRANCHES = BlockConfig(0, 0, 0, 0, attn=False, mlp=False)


def _round_up(fraction: float) -> float:
    return np.ceil(fraction * 1e4) / 1e4


def _rule(
    dense: TransformerConfig,
    config: AllocateConfig,
    units: Mapping[str, Float[np.ndarray, "..."]],
    layers: BranchScores | None,
    limits: Limits,
    latency: Latency | None,
) -> Rule:
    if config.widths in get_args(Ranking):
        sizes = {"params", "encoder_params", "model_bytes"}
        unit = "macs" if set(limits) - sizes else "params"
        return ranking_rule(
            dense,
            units,
            config.widths,
            costs=unit_costs(dense, unit) if config.per_cost else None,
            normalize=config.normalize,
            ragged=config.ragged,
            coupled=config.coupled,
            kinds=config.kinds,
        )
    if config.widths == "softmax" or layers is None:
        return softmax_rule(dense, layers, config.alpha, config.attn_share)
    costs = part_costs(dense, limits, latency, config.kinds)
    return sensitivity_rule(dense, layers, costs)
