"""Ranking rules against sorting by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapvit_jax.errors import InputError
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.swin import swin_config
from tapvit_jax.models.vit import ViTConfig, vit_config
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.ranking import (
    global_rule,
    isomorphic_rule,
    local_rule,
    ranking_rule,
    unit_costs,
)
from tapvit_jax.prune.units import WIDTH_KINDS, unit_table

VIT = vit_config(image_size=8, patch_size=4, num_classes=3, depth=2, num_heads=2, embed_dim=8)
SWIN = swin_config(
    image_size=8,
    patch_size=1,
    num_classes=5,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=4,
    mlp_ratio=2.0,
)


def two_blocks(*blocks):
    return ViTConfig(8, 4, 3, embed_dim=8, head_dim=4, blocks=blocks)


def random_units(config, seed, ties=False):
    rng = np.random.default_rng(seed)
    units = {group.key: rng.random(group.shape) for group in unit_table(config)}
    return {key: np.round(4 * values) if ties else values for key, values in units.items()}


def size_of(group, ragged):
    return group.size if ragged else group.shape[-1]


def counts(config, keeps, ragged=False):
    """What `allocate` makes of ratios."""
    groups = [group for group in unit_table(config) if group.key in keeps]
    return {group.key: int(keeps[group.key] * size_of(group, ragged) + 1e-9) for group in groups}


MLP_ONLY = two_blocks(*[BlockConfig(0, 0, 0, 4, attn=False)] * 2)
MLP_UNITS = {"blocks_0/mlp": np.array([1.0, 9, 5, 3]), "blocks_1/mlp": np.array([2.0, 8, 7, 6])}


def test_one_threshold_ranks_the_units_of_all_layers():
    rule = global_rule(MLP_ONLY, MLP_UNITS, kinds=["mlp"])
    # From the best on: 9 | 8 7 6 | 5 3 | 2 | 1.
    expected = [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 4), (4, 4)]
    for kept, pair in enumerate(expected):
        found = counts(MLP_ONLY, rule(kept / 8))
        assert (found["blocks_0/mlp"], found["blocks_1/mlp"]) == pair
    # Half-way from the fourth to the fifth unit of all, block 0 is nearer to its next unit.
    between = rule(4.5 / 8)
    assert between["blocks_0/mlp"] * 4 == pytest.approx(1 + 3.5 / 4)
    assert between["blocks_1/mlp"] * 4 == pytest.approx(3 + 0.5 / 3)


def test_ties_are_shared_out_evenly():
    units = {key: np.ones(4) for key in MLP_UNITS}
    rule = global_rule(MLP_ONLY, units, kinds=["mlp"])
    for kept in range(0, 9, 2):
        assert set(counts(MLP_ONLY, rule(kept / 8)).values()) == {kept // 2}


def test_expensive_units_need_higher_scores():
    costs = {"blocks_0/mlp": 10.0, "blocks_1/mlp": 1.0}
    rule = global_rule(MLP_ONLY, MLP_UNITS, costs=costs, kinds=["mlp"])
    assert counts(MLP_ONLY, rule(0.5)) == {"blocks_0/mlp": 0, "blocks_1/mlp": 4}


def test_heads_keep_equally_many_dims_by_their_mean_position():
    config = two_blocks(*[BlockConfig(2, 2, 2, 0, mlp=False)] * 2)
    units = random_units(config, 0)
    # Positions of block 0: (9 + 1) / 2 and (2 + 0) / 2; of block 1: (4 + 3) / 2 and (3 + 3) / 2.
    units["blocks_0/vo"] = np.array([[9.0, 2], [0, 1]])
    units["blocks_1/vo"] = np.array([[3.0, 4], [3, 3]])
    rule = global_rule(config, units, kinds=["vo"])
    expected = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)]
    for kept, pair in enumerate(expected):
        found = counts(config, rule(kept / 4))
        assert (found["blocks_0/vo"], found["blocks_1/vo"]) == pair
    ragged = global_rule(config, units, kinds=["vo"], ragged=True)
    # One by one: 9 | 4 3 3 3 | 2 1 0.
    assert counts(config, ragged(5 / 8), ragged=True) == {"blocks_0/vo": 1, "blocks_1/vo": 4}


def test_a_position_counts_for_all_its_heads():
    config = two_blocks(BlockConfig(3, 0, 2, 3), BlockConfig(0, 0, 0, 0, attn=False, mlp=False))
    units = {"blocks_0/vo": np.full((3, 2), 5.0), "blocks_0/mlp": np.array([1.0, 9, 2])}
    rule = global_rule(config, units, kinds=["vo", "mlp"])
    # 9 | 5 5 5 | 5 5 5 | 2 | 1, of nine units.
    for kept, pair in {1: (0, 1), 3: (0, 1), 4: (1, 1), 7: (2, 1), 8: (2, 2)}.items():
        found = counts(config, rule(kept / 9))
        assert (found["blocks_0/vo"], found["blocks_0/mlp"]) == pair


def test_isomorphic_ranks_every_kind_on_its_own():
    units = random_units(SWIN, 1)
    for key in units:
        units[key] *= 1000 if key.endswith("mlp") else 1
    kinds = (*WIDTH_KINDS, "head")
    rule = isomorphic_rule(SWIN, units, kinds=kinds)
    for t in (0.2, 0.5, 0.8):
        for kind in kinds:
            alone = global_rule(SWIN, units, kinds=[kind])(t)
            for key, ratio in alone.items():
                assert rule(t)[key] == pytest.approx(ratio)
    # Ranked together, the large scores win.
    half = counts(SWIN, global_rule(SWIN, units)(0.5))
    sizes = {group.key: group.shape[-1] for group in unit_table(SWIN) if group.shape}
    assert half == {key: sizes[key] if key.endswith("mlp") else 0 for key in half}
    # Divided by their mean, they are of one size again.
    half = counts(SWIN, global_rule(SWIN, units, normalize=True)(0.5))
    assert all(0 < count < sizes[key] for key, count in half.items())


def test_normalised_kinds_without_scores_are_left_alone():
    units = {key: np.zeros(4) for key in MLP_UNITS}
    rule = global_rule(MLP_ONLY, units, normalize=True, kinds=["mlp"])
    assert counts(MLP_ONLY, rule(0.5)) == {"blocks_0/mlp": 2, "blocks_1/mlp": 2}


def test_normalising_leaves_scores_by_cost_as_they_are():
    """What is worth its cost ranks by that worth, whatever kind or layer it is of."""
    kinds, costs = ("mlp", "head"), unit_costs(SWIN)
    worth = random_units(SWIN, 7)
    scores = {key: worth[key] * cost for key, cost in costs.items()}
    expected = global_rule(SWIN, worth, normalize=True, kinds=kinds)
    rule = global_rule(SWIN, scores, costs=costs, normalize=True, kinds=kinds)
    for t in (0.2, 0.5, 0.8):
        assert rule(t) == pytest.approx(expected(t))


def test_coupled_dims_keep_one_count():
    units = random_units(VIT, 2)
    for t in (0.1, 0.45, 0.9):
        for build in (global_rule, isomorphic_rule):
            found = counts(VIT, build(VIT, units, coupled=True)(t))
            assert [found[f"blocks_{i}/qk"] for i in range(2)] == [
                found[f"blocks_{i}/vo"] for i in range(2)
            ]


@given(
    config=st.sampled_from([VIT, SWIN]),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    ranking=st.sampled_from(["local", "global", "isomorphic"]),
    ragged=st.booleans(),
    coupled=st.booleans(),
    priced=st.booleans(),
    ts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rules_go_from_nothing_to_everything(
    config, seed, ties, ranking, ragged, coupled, priced, ts
):
    units = random_units(config, seed, ties)
    costs = unit_costs(config) if priced else None
    options = {"costs": costs, "ragged": ragged, "coupled": coupled}
    rule = ranking_rule(config, units, ranking, **options)
    groups = [group for group in unit_table(config) if group.kind in WIDTH_KINDS]
    assert rule(0.0) == {group.key: 0.0 for group in groups}
    assert rule(1.0) == {group.key: 1.0 for group in groups}
    low, high = rule(min(ts)), rule(max(ts))
    assert all(0 <= low[key] <= high[key] <= 1 for key in low)
    # No more units stay than asked for, and fewer only by what lies between two positions.
    total = sum(group.size for group in groups)
    heads = max(group.shape[0] for group in groups if group.kind == "qk")
    for t in ts:
        if ranking == "local":
            assert set(rule(t).values()) == {t}
            continue
        kept = counts(config, rule(t), ragged)
        whole = sum(kept[group.key] * (group.size // size_of(group, ragged)) for group in groups)
        between = 2 * heads * (1 if ranking == "global" else 3)
        assert t * total - between <= whole <= t * total + 1e-6


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), ragged=st.booleans())
def test_the_order_of_units_and_the_scale_of_all_scores_change_nothing(seed, t, ragged):
    units = random_units(SWIN, seed)
    rng = np.random.default_rng(seed)
    shuffled = {}
    for key, values in units.items():
        values = rng.permuted(values, axis=-1) if values.ndim else values
        shuffled[key] = 7.0 * (rng.permutation(values) if values.ndim == 2 else values)
    for build in (global_rule, isomorphic_rule):
        expected = build(SWIN, units, ragged=ragged)(t)
        found = build(SWIN, shuffled, ragged=ragged)(t)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("config", [VIT, SWIN])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_unit_costs_add_up_to_what_the_units_cost(config, unit):
    costs = unit_costs(config, unit)
    for i, block in enumerate(config.blocks):
        narrow = BlockConfig(block.num_heads, block.qk_dim - 1, block.v_dim - 3, block.mlp_dim - 2)
        blocks = (*config.blocks[:i], narrow, *config.blocks[i + 1 :])
        saved = getattr(cost(config), unit)
        saved -= getattr(cost(dataclasses.replace(config, blocks=blocks)), unit)
        expected = 2 * costs[f"blocks_{i}/mlp"] + block.num_heads * (
            costs[f"blocks_{i}/qk"] + 3 * costs[f"blocks_{i}/vo"]
        )
        assert saved == pytest.approx(expected)


def test_groups_without_units_rank_nothing():
    absent = BlockConfig(0, 0, 0, 0, attn=False, mlp=False)
    config = two_blocks(BlockConfig(2, 0, 3, 0), absent, BlockConfig(0, 0, 0, 4))
    units = random_units(config, 3)
    for ranking in ("global", "isomorphic"):
        rule = ranking_rule(config, units, ranking, costs=unit_costs(config))
        assert rule(0.0)["blocks_2/mlp"] == 0
        assert rule(1.0)["blocks_0/vo"] == 1
        assert all(np.isfinite(list(rule(0.4).values())))


def without(units, key):
    return {name: values for name, values in units.items() if name != key}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda u: without(u, "blocks_1/vo"), {}, "no scores for blocks_1/vo"),
        (lambda u: u | {"blocks_0/mlp": np.ones(3)}, {}, r"shape \(3,\), expected \(32,\)"),
        (lambda u: u | {"blocks_0/mlp": np.full(32, np.nan)}, {}, "blocks_0/mlp are not finite"),
        (lambda u: u | {"blocks_0/mlp": np.full(32, -1.0)}, {"normalize": True}, "are negative"),
        (lambda u: u, {"costs": {}}, "cost of a unit of blocks_0/qk is None"),
        (lambda u: u, {"costs": dict.fromkeys(unit_costs(VIT), 0.0)}, "expected a positive"),
    ],
)
def test_bad_scores_and_costs_are_refused(change, options, message):
    with pytest.raises(InputError, match=message):
        global_rule(VIT, change(random_units(VIT, 4)), **options)


def test_unequal_dims_cannot_be_coupled():
    config = two_blocks(BlockConfig(2, 4, 3, 4))
    with pytest.raises(InputError, match="blocks_0: coupled ranking needs as many qk as vo"):
        global_rule(config, random_units(config, 5), coupled=True)


def test_an_unknown_ranking_is_refused():
    with pytest.raises(InputError, match="ranking is 'best', expected one of local"):
        ranking_rule(VIT, random_units(VIT, 6), "best")


def test_local_ratios_are_all_alike():
    assert set(local_rule(VIT)(0.3).values()) == {0.3}
