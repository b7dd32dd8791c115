"""One level for each of many items, the least loss within budgets: greedy and exact.

An item is a table of levels: what each loses and what each costs, under one bound or several; the
first level is the cheapest under all of them. Here items are branches and levels are widths, but
nothing below knows of that.

Letters: i items, v levels, k bounds.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.errors import InputError

Losses = Sequence[Float[np.ndarray, "v"]]
"""One row an item; rows may differ in length."""

Costs = Sequence[Float[np.ndarray, "v k"] | Float[np.ndarray, "v"]]
"""One table an item, without the second axis under a single bound."""

# Parts of a weight of 1 that several bounds share, by how many they are: a program for each way.
_WEIGHT_PARTS = {1: 1, 2: 8, 3: 4}
_FEWEST_PARTS = 2

# A share of a budget that nobody has, and still a number.
_NEVER = 1e9


def greedy_levels(
    losses: Losses, costs: Costs, budgets: float | Float[np.ndarray, "k"]
) -> Int[np.ndarray, "i"]:
    """Levels by the steepest descent: the step that saves most loss per unit of cost comes first.

    Several bounds add up, each as a share of what the cheapest levels leave of it. Steps go along
    the lower convex hull of each item's (cost, loss) points, so that a flat stretch does not hide a
    steep one behind it. The first step that does not fit ends its item, and others go on. Within
    one hull step of the optimum under one bound.

    Raises:
      InputError: no choice fits the budgets, or tables that are not as described.

    Source: ours; the greedy heuristic for multiple-choice knapsacks (Sinha and Zoltners, 1979).
    """
    losses, above, left = _checked(losses, costs, budgets)
    prices = [share.sum(axis=1) for share in _shares(above, left)]
    hulls = [_hull(loss, price) for loss, price in zip(losses, prices, strict=True)]
    steps = []
    for item, (loss, price, hull) in enumerate(zip(losses, prices, hulls, strict=True)):
        for now, then in itertools.pairwise(hull):
            gain = (loss[now] - loss[then]) / (price[then] - price[now])
            steps.append((-gain, item, now, then))
    steps.sort()
    levels = np.array([hull[0] for hull in hulls], np.int64)
    for _, item, now, then in steps:
        if levels[item] == now:
            levels[item] = then
            if not (_spent(levels, above, left) <= left).all():
                levels[item] = now
    return levels


def exact_levels(
    losses: Losses, costs: Costs, budgets: float | Float[np.ndarray, "k"], bins: int = 4096
) -> Int[np.ndarray, "i"]:
    """The best levels there are, by dynamic programming over what is spent.

        best(i, c) = min over levels v of  best(i - 1, c - cost_iv) + loss_iv

    Costs are counted in `bins` parts of what the cheapest levels leave of the budget and rounded
    up. So under one bound the result is exact where all costs are whole numbers of parts, and
    otherwise at least as good as the best for a budget that leaves less by i / bins of it. Several
    bounds are weighted into one in a few ways, and of everything that the programs find what really
    fits is taken (a surrogate relaxation, which may miss the optimum). Last, two items at a time
    change their levels, for as long as that loses less and still fits.

    Raises:
      InputError: no choice fits the budgets, or tables that are not as described.

    Source: ours; the textbook recursion for multiple-choice knapsacks; surrogate constraints
    (Glover, 1968).
    """
    losses, above, left = _checked(losses, costs, budgets)
    shares = _shares(above, left)
    weightings = _weightings(shares)
    fronts = [
        sorted({0}.union(*(_front(loss, share @ weights) for weights in weightings)))
        for loss, share in zip(losses, shares, strict=True)
    ]
    losses, above, shares = (
        [rows[front] for rows, front in zip(table, fronts, strict=True)]
        for table in (losses, above, shares)
    )
    best = np.zeros(len(losses), np.int64)
    for weights in weightings:
        found = _programmed(losses, [share @ weights for share in shares], bins)
        fits = np.flatnonzero((_spent(found, above, left) <= left).all(axis=-1))
        # What may spend more never loses more.
        if len(fits) and _lost(found[:, fits[-1]], losses) < _lost(best, losses):
            best = found[:, fits[-1]]
    best = _exchanged(best, losses, above, left)
    return np.array([front[level] for front, level in zip(fronts, best, strict=True)], np.int64)


def _programmed(
    losses: Losses, prices: Sequence[Float[np.ndarray, "v"]], bins: int
) -> Int[np.ndarray, "i c"]:
    """The best levels by what may be spent, in parts of 1: 0, 1 / bins, ... 1."""
    best = np.zeros(bins + 1)
    fronts, whole = [], []
    chosen = np.zeros((len(losses), bins + 1), np.int64)
    for item, (loss, price) in enumerate(zip(losses, prices, strict=True)):
        front = _front(loss, price)
        price = np.ceil(np.minimum(price[front], 2.0) * bins - 1e-9).astype(np.int64)
        found = np.full(bins + 1, np.inf)
        for level, parts in enumerate(price):
            if parts > bins:
                break
            candidate = best[: bins + 1 - parts] + loss[front[level]]
            better = candidate < found[parts:]
            found[parts:][better] = candidate[better]
            chosen[item, parts:][better] = level
        best = found
        fronts.append(front)
        whole.append(price)
    levels = np.zeros_like(chosen)
    spent = np.arange(bins + 1)
    for item in reversed(range(len(losses))):
        level = chosen[item, spent]
        levels[item] = fronts[item][level]
        spent = spent - whole[item][level]
    return levels


def _exchanged(
    levels: Int[np.ndarray, "i"],
    losses: Losses,
    above: Costs,
    left: Float[np.ndarray, "k"],
) -> Int[np.ndarray, "i"]:
    levels = levels.copy()
    before = np.inf
    while (now := _lost(levels, losses)) < before * (1 - 1e-9):
        before = now
        for a, b in itertools.combinations(range(len(losses)), 2):
            room = left - _spent(levels, above, left) + above[a][levels[a]] + above[b][levels[b]]
            fits = np.all(above[a][:, None] + above[b] <= room, axis=-1)
            total = np.where(fits, losses[a][:, None] + losses[b], np.inf)
            best = np.unravel_index(np.argmin(total), total.shape)
            if total[best] < losses[a][levels[a]] + losses[b][levels[b]]:
                levels[[a, b]] = best
    return levels


def _weightings(shares: Sequence[Float[np.ndarray, "v k"]]) -> list[Float[np.ndarray, "k"]]:
    """Ways to add bounds up, but for those that another implies (as parameters do their bytes)."""
    stacked = np.concatenate(shares) if shares else np.zeros((0, 1))
    kept: list[int] = []
    for bound in np.argsort(-stacked.sum(axis=0), kind="stable"):
        if not any((stacked[:, bound] <= stacked[:, other] + 1e-12).all() for other in kept):
            kept.append(int(bound))
    parts = _WEIGHT_PARTS.get(len(kept), _FEWEST_PARTS)
    found = []
    for shared in itertools.product(range(parts + 1), repeat=len(kept)):
        if sum(shared) == parts:
            weights = np.zeros(stacked.shape[1])
            weights[kept] = np.array(shared) / parts
            found.append(weights)
    return found


def _checked(
    losses: Losses, costs: Costs, budgets: float | Float[np.ndarray, "k"]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Losses, costs above each item's first level, and what these leave of the budgets."""
    budgets = np.atleast_1d(np.asarray(budgets, np.float64))
    losses = [np.asarray(loss, np.float64) for loss in losses]
    costs = [np.asarray(cost, np.float64) for cost in costs]
    for item, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        if len(loss) != len(cost) or len(loss) == 0:
            raise InputError(f"item {item} has {len(loss)} losses and {len(cost)} costs")
        if (cost < cost[0]).any() or not np.isfinite(loss).all():
            raise InputError(f"item {item}: its first cost is not its least, or a loss not finite")
    costs = [cost.reshape(len(cost), len(budgets)) for cost in costs]
    least = sum((cost[0] for cost in costs), np.zeros(len(budgets)))
    for budget, lowest in zip(budgets, least, strict=True):
        if lowest > budget:
            raise InputError(f"budget {budget:.7g} is below the least cost {lowest:.7g}")
    return losses, [cost - cost[0] for cost in costs], budgets - least


def _shares(above: Costs, left: Float[np.ndarray, "k"]) -> list[Float[np.ndarray, "v k"]]:
    """Costs as shares of what is left, and more than there is where nothing is."""
    shares = []
    for cost in above:
        never = np.where(cost > 0, _NEVER, 0.0)
        shares.append(np.divide(np.minimum(cost, _NEVER * left), left, out=never, where=left > 0))
    return shares


def _front(loss: Float[np.ndarray, "v"], price: Float[np.ndarray, "v"]) -> Int[np.ndarray, "f"]:
    """Levels that lose less than all cheaper ones, cheapest first."""
    order = np.lexsort((loss, price))
    least = np.minimum.accumulate(loss[order])
    return order[np.concatenate([[True], loss[order][1:] < least[:-1]])]


def _hull(loss: Float[np.ndarray, "v"], price: Float[np.ndarray, "v"]) -> list[int]:
    """Levels on the lower convex hull of (price, loss), losses strictly falling."""
    hull: list[int] = []
    for level in _front(loss, price):
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (loss[b] - loss[a]) * (price[level] - price[a])
            if slope < (loss[level] - loss[a]) * (price[b] - price[a]):
                break
            hull.pop()
        hull.append(int(level))
    return hull


def _spent(levels: Int[np.ndarray, "i ..."], above: Costs, left: np.ndarray) -> np.ndarray:
    pairs = zip(above, levels, strict=True)
    return sum((cost[level] for cost, level in pairs), np.zeros((*levels.shape[1:], len(left))))


def _lost(levels: Int[np.ndarray, "i"], losses: Losses) -> float:
    return sum(float(loss[level]) for loss, level in zip(losses, levels, strict=True))
