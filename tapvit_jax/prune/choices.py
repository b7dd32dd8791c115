"""What the branches of a model may become: admissible widths, what they lose and what they cost."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.prune.units import unit_key
from tapvit_jax.prune.widths import BRANCHES, PARTS, BranchScores, measured_divergence, scored_parts

Counts = dict[str, int]
"""Units to keep by group key; for qk and vo the count is per head, unless ragged."""

Levels = Mapping[str, Int[np.ndarray, "v"]]
"""Counts that may be kept by group key, growing, the largest of them the dense one."""

# More are thinned out: between so many the divergence hardly bends, and steps fill the rest.
_MOST_LEVELS = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """What one branch of a block may become; the first choice is the cheapest.

    Attributes:
      keys: its groups of units.
      counts: how many of each stay.
      losses: predicted divergence.
      costs: cost of the model, were all else dense, less that of the dense model, by bound.
    """

    keys: tuple[str, ...]
    counts: Int[np.ndarray, "v g"]
    losses: Float[np.ndarray, "v"]
    costs: Float[np.ndarray, "v k"]

    def __getitem__(self, level: int) -> Counts:
        return dict(zip(self.keys, self.counts[level].tolist(), strict=True))


def admissible_counts(size: int, floor: int, step: int) -> Int[np.ndarray, "v"]:
    """The floor, multiples of a step above it, 128 of them at most, and all. Source: ours."""
    multiples = step * (np.arange(_MOST_LEVELS + 1) * (size // step) // _MOST_LEVELS)
    return np.unique([floor, *multiples[multiples > floor], size])


def predicted_divergence(
    layers: BranchScores, block: int, keeps: Mapping[str, Float[np.ndarray, "v"]]
) -> Float[np.ndarray, "v"]:
    """Sum of the measured divergences of a block's parts, by the keep ratios of kinds of units.

    Where attention was probed whole, the mean keep ratio of its kinds counts. Source: ours.
    """
    total = np.zeros(np.shape(next(iter(keeps.values()))))
    for part in scored_parts(layers):
        ratios = [keeps[kind] for kind in PARTS[part] if kind in keeps]
        if ratios:
            total += measured_divergence(layers, part, 1.0 - np.mean(ratios, axis=0))[:, block]
    return total


def branch_choices(
    dense: TransformerConfig,
    layers: BranchScores,
    levels: Levels,
    price: Callable[[Counts], Float[np.ndarray, "k"]],
    may_go: bool = False,
) -> list[Choices]:
    """The choices of all branches, MLPs and attention.

    Queries and keys choose apart from values where they were probed so, else both go at one ratio.

    Args:
      dense: the dense model's config.
      layers: layer scores.
      levels: counts that may be kept; branches without any are left out.
      price: what so many units cost, less what all of them do; of several groups it is a sum.
      may_go: branches may go whole, for the loss of their values: nothing else is left to lose.

    Source: ours.
    """
    found = []
    for block in range(len(dense.blocks)):
        for branch in BRANCHES:
            kinds = [kind for kind in PARTS[branch] if unit_key(block, kind) in levels]
            if not kinds:
                continue
            keys = tuple(unit_key(block, kind) for kind in kinds)
            grids = [levels[key] for key in keys]
            counts = _in_step(grids) if branch in scored_parts(layers) else _pairs(grids)
            keeps = counts / np.maximum([grid[-1] for grid in grids], 1)
            losses = predicted_divergence(layers, block, dict(zip(kinds, keeps.T, strict=True)))
            priced = [np.array([price({key: int(count)}) for count in levels[key]]) for key in keys]
            costs = sum(
                table[np.searchsorted(grid, column)]
                for table, grid, column in zip(priced, grids, counts.T, strict=True)
            )
            if may_go:
                gone = dict.fromkeys(keys, 0)
                nothing = {kind: np.zeros(1) for kind in kinds if kind != "qk" or "vo" not in kinds}
                lost = predicted_divergence(layers, block, nothing)
                counts = np.concatenate([np.zeros((1, len(keys)), int), counts])
                losses = np.concatenate([lost, losses])
                costs = np.concatenate([[price(gone)], costs])
            found.append(Choices(keys, counts, losses, costs))
    return found


def _pairs(grids: Sequence[Int[np.ndarray, "v"]]) -> Int[np.ndarray, "v g"]:
    return np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1).reshape(-1, len(grids))


def _in_step(grids: Sequence[Int[np.ndarray, "v"]]) -> Int[np.ndarray, "v g"]:
    """For every keep ratio that a grid has, the largest counts that keep no more, if any do."""
    shares = [grid / max(grid[-1], 1) for grid in grids]
    ratios = np.unique(np.concatenate(shares))
    places = [np.searchsorted(share, ratios + 1e-9, side="right") - 1 for share in shares]
    columns = [grid[np.maximum(at, 0)] for grid, at in zip(grids, places, strict=True)]
    return np.unique(np.stack(columns, axis=1), axis=0)
