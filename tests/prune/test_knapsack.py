"""Levels within a budget against all choices there are."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapvit_jax.errors import InputError
from tapvit_jax.prune.knapsack import exact_levels, greedy_levels

item = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 8)), min_size=1, max_size=4)


def tables(items):
    """Losses that fall and whole costs that grow."""
    losses = [np.sort([loss for _, loss in item])[::-1] for item in items]
    costs = [np.sort(np.float64([cost for cost, _ in item])) for item in items]
    return losses, costs


def sums(levels, losses, costs):
    pick = zip(levels, losses, costs, strict=True)
    return np.sum([(loss[level], cost[level]) for level, loss, cost in pick], axis=0)


def best(losses, costs, budget):
    choices = itertools.product(*(range(len(loss)) for loss in losses))
    found = [sums(levels, losses, costs) for levels in choices]
    return min(loss for loss, cost in found if cost <= budget)


@given(items=st.lists(item, min_size=1, max_size=4), spare=st.integers(0, 30))
def test_exact_is_the_best_of_all_choices(items, spare):
    losses, costs = tables(items)
    budget = sum(cost[0] for cost in costs) + spare
    # With as many bins as there is to spend, every cost is a whole number of them.
    levels = exact_levels(losses, costs, budget, bins=max(spare, 1))
    loss, cost = sums(levels, losses, costs)
    assert cost <= budget
    assert loss == pytest.approx(best(losses, costs, budget))


@given(items=st.lists(item, min_size=1, max_size=4), spare=st.floats(0, 30))
def test_greedy_keeps_the_budget_and_misses_by_one_step_at_most(items, spare):
    losses, costs = tables(items)
    budget = sum(cost[0] for cost in costs) + spare
    levels = greedy_levels(losses, costs, budget)
    loss, cost = sums(levels, losses, costs)
    assert cost <= budget + 1e-9
    most = max(loss[0] - loss[-1] for loss in losses)
    assert best(losses, costs, budget) - 1e-9 <= loss
    assert loss <= best(losses, costs, budget) + most + 1e-9


@pytest.mark.parametrize("choose", [greedy_levels, functools.partial(exact_levels, bins=10)])
def test_steep_items_get_the_budget(choose):
    ratios = np.linspace(0, 1, 11)
    losses = [9 * (1 - ratios) ** 2, (1 - ratios) ** 2]
    levels = choose(losses, [ratios, ratios], 1.0)
    # Equal slopes: 18 (1 - a) = 2 (1 - b) with a + b = 1.
    assert levels.tolist() == [9, 1]


def test_a_flat_stretch_hides_no_steep_one():
    losses = [np.array([5.0, 5.0, 0.0]), np.array([1.0, 0.5, 0.0])]
    costs = [np.array([0.0, 1.0, 2.0])] * 2
    assert greedy_levels(losses, costs, 2.0).tolist() == [2, 0]
    assert exact_levels(losses, costs, 2.0).tolist() == [2, 0]


@pytest.mark.parametrize("bins", [7, 50])
def test_coarse_bins_keep_the_budget(bins):
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.random(5))[::-1] for _ in range(6)]
    costs = [np.sort(rng.random(5)) for _ in range(6)]
    budget = 2.5
    loss, cost = sums(exact_levels(losses, costs, budget, bins=bins), losses, costs)
    assert cost <= budget
    least = sum(cost[0] for cost in costs)
    assert loss <= best(losses, costs, least + (budget - least) * (1 - 6 / bins)) + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_two_budgets_are_kept_at_once_and_exact_is_near_the_best(seed):
    rng = np.random.default_rng(seed)
    losses = [np.sort(rng.exponential(1, 5))[::-1] for _ in range(4)]
    costs = [np.sort(rng.exponential(1, (5, 2)), axis=0) for _ in range(4)]
    least, most = (sum(cost[end] for cost in costs) for end in (0, -1))
    budgets = least + rng.uniform(0.2, 0.6, 2) * (most - least)
    picked = [list(itertools.product(*table)) for table in (losses, costs)]
    totals, spent = (np.sum(table, axis=1) for table in picked)
    lowest = totals[(spent <= budgets).all(axis=1)].min()
    for choose in (greedy_levels, exact_levels):
        levels = choose(losses, costs, budgets)
        assert (sum(c[v] for c, v in zip(costs, levels, strict=True)) <= budgets).all()
    assert sum(loss[v] for loss, v in zip(losses, levels, strict=True)) <= 1.01 * lowest


@pytest.mark.parametrize("choose", [greedy_levels, exact_levels])
def test_a_budget_of_nothing_but_the_least_buys_what_is_free(choose):
    losses, costs = [[3.0, 1.0], [3.0, 1.0]], [[[1.0, 2.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]]
    assert choose(losses, costs, np.array([1.0, 2.0])).tolist() == [1, 0]


@pytest.mark.parametrize("choose", [greedy_levels, exact_levels])
@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        ([[1.0, 0.0]], [[2.0, 3.0]], 1.0, "below the least cost 2"),
        ([[1.0]], [[2.0, 3.0]], 5.0, "1 losses and 2 costs"),
        ([[]], [[]], 5.0, "0 losses"),
        ([[1.0, 0.0]], [[3.0, 2.0]], 5.0, "first cost is not its least"),
        ([[np.nan, 0.0]], [[2.0, 3.0]], 5.0, "loss not finite"),
    ],
)
def test_bad_tables_are_refused(choose, losses, costs, budget, message):
    with pytest.raises(InputError, match=message):
        choose(losses, costs, budget)
