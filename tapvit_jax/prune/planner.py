"""What one model's widths cost under a budget: counts of units, how they grow, and their masks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.prune.budget import Limits, within
from tapvit_jax.prune.choices import (
    Choices,
    Counts,
    admissible_counts,
    branch_choices,
    predicted_divergence,
)
from tapvit_jax.prune.cost import FLOAT32_BYTES, Cost, Latency, block_cost, cost
from tapvit_jax.prune.knapsack import exact_levels, greedy_levels
from tapvit_jax.prune.mask import Plan, top_k_mask
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.prune.units import WIDTH_FIELDS, Kind, UnitGroup, unit_key
from tapvit_jax.prune.widths import BRANCHES, PARTS, BranchScores, GroupKeeps, by_group

if TYPE_CHECKING:
    from tapvit_jax.prune.allocate import AllocateConfig

Urgency = Callable[[tuple[str, ...], Counts], float]
"""How badly widths that grow together want one more step, at given counts."""


def part_costs(
    dense: TransformerConfig, limits: Limits, latency: Latency | None, kinds: tuple[Kind, ...]
) -> dict[str, Float[np.ndarray, "l"]]:
    """Share of the bounds that the units of each part of a block take; several bounds add up.

    Peak memory is no sum over parts: it caps each of them (`Planner`), and where nothing else
    is bounded, MACs stand in for it.
    """
    full = cost(dense, latency)
    summed = _summed(limits, full)
    costs = {part: np.zeros(len(dense.blocks)) for part in PARTS}
    for i, block in enumerate(dense.blocks):
        for part, members in PARTS.items():
            fields = {WIDTH_FIELDS[kind]: 0 for kind in members if kind in kinds}
            bare = dataclasses.replace(block, **fields)
            blocks = (*dense.blocks[:i], bare, *dense.blocks[i + 1 :])
            without = cost(dataclasses.replace(dense, blocks=blocks), latency)
            costs[part][i] = sum(
                (getattr(full, unit) - getattr(without, unit)) / limit
                for unit, limit in summed.items()
            )
    return costs


def _summed(limits: Limits, full: Cost) -> Limits:
    """Bounds on what is a sum over parts of blocks, MACs where there are none."""
    summed = {unit: limit for unit, limit in limits.items() if unit != "activation_bytes"}
    return summed or {"macs": full.macs}


def _keep_under_peak(dense: TransformerConfig, limit: int, kinds: tuple[Kind, ...]) -> GroupKeeps:
    """Largest keep ratio at which each branch's peak of live activations stays within a bound."""
    keeps = {branch: np.ones(len(dense.blocks)) for branch in BRANCHES}
    for i, block in enumerate(dense.blocks):
        spec = dense.block_spec(i)

        def peak(ratio: float, branch: str, spec=spec, block=block) -> int:
            fields = [WIDTH_FIELDS[kind] for kind in PARTS[branch] if kind in kinds]
            narrow = {name: math.ceil(ratio * getattr(block, name)) for name in fields}
            found = block_cost(
                dataclasses.replace(spec, widths=dataclasses.replace(block, **narrow))
            )
            return FLOAT32_BYTES * getattr(found, f"{branch}_peak")

        for branch in BRANCHES:
            low, high = 0.0, 1.0
            if peak(high, branch) <= limit:
                continue
            while high - low > 1e-4:
                middle = (low + high) / 2
                low, high = (middle, high) if peak(middle, branch) <= limit else (low, middle)
            keeps[branch][i] = low
    return by_group(dense, keeps)


class Planner:
    """Counts, costs and masks of one dense model under one allocation config."""

    def __init__(
        self,
        dense: TransformerConfig,
        config: "AllocateConfig",
        groups: list[UnitGroup],
        units: Mapping[str, Float[np.ndarray, "..."]],
        limits: Limits,
        latency: Latency | None,
    ):
        self.dense, self.config, self.groups, self.units = dense, config, groups, units
        self.limits, self.latency = limits, latency
        self.by_key = {group.key: group for group in groups}
        self.sizes = {group.key: self._size(group) for group in groups}
        self.floors = {group.key: self._group_floor(group) for group in groups}
        self.most = self.sizes
        if "activation_bytes" in limits:
            keeps = _keep_under_peak(dense, limits["activation_bytes"], config.kinds)
            self.most = self.ideal(keeps)

    def _size(self, group: UnitGroup) -> int:
        return group.size if self.config.ragged else group.shape[-1]

    def _group_floor(self, group: UnitGroup) -> int:
        least = self.config.least_units(group.kind, group.shape[-1])
        return least * group.shape[0] if self.config.ragged and group.kind != "mlp" else least

    def ideal(self, keeps: GroupKeeps) -> dict[str, float]:
        """Fractional counts."""
        return {group.key: keeps[group.key] * self.sizes[group.key] for group in self.groups}

    def counts(self, keeps: GroupKeeps) -> Counts:
        """Whole counts: rounded down to steps, but not below the floors."""
        counts = {}
        for key, value in self.ideal(keeps).items():
            size, step = self.sizes[key], self._step(key)
            value = min(value, self.most[key])
            count = size if value >= size - 1e-9 else int(value + 1e-9) // step * step
            counts[key] = max(count, self.floors[key])
        return counts

    def knapsack(self, layers: BranchScores) -> Callable[[float], Counts]:
        """Counts of least predicted divergence, by the share of what they may spend above least."""
        full = cost(self.dense, self.latency)
        summed = _summed(self.limits, full)

        def price(counts: Counts) -> Float[np.ndarray, "k"]:
            widths = {key: self._width(key, count) for key, count in counts.items()}
            found = cost(self._narrowed(widths), self.latency)
            return np.array([getattr(found, unit) - getattr(full, unit) for unit in summed])

        levels = {
            key: admissible_counts(size, self.floors[key], self._step(key))
            for key, size in self.sizes.items()
        }
        choices = branch_choices(self.dense, layers, levels, price, may_go=self.config.branches)
        choices = [self._under_peak(branch) for branch in choices]
        losses, costs = [c.losses for c in choices], [c.costs for c in choices]
        left = np.array([limit - getattr(full, unit) for unit, limit in summed.items()], float)
        least = sum((table[0] for table in costs), np.zeros(len(summed)))
        choose = greedy_levels if self.config.widths == "greedy" else exact_levels

        def solve(share: float) -> Counts:
            counts: Counts = {}
            found = choose(losses, costs, least + share * np.maximum(left - least, 0.0))
            for branch, level in zip(choices, found, strict=True):
                counts |= branch[level]
            return counts

        return solve

    def _under_peak(self, choices: Choices) -> Choices:
        """Those within a bound on peak memory, and the cheapest."""
        limit = self.limits.get("activation_bytes")
        if limit is None:
            return choices
        group = self.by_key[choices.keys[0]]
        spec = self.dense.block_spec(group.block)
        kept = [0]
        for level in range(1, len(choices.losses)):
            widths = {key: self._width(key, count) for key, count in choices[level].items()}
            narrow = dataclasses.replace(spec, widths=self._narrowed_block(group.block, widths))
            found = block_cost(narrow)
            peak = found.mlp_peak if group.kind == "mlp" else found.attn_peak
            if FLOAT32_BYTES * peak <= limit:
                kept.append(level)
        tables = (choices.counts, choices.losses, choices.costs)
        return Choices(choices.keys, *(table[kept] for table in tables))

    def _width(self, key: str, count: int) -> int:
        """Of a ragged head the widest counts, as if no head went."""
        scores = np.asarray(self.units[key])
        if not self.config.ragged or scores.ndim == 1:
            return count
        return int(top_k_mask(scores, count).sum(axis=1).max(initial=0))

    def _is_gone(self, counts: Counts, key: str) -> bool:
        return self.config.branches and key in counts and counts[key] == 0 < self.sizes[key]

    def config_of(self, counts: Counts) -> TransformerConfig:
        """The model of these counts; of ragged ones, with heads as wide as they are padded."""
        if self.config.ragged:
            return reshaped_config(self.plan(counts))
        return self._narrowed(counts)

    def _narrowed(self, counts: Counts) -> TransformerConfig:
        blocks = [self._narrowed_block(i, counts) for i in range(len(self.dense.blocks))]
        return dataclasses.replace(self.dense, blocks=tuple(blocks))

    def _narrowed_block(self, i: int, counts: Counts) -> BlockConfig:
        keys = {WIDTH_FIELDS[kind]: unit_key(i, kind) for kind in self.config.kinds}
        found = {field: counts[key] for field, key in keys.items() if key in counts}
        narrow = dataclasses.replace(self.dense.blocks[i], **found)
        if any(self._is_gone(counts, unit_key(i, kind)) for kind in ("vo", "head")):
            narrow = dataclasses.replace(narrow, num_heads=0, attn=False)
        if self._is_gone(counts, unit_key(i, "mlp")):
            narrow = dataclasses.replace(narrow, mlp=False)
        return narrow

    def fits(self, counts: Counts) -> bool:
        """Whether the model of these counts is within the budget."""
        return within(cost(self.config_of(counts), self.latency), self.limits)

    def _step(self, key: str) -> int:
        return self.config.step(key.rpartition("/")[2])

    def fill(self, counts: Counts, urgency: Urgency) -> Counts:
        """Grow widths step by step, the most urgent first, while any step fits."""
        counts = dict(counts)
        # A branch that goes stays away: what it would take is for those that are left.
        open_steps = [
            keys for keys in self._steps() if not any(self._is_gone(counts, key) for key in keys)
        ]
        while open_steps:
            open_steps.sort(key=lambda keys: urgency(keys, counts))
            keys = open_steps.pop()
            grown = self._grown(keys, counts)
            # Costs only grow, so that a step that does not fit now never will.
            if grown != counts and self.fits(grown):
                counts = grown
                open_steps.append(keys)
        return counts

    def _steps(self) -> list[tuple[str, ...]]:
        if not self.config.coupled:
            return [(group.key,) for group in self.groups]
        steps = [(group.key,) for group in self.groups if group.kind == "mlp"]
        blocks = sorted({group.block for group in self.groups if group.kind == "qk"})
        return steps + [(unit_key(i, "qk"), unit_key(i, "vo")) for i in blocks]

    def _grown(self, keys: tuple[str, ...], counts: Counts) -> Counts:
        more = {key: min(self.sizes[key], counts[key] + self._step(key)) for key in keys}
        return counts | more

    def gaps(self, keeps: GroupKeeps) -> Urgency:
        """How far a width is below its ideal."""
        ideal = self.ideal(keeps)

        def gap(keys: tuple[str, ...], counts: Counts) -> float:
            return max((ideal[key] - counts[key]) / max(self.sizes[key], 1) for key in keys)

        return gap

    def gains(self, layers: BranchScores) -> Urgency:
        """How much predicted divergence a step saves by what it costs."""
        costs = part_costs(self.dense, self.limits, self.latency, self.config.kinds)
        prices = {
            group.key: costs["attn" if group.kind == "head" else group.kind][group.block] / size
            for group in self.groups
            if (size := self.sizes[group.key])
        }

        @functools.cache
        def predicted(block: int, keeps: tuple[tuple[str, float], ...]) -> float:
            ratios = {kind: np.array([keep]) for kind, keep in keeps}
            return float(predicted_divergence(layers, block, ratios)[0])

        def lost(group: UnitGroup, counts: Counts) -> float:
            branch = PARTS["mlp" if group.kind == "mlp" else "attn"]
            keys = {kind: unit_key(group.block, kind) for kind in branch}
            there = {kind: key for kind, key in keys.items() if key in prices}
            keeps = ((kind, counts[key] / self.sizes[key]) for kind, key in there.items())
            return predicted(group.block, tuple(keeps))

        def gain(keys: tuple[str, ...], counts: Counts) -> float:
            grown = self._grown(keys, counts)
            spent = sum((grown[key] - counts[key]) * prices.get(key, 0.0) for key in keys)
            group = self.by_key[keys[0]]
            return (lost(group, counts) - lost(group, grown)) / spent if spent > 0 else math.inf

        return gain

    def plan(self, counts: Counts) -> Plan:
        """The kept units: the highest scores, exactly as many as counted."""
        keep = {}
        for group in self.groups:
            if self._is_gone(counts, group.key) and group.kind != "qk":
                branch = "mlp_branch" if group.kind == "mlp" else "attn_branch"
                keep[unit_key(group.block, branch)] = np.array(False)
            scores, count = self.units[group.key], counts[group.key]
            if scores.ndim == 1 or self.config.ragged:
                keep[group.key] = top_k_mask(scores, count)
            else:
                rows = [top_k_mask(row, count) for row in scores]
                keep[group.key] = np.array(rows, bool).reshape(group.shape)
        return Plan(self.dense, keep)
