"""One level for each of many items, the least loss within a budget: greedy and exact.

An item is a table of levels: losses that fall and costs that grow from level to level. Here items
are groups of prunable units and levels are widths, but nothing below knows of that.

Letters: i items, v levels.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.errors import InputError

Table = Sequence[Float[np.ndarray, "v"]]
"""One row of values an item; rows may differ in length."""


def greedy_levels(losses: Table, costs: Table, budget: float) -> Int[np.ndarray, "i"]:
    """Levels by the steepest descent: the step that saves most loss per unit of cost comes first.

    Steps go along the lower convex hull of each item's (cost, loss) points, so that a flat stretch
    does not hide a steep one behind it. The first step that does not fit ends its item, and others
    go on. Within one hull step of the optimum.

    Raises:
      InputError: no choice fits the budget, or tables that are not as described.

    Source: ours; the greedy heuristic for multiple-choice knapsacks (Sinha and Zoltners, 1979).
    """
    _check(losses, costs, budget)
    steps = []
    hulls = [_hull(np.asarray(a), np.asarray(b)) for a, b in zip(losses, costs, strict=True)]
    for item, (loss, cost, hull) in enumerate(zip(losses, costs, hulls, strict=True)):
        for left, right in itertools.pairwise(hull):
            gain = (loss[left] - loss[right]) / (cost[right] - cost[left])
            steps.append((-gain, item, left, right))
    steps.sort()
    levels = np.array([hull[0] for hull in hulls])
    spent = sum(float(cost[level]) for cost, level in zip(costs, levels, strict=True))
    for _, item, left, right in steps:
        price = costs[item][right] - costs[item][left]
        if levels[item] == left and spent + price <= budget:
            levels[item] = right
            spent += price
    return levels


def exact_levels(
    losses: Table, costs: Table, budget: float, bins: int = 4096
) -> Int[np.ndarray, "i"]:
    """The best levels there are, by dynamic programming over what is spent.

        best(i, c) = min over levels v of  best(i - 1, c - cost_iv) + loss_iv

    Costs are counted in `bins` parts of the budget and rounded up, so that the budget is kept: the
    result is exact where all costs are whole numbers of parts, and otherwise the best for a budget
    that is smaller by at most i / bins of itself.

    Raises:
      InputError: no choice fits the budget, or tables that are not as described.

    Source: ours; the textbook recursion for multiple-choice knapsacks.
    """
    _check(losses, costs, budget)
    # What every choice costs is no choice, and rounding it up would waste budget.
    least = [float(cost[0]) for cost in costs]
    left = budget - sum(least)
    # Without anything to spend, only what costs nothing more than the least is left.
    bins, part = (bins, left / bins) if left > 0 else (0, 1.0)
    whole = [
        np.ceil((np.asarray(cost, np.float64) - low) / part - 1e-9).astype(np.int64)
        for cost, low in zip(costs, least, strict=True)
    ]
    best = np.zeros(bins + 1)
    chosen = np.zeros((len(losses), bins + 1), np.int32)
    for item, (loss, cost) in enumerate(zip(losses, whole, strict=True)):
        found = np.full(bins + 1, np.inf)
        for level in range(len(loss)):
            price = int(cost[level])
            if price > bins:
                break
            candidate = best[: bins + 1 - price] + loss[level]
            better = candidate < found[price:]
            found[price:][better] = candidate[better]
            chosen[item, price:][better] = level
        best = found
    levels = np.zeros(len(losses), np.int64)
    spent = int(np.argmin(best))
    for item in reversed(range(len(losses))):
        levels[item] = chosen[item, spent]
        spent -= int(whole[item][levels[item]])
    return levels


def _check(losses: Table, costs: Table, budget: float) -> None:
    for item, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        if len(loss) != len(cost) or len(loss) == 0:
            raise InputError(f"item {item} has {len(loss)} losses and {len(cost)} costs")
        if (np.diff(cost) < 0).any() or not np.isfinite(loss).all():
            raise InputError(f"item {item}: costs must not fall and losses must be finite")
    least = sum(float(cost[0]) for cost in costs)
    if least > budget:
        raise InputError(f"budget {budget:.7g} is below the least cost {least:.7g}")


def _hull(loss: Float[np.ndarray, "v"], cost: Float[np.ndarray, "v"]) -> list[int]:
    """Levels on the lower convex hull of (cost, loss), losses strictly falling."""
    hull: list[int] = []
    for level in range(len(loss)):
        if hull and loss[level] >= loss[hull[-1]]:
            continue
        if hull and cost[level] == cost[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            slope = (loss[b] - loss[a]) * (cost[level] - cost[a])
            if slope < (loss[level] - loss[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(level)
    return hull
