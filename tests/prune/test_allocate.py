"""Budgets are promises."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax.errors import InputError
from tapvit_jax.importance.layers import LayerScores
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.presets import create
from tapvit_jax.models.swin import swin_config
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.allocate import (
    AllocateConfig,
    RoundTo,
    allocate,
    check_budget,
    smallest_cost,
)
from tapvit_jax.prune.budget import Budget, within
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.latency import FEATURES, LatencyModel
from tapvit_jax.prune.mask import top_k_mask
from tapvit_jax.prune.ranking import unit_costs
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.prune.units import WIDTH_FIELDS, WIDTH_KINDS, unit_key, unit_table
from tapvit_jax.prune.widths import (
    divergence_curves,
    measured_divergence,
    softmax_keep,
    water_fill,
)

SMALL = vit_config(image_size=16, patch_size=4, num_classes=10, depth=4, num_heads=4, embed_dim=64)
UNITS = ("params", "macs", "encoder_params")
BOUNDS = (*UNITS, "model_bytes", "activation_bytes")
SWIN = swin_config(
    image_size=32,
    patch_size=2,
    num_classes=10,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
)


def random_scores(config, seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    units = {}
    for group in unit_table(config):
        scores = rng.standard_normal(group.shape)
        units[group.key] = np.round(scores) if ties else scores
    depth = len(config.blocks)
    layers = LayerScores((0.5,), *(rng.exponential(rng.choice([0.1, 3]), (2, 1, depth))))
    return units, layers


def grown(config, dense, options: AllocateConfig):
    """Every config that is one step of one width larger."""
    steps = {WIDTH_FIELDS[kind]: kind for kind in options.kinds}
    for i, (block, full) in enumerate(zip(config.blocks, dense.blocks, strict=True)):
        for name in steps:
            width, most = getattr(block, name), getattr(full, name)
            if width < most:
                step = options.step(steps[name])
                larger = dataclasses.replace(block, **{name: min(most, width + step)})
                blocks = (*config.blocks[:i], larger, *config.blocks[i + 1 :])
                yield dataclasses.replace(config, blocks=blocks)


def random_parts(config, seed: int):
    """Layer scores with queries and keys apart from values."""
    rng = np.random.default_rng(seed)
    shape = (3, 3, len(config.blocks))
    mlp, qk, vo = np.sort(rng.exponential(rng.choice([0.1, 3]), shape), axis=1)
    return LayerScores((0.3, 0.6, 0.9), mlp, qk + vo, qk, vo)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    bounds=st.dictionaries(st.sampled_from(BOUNDS), st.floats(0.3, 1.0), min_size=1),
    widths=st.sampled_from(["sensitivity", "greedy", "exact", "local", "global", "isomorphic"]),
    parts=st.sampled_from(["attn", "qk and vo", "heads"]),
    fair=st.booleans(),
)
def test_every_rule_keeps_the_budget_and_uses_it(seed, ties, bounds, widths, parts, fair):
    units, layers = random_scores(SMALL, seed, ties)
    layers = random_parts(SMALL, seed) if parts == "qk and vo" else layers
    budget = Budget(**bounds)
    ranked = fair and widths in ("global", "isomorphic")
    # Only scores that are not negative can be divided.
    units = {key: np.abs(scores) for key, scores in units.items()} if fair else units
    config = AllocateConfig(
        widths=widths,
        attention="heads" if parts == "heads" else "dims",
        per_cost=ranked,
        normalize=fair and widths == "global",
    )
    limits = budget.limits(SMALL)
    if not within(smallest_cost(SMALL, config), limits):
        return
    small = reshaped_config(allocate(SMALL, units, layers, budget, config=config))
    assert within(cost(small), limits)
    assert not [c for c in grown(small, SMALL, config) if within(cost(c), limits)]


def test_kinds_of_units_can_compete_on_one_scale():
    units, _ = random_scores(SMALL, 0, ties=False)
    units = {key: np.abs(scores) for key, scores in units.items()}
    louder = {key: 9 * scores if key.endswith("/qk") else scores for key, scores in units.items()}

    def widths(scores, **options):
        config = AllocateConfig(widths="global", **options)
        return reshaped_config(allocate(SMALL, scores, None, Budget(macs=0.6), config=config))

    assert widths(louder, normalize=True) == widths(units, normalize=True)
    assert widths(louder) != widths(units)


@pytest.mark.parametrize("bound", ["macs", "params"])
def test_of_equal_scores_the_costliest_units_go_first(bound):
    units = {group.key: np.ones(group.shape) for group in unit_table(SMALL)}
    costs = unit_costs(SMALL, bound)
    config = AllocateConfig(widths="global", per_cost=True, min_keep=0.0)
    plan = allocate(SMALL, units, None, Budget(**{bound: 0.7}), config=config)
    kinds = {kind: [key for key in costs if key.endswith(f"/{kind}")] for kind in WIDTH_KINDS}
    cost_of = {kind: costs[keys[0]] for kind, keys in kinds.items()}
    kept = {kind: np.mean([plan.keep[key].mean() for key in keys]) for kind, keys in kinds.items()}
    dear, cheap = max(cost_of, key=cost_of.get), min(cost_of, key=cost_of.get)
    assert cost_of[dear] > cost_of[cheap]
    assert kept[dear] < 0.5 * kept[cheap]


@pytest.mark.parametrize("widths", ["sensitivity", "exact", "global"])
def test_attention_can_lose_whole_heads(widths):
    units, layers = random_scores(SMALL, 0, ties=False)
    config = AllocateConfig(widths=widths, attention="heads")
    plan = allocate(SMALL, units, layers, Budget(macs=0.5), config=config)
    lost = 0
    for i, block in enumerate(reshaped_config(plan).blocks):
        full = SMALL.blocks[i]
        assert (block.qk_dim, block.v_dim) == (full.qk_dim, full.v_dim)
        kept, scores = plan.keep[unit_key(i, "head")], units[unit_key(i, "head")]
        assert 1 <= block.num_heads == kept.sum()
        assert kept.all() or scores[kept].min() >= scores[~kept].max()
        lost += full.num_heads - block.num_heads
    assert lost > 0


def test_heads_are_planned_by_probes_of_heads_and_by_their_own_floors():
    units, layers = random_scores(SMALL, 0, ties=False)
    config = AllocateConfig(attention="heads", min_dim=8)
    plan = allocate(SMALL, units, layers, Budget(macs=0.5), config=config)
    heads = [block.num_heads for block in reshaped_config(plan).blocks]
    assert min(heads) < SMALL.blocks[0].num_heads
    with pytest.raises(InputError, match="needs layers that were probed by heads"):
        allocate(SMALL, units, random_parts(SMALL, 0), Budget(macs=0.5), config=config)
    latency = LatencyModel(SMALL, (1.0,) * len(FEATURES), 1, 1, 0.0, 0.0, (), {})
    with pytest.raises(InputError, match="goes not with a bound on latency"):
        allocate(SMALL, units, layers, Budget(latency=0.9), config=config, latency=latency)


def test_attention_branches_go_by_heads_too():
    units, layers = random_scores(SMALL, 0, ties=False)
    layers = LayerScores((0.5, 1.0), 9 * np.ones((2, 4)), np.full((2, 4), 1e-6))
    config = AllocateConfig(widths="exact", attention="heads", branches=True)
    plan = allocate(SMALL, units, layers, Budget(macs=0.67), config=config)
    assert not any(block.attn for block in reshaped_config(plan).blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "heads", "ragged": True}, "attention 'heads' goes neither with ragged"),
        ({"attention": "head"}, "attention is 'head'"),
        ({"ragged": True, "round_to": 8}, r"round_to of qk and vo .* are \(8, 8, 1\)"),
        ({"ragged": True, "round_to": RoundTo(vo=2)}, r"are \(1, 2, 1\), expected 1"),
        ({"ragged": True, "min_dim": 2}, r"are \(1, 1, 2\), expected 1"),
        ({"per_cost": True}, "per_cost needs widths 'global' or 'isomorphic'"),
        ({"normalize": True, "widths": "isomorphic"}, "normalize needs widths 'global'"),
    ],
)
def test_options_of_other_rules_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AllocateConfig(**options)


@pytest.mark.parametrize("widths", ["sensitivity", "greedy", "exact"])
def test_parts_are_pruned_by_their_own_scores(widths):
    units, _ = random_scores(SMALL, 0, ties=False)
    shape = (2, len(SMALL.blocks))
    hard, easy = np.full(shape, 2.0), np.full(shape, 0.01)
    hard[0], easy[0] = 0.5, 0.002
    layers = LayerScores((0.4, 0.8), hard, hard + easy, easy, hard)
    plan = allocate(SMALL, units, layers, Budget(macs=0.8), config=AllocateConfig(widths=widths))
    for block in reshaped_config(plan).blocks:
        assert block.qk_dim < 0.5 * SMALL.blocks[0].qk_dim < 0.7 * block.v_dim


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"widths": "softmax"},
        {"widths": "sensitivity"},
        {"widths": "exact"},
        {"widths": "global", "per_cost": True, "normalize": True},
    ],
    ids=lambda options: options["widths"],
)
def test_coupled_dims_are_the_same_by_their_mean_score(options, parts):
    units, layers = random_scores(SMALL, 7, ties=False)
    units = {key: np.abs(scores) for key, scores in units.items()}
    layers = random_parts(SMALL, 7) if parts else layers
    config = AllocateConfig(coupled=True, **options)
    plan = allocate(SMALL, units, layers, Budget(macs=0.6), config=config)
    scale = dict.fromkeys(("qk", "vo"), 1.0)
    if config.normalize:
        scale = {k: np.mean([units[unit_key(i, k)] for i in range(4)]) for k in scale}
    for i in range(len(SMALL.blocks)):
        kept = plan.keep[unit_key(i, "qk")]
        np.testing.assert_array_equal(kept, plan.keep[unit_key(i, "vo")])
        score = sum(units[unit_key(i, kind)] / scale[kind] for kind in scale)
        for mask, row in zip(kept, score, strict=True):
            assert mask.all() or row[mask].min() >= row[~mask].max()
    assert not all(plan.keep[unit_key(i, "qk")].all() for i in range(len(SMALL.blocks)))


def test_unequal_dims_cannot_be_coupled():
    blocks = (BlockConfig(4, 8, 16, 256), *SMALL.blocks[1:])
    dense = dataclasses.replace(SMALL, blocks=blocks)
    units, layers = random_scores(dense, 0, ties=False)
    with pytest.raises(InputError, match="blocks_0: coupled ranking needs as many qk as vo"):
        allocate(dense, units, layers, Budget(macs=0.6), config=AllocateConfig(coupled=True))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.1, 1.0),
    unit=st.sampled_from(UNITS),
    widths=st.sampled_from(["greedy", "exact"]),
    parts=st.booleans(),
)
def test_branches_go_within_the_budget(seed, share, unit, widths, parts):
    units, _ = random_scores(SMALL, seed, ties=False)
    layers = random_parts(SMALL, seed)
    layers = dataclasses.replace(layers, sparsity=(0.3, 0.6, 1.0))
    layers = layers if parts else dataclasses.replace(layers, qk=None, vo=None)
    budget, config = Budget(**{unit: share}), AllocateConfig(widths=widths, branches=True)
    if not within(smallest_cost(SMALL, config), budget.limits(SMALL)):
        with pytest.raises(InputError, match="smallest feasible"):
            allocate(SMALL, units, layers, budget, config=config)
        return
    plan = allocate(SMALL, units, layers, budget, config=config)
    small = reshaped_config(plan)
    assert within(cost(small), budget.limits(SMALL))
    for i, block in enumerate(small.blocks):
        for branch, kinds in (("mlp", ["mlp"]), ("attn", ["qk", "vo"])):
            there = bool(plan.keep[unit_key(i, f"{branch}_branch")])
            assert getattr(block, branch) == there
            assert all(plan.keep[unit_key(i, kind)].any() == there for kind in kinds)


TWO = dataclasses.replace(SMALL, blocks=SMALL.blocks[:2])
TWO_STAGES = dataclasses.replace(SWIN, blocks=(SWIN.blocks[0], SWIN.blocks[2]), depths=(1, 1))
WIDTHS = {"mlp": "mlp_dim", "qk": "qk_dim", "vo": "v_dim"}


@functools.cache
def affordable(dense, budget, config):
    """All admissible widths of both blocks within the budget, a row (mlp, qk, vo) * 2 each."""
    grids = []
    for block in dense.blocks:
        for kind, field in WIDTHS.items():
            full, step = getattr(block, field), config.step(kind)
            floor = max(step, -(-config.min_keep * full // step) * step)
            grids.append(np.arange(floor, full + 1, step, dtype=int))
    rows = np.array(list(itertools.product(*grids)))
    costs = np.zeros((len(rows), 2))
    full = cost(dense)
    for i, grid in enumerate(grids):
        # Costs are sums over widths.
        block, field = divmod(i, 3)
        priced = {}
        for width in grid:
            narrow = dataclasses.replace(
                dense.blocks[block], **{[*WIDTHS.values()][field]: int(width)}
            )
            blocks = (*dense.blocks[:block], narrow, *dense.blocks[block + 1 :])
            found = cost(dataclasses.replace(dense, blocks=blocks))
            priced[width] = found.macs - full.macs, found.params - full.params
        costs += [priced[width] for width in rows[:, i]]
    limits = budget.limits(dense)
    bounds = np.array([limits.get("macs", full.macs), limits.get("params", full.params)])
    return rows[(costs <= bounds - [full.macs, full.params]).all(axis=1)]


def divergence_of(dense, layers, rows):
    full = np.array([getattr(block, field) for block in dense.blocks for field in WIDTHS.values()])
    pruned = 1 - np.asarray(rows) / full
    return sum(
        measured_divergence(layers, kind, pruned[:, 3 * block + j])[:, block]
        for block in range(2)
        for j, kind in enumerate(WIDTHS)
    )


@pytest.mark.parametrize(
    ("dense", "bounds", "min_keep"),
    [
        (TWO, {"macs": 0.5}, 0.0),
        (TWO, {"macs": 0.6, "params": 0.45}, 0.0),
        (TWO, {"macs": 0.7}, 0.5),
        (TWO_STAGES, {"macs": 0.6, "params": 0.6}, 0.3),
    ],
    ids=["rounded", "two bounds", "floors", "two stages"],
)
def test_rounded_widths_are_the_best_within_floors_and_bounds(dense, bounds, min_keep):
    steps = RoundTo(mlp=64, qk=4, vo=4) if dense is TWO else RoundTo(mlp=16, qk=2, vo=2)
    config = AllocateConfig(widths="exact", min_keep=min_keep, round_to=steps)
    rows = affordable(dense, Budget(**bounds), config)
    greedy = []
    for seed in range(12):
        units, layers = random_scores(dense, seed, ties=False)[0], random_parts(dense, seed)
        lowest = divergence_of(dense, layers, rows).min()

        def lost(widths, units=units, layers=layers):
            options = dataclasses.replace(config, widths=widths)
            plan = allocate(dense, units, layers, Budget(**bounds), config=options)
            small = reshaped_config(plan)
            row = [getattr(b, field) for b in small.blocks for field in WIDTHS.values()]
            assert (rows == row).all(axis=1).any()
            return divergence_of(dense, layers, [row])[0]

        assert lost("exact") <= 1.01 * lowest
        greedy.append(lost("greedy") / lowest)
    assert np.mean(greedy) <= 1.04


def test_a_branch_that_does_nothing_goes():
    units, _ = random_scores(SMALL, 0, ties=False)
    shape = (2, len(SMALL.blocks))
    scores = np.array([[0.5], [2.0]]) * np.ones(shape)
    mlp, vo = scores.copy(), scores.copy()
    mlp[:, 1], vo[:, 2] = 1e-9, 1e-9
    layers = LayerScores((0.5, 1.0), mlp, scores + vo, scores, vo)
    for widths in ("greedy", "exact"):
        config = AllocateConfig(widths=widths, branches=True)
        plan = allocate(SMALL, units, layers, Budget(macs=0.7), config=config)
        blocks = reshaped_config(plan).blocks
        assert [block.mlp for block in blocks] == [True, False, True, True]
        assert [block.attn for block in blocks] == [True, True, False, True]


def test_branches_go_only_where_that_was_probed():
    units, layers = random_scores(SMALL, 0, ties=False)
    config = AllocateConfig(widths="exact", branches=True)
    for found in (layers, None):
        with pytest.raises(InputError, match="probed at sparsity 1"):
            allocate(SMALL, units, found, Budget(macs=0.7), config=config)
    with pytest.raises(InputError, match="branches needs widths"):
        AllocateConfig(branches=True)


def test_measured_curves_run_through_the_probes():
    layers = random_parts(SMALL, 3)
    found = measured_divergence(layers, "qk", np.array([0.0, *layers.sparsity, 1.0]))
    np.testing.assert_allclose(found[1:4], layers.qk, rtol=1e-6)
    assert np.all(found[0] == 0)
    assert np.all(np.diff(found, axis=0) >= 0)


@settings(max_examples=200)
@given(
    dense=st.sampled_from([SMALL, SWIN]),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    bounds=st.dictionaries(st.sampled_from(BOUNDS), st.floats(0.05, 1.0), min_size=1),
    round_to=st.sampled_from([1, 1, 4, 8, RoundTo(mlp=32, qk=4, vo=2)]),
    min_keep=st.sampled_from([0.0, 0.1]),
    widths=st.sampled_from(["sensitivity", "softmax"]),
)
def test_budget_is_kept_and_used(dense, seed, ties, bounds, round_to, min_keep, widths):
    units, layers = random_scores(dense, seed, ties)
    budget = Budget(**bounds)
    config = AllocateConfig(round_to=round_to, min_keep=min_keep, widths=widths)
    limits = budget.limits(dense)
    smallest = smallest_cost(dense, config)
    if not within(smallest, limits):
        with pytest.raises(InputError, match="smallest feasible"):
            allocate(dense, units, layers, budget, config=config)
        return
    plan = allocate(dense, units, layers, budget, config=config)
    small = reshaped_config(plan)
    found = cost(small)
    assert within(found, limits)
    # At least 99 % is used, or there is no room for a single further step of any width.
    used = max(getattr(found, unit) / limit for unit, limit in limits.items())
    larger = [c for c in grown(small, dense, config) if within(cost(c), limits)]
    assert used >= 0.99 or not larger
    assert not larger
    for i, block in enumerate(small.blocks):
        for kind, width in (("mlp", block.mlp_dim), ("qk", block.qk_dim), ("vo", block.v_dim)):
            mask = plan.keep[unit_key(i, kind)]
            rows = mask[None] if kind == "mlp" else mask
            assert np.all(rows.sum(axis=1) == width)
            assert width % config.step(kind) == 0 or width == rows.shape[1]
            # The kept units are the highest scores; under ties the count still is exact.
            scores = np.atleast_2d(units[unit_key(i, kind)])
            for kept, row in zip(rows, scores, strict=True):
                assert kept.all() or row[kept].min() >= row[~kept].max()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.15, 0.95),
    unit=st.sampled_from(UNITS),
    widths=st.sampled_from(["sensitivity", "exact"]),
)
def test_ragged_plans_keep_the_budget_with_padding(seed, share, unit, widths):
    units, layers = random_scores(SMALL, seed, ties=False)
    budget = Budget(**{unit: share})
    config = AllocateConfig(widths=widths, ragged=True, coupled=True)
    try:
        plan = allocate(SMALL, units, layers, budget, config=config)
    except InputError as error:
        # How widely the narrowest plan pads depends on the scores; it is near the floor's cost.
        assert "smallest feasible" in str(error)
        assert share < 0.25
        return
    assert within(cost(reshaped_config(plan)), budget.limits(SMALL))
    for i in range(len(SMALL.blocks)):
        np.testing.assert_array_equal(plan.keep[unit_key(i, "qk")], plan.keep[unit_key(i, "vo")])


def test_mlps_of_ragged_plans_are_rounded():
    units, layers = random_scores(SMALL, 0, ties=False)
    config = AllocateConfig(ragged=True, round_to=RoundTo(mlp=64))
    small = reshaped_config(allocate(SMALL, units, layers, Budget(macs=0.6), config=config))
    assert all(block.mlp_dim % 64 == 0 for block in small.blocks)


def test_typical_budgets_are_used_to_99_percent():
    deit = vit_config(
        image_size=224, patch_size=16, num_classes=1000, depth=12, num_heads=6, embed_dim=384
    )
    units, layers = random_scores(deit, 0, ties=False)
    for share in (0.3, 0.5, 0.7, 0.9):
        for unit in UNITS:
            plan = allocate(deit, units, layers, Budget(**{unit: share}))
            found = getattr(cost(reshaped_config(plan)), unit) / getattr(cost(deit), unit)
            assert 0.99 * share <= found <= share


def test_a_full_budget_keeps_everything():
    units, layers = random_scores(SMALL, 1, ties=False)
    plan = allocate(SMALL, units, layers, Budget(macs=1.0))
    assert reshaped_config(plan) == SMALL


def test_more_important_layers_keep_more():
    units, _ = random_scores(SMALL, 2, ties=False)
    layers = LayerScores((0.5,), np.array([[0.0, 1.0, 2.0, 3.0]]), np.zeros((1, 4)))
    for rule in ("sensitivity", "softmax"):
        config = AllocateConfig(widths=rule)
        small = reshaped_config(allocate(SMALL, units, layers, Budget(macs=0.6), config=config))
        widths = [block.mlp_dim for block in small.blocks]
        assert widths == sorted(widths)
        assert widths[0] < widths[-1]


def test_sensitivity_prunes_the_branch_that_minds_least():
    units, _ = random_scores(SMALL, 2, ties=False)
    probes = np.array([0.3, 0.5, 0.7])
    quiet, loud = np.tile(0.01 * probes[:, None] ** 2, 4), np.tile(probes[:, None] ** 2, 4)
    for mlp, attn in ((quiet, loud), (loud, quiet)):
        layers = LayerScores(tuple(probes), mlp, attn)
        small = reshaped_config(allocate(SMALL, units, layers, Budget(macs=0.7)))
        kept = [(b.mlp_dim / 256, b.qk_dim / 16) for b in small.blocks]
        for mlp_keep, attn_keep in kept:
            assert (mlp_keep < attn_keep) == (mlp is quiet)


def test_sensitivity_meets_its_first_order_conditions():
    # Two free widths: no exchange of cost between them may lower the predicted divergence.
    units, _ = random_scores(SMALL, 2, ties=False)
    probes = (0.25, 0.5, 0.75)
    rng = np.random.default_rng(0)
    a = rng.uniform(0.1, 1.0, (2, 4))
    p = rng.uniform(1.5, 3.0, (2, 4))
    layers = LayerScores(probes, *(a[i] * np.array(probes)[:, None] ** p[i] for i in range(2)))
    config = AllocateConfig(min_keep=0.0)
    small = reshaped_config(allocate(SMALL, units, layers, Budget(params=0.6), config=config))
    pruned = np.array([[1 - b.mlp_dim / 256 for b in small.blocks]])
    slopes = (a[0] * p[0] * pruned ** (p[0] - 1))[0]
    np.testing.assert_allclose(slopes, slopes.mean(), rtol=0.05)


def test_curves_are_recovered_from_their_points():
    probes = np.array([0.3, 0.5, 0.7])
    a, p = np.array([0.5, 2.0]), np.array([1.5, 3.0])
    layers = LayerScores(tuple(probes), a * probes[:, None] ** p, np.zeros((3, 2)))
    curves = divergence_curves(layers)
    np.testing.assert_allclose(curves["mlp"], (a, p), rtol=1e-6)
    assert np.all(np.isfinite(curves["attn"]))


def test_published_clipping_loses_budget_and_water_filling_does_not():
    units, _ = random_scores(SMALL, 3, ties=False)
    layers = LayerScores((0.5,), np.array([[0.0, 0.0, 0.0, 9.0]]), np.zeros((1, 4)))
    budget = Budget(encoder_params=0.7)
    used = {}
    for clip in ("clip", "water_fill"):
        config = dataclasses.replace(AllocateConfig.as_published(), clip=clip)
        plan = allocate(SMALL, units, layers, budget, config=config)
        used[clip] = cost(reshaped_config(plan)).encoder_params / cost(SMALL).encoder_params
    assert used["clip"] < 0.6 < 0.69 < used["water_fill"] <= 0.7


@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20),
    average=st.floats(0.0, 1.0),
    low=st.sampled_from([0.0, 0.1]),
)
def test_water_filling_meets_the_average_exactly(weights, average, low):
    average = max(average, low)
    keep = water_fill(np.array(weights), average, low)
    assert keep.min() >= low - 1e-12
    assert keep.max() <= 1 + 1e-12
    assert abs(keep.mean() - average) <= 1e-9
    # Never less for a larger weight.
    order = np.argsort(weights)
    assert np.all(np.diff(keep[order]) >= -1e-12)


def test_softmax_keep_clips_as_published():
    np.testing.assert_allclose(softmax_keep(np.array([0.7, 0.2, 0.1]), 0.6), [1.0, 0.36, 0.18])


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=30), data=st.data())
def test_masks_have_exactly_k_ones_under_ties(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    mask = top_k_mask(np.array(scores, float), count)
    assert mask.sum() == count
    # Ties go to the lower index.
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert sorted(np.flatnonzero(mask)) == sorted(expected)


def test_scores_that_are_nan_are_refused():
    with pytest.raises(InputError, match="NaN"):
        top_k_mask(np.array([1.0, np.nan]), 1)


@pytest.mark.parametrize("unit", UNITS)
def test_infeasible_budget_names_the_smallest_feasible(unit):
    smallest = getattr(smallest_cost(SMALL, AllocateConfig()), unit)
    check_budget(SMALL, Budget(**{unit: smallest}))
    with pytest.raises(InputError, match=f"{unit}.*smallest feasible is {smallest}"):
        check_budget(SMALL, Budget(**{unit: smallest - 1}))


def test_the_fraction_that_an_infeasible_budget_names_is_feasible():
    with pytest.raises(InputError) as error:
        check_budget(SMALL, Budget(macs=1e-6))
    fraction = float(str(error.value).split("a fraction of ")[1].rstrip(")"))
    check_budget(SMALL, Budget(macs=fraction))


def test_models_with_missing_branches_are_planned():
    blocks = (
        BlockConfig(4, 16, 16, 256),
        BlockConfig(0, 0, 0, 256, attn=False),
        BlockConfig(4, 8, 16, 0, mlp=False),
        BlockConfig(0, 0, 0, 0, attn=False, mlp=False),
    )
    config = dataclasses.replace(SMALL, blocks=blocks)
    units, layers = random_scores(config, 4, ties=False)
    plan = allocate(config, units, layers, Budget(macs=0.5))
    found = cost(reshaped_config(plan)).macs / cost(config).macs
    assert 0.49 <= found <= 0.5


def test_missing_scores_are_named():
    units, layers = random_scores(SMALL, 5, ties=False)
    del units["blocks_2/qk"]
    with pytest.raises(InputError, match="no scores for blocks_2/qk"):
        allocate(SMALL, units, layers, Budget(macs=0.5))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones(3), r"blocks_0/mlp have shape \(3,\), expected \(256,\)"),
        (np.append(np.ones(255), np.inf), "blocks_0/mlp are not finite"),
    ],
    ids=["shape", "inf"],
)
def test_scores_that_do_not_fit_are_refused(scores, message):
    units, layers = random_scores(SMALL, 5, ties=False)
    for widths in ("sensitivity", "global"):
        with pytest.raises(InputError, match=message):
            config = AllocateConfig(widths=widths)
            budget = Budget(macs=0.5)
            allocate(SMALL, units | {"blocks_0/mlp": scores}, layers, budget, config=config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=0.5", Budget(macs=0.5)),
        ("params=50%", Budget(params=0.5)),
        ("macs=1.5G,params=12M", Budget(macs=1_500_000_000, params=12_000_000)),
        ("encoder_params=1234", Budget(encoder_params=1234)),
        ("macs=1.0", Budget(macs=1.0)),
        ("macs=0.9999999", Budget(macs=0.9999999)),
    ],
)
def test_budgets_are_read_from_text(text, expected):
    assert Budget.parse(text) == expected
    again = Budget.parse(str(expected))
    # Compared as text too: one and 1.0 are equal, but mean an amount and a fraction.
    assert again == expected and repr(again) == repr(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs=0", "more than 0"),
        ("macs=-0.5", "more than 0"),
        ("macs=1.5", "at most 1.0"),
        ("macs=150%", "at most 1.0"),
        ("flops=0.5", "unit one of"),
        ("macs", "UNIT=AMOUNT"),
        ("macs=half", "expected a fraction"),
        ("macs=nan", "expected a fraction"),
        ("macs=1e300T", "expected a fraction"),
        ("macs=1", "an amount of one; for all of it write macs=1.0"),
        ("macs=0.5,macs=0.4", "twice"),
    ],
)
def test_bad_budgets_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", RoundTo(8, 8, 8)),
        ("mlp=64,qk=8", RoundTo(mlp=64, qk=8)),
        ("4,mlp=16", RoundTo(mlp=16, qk=4, vo=4)),
    ],
)
def test_rounding_is_read_from_text(text, expected):
    assert RoundTo.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "mlp", "head=8", "mlp=x", "mlp=-8", "9" * 5000])
def test_bad_rounding_is_refused(text):
    with pytest.raises(InputError, match="round_to"):
        RoundTo.parse(text)


def test_peak_memory_caps_every_branch():
    units, layers = random_scores(SMALL, 6, ties=False)
    full = cost(SMALL).activation_bytes
    small = reshaped_config(allocate(SMALL, units, layers, Budget(activation_bytes=0.6)))
    assert cost(small).activation_bytes <= 0.6 * full
    # The MLPs make the peak here; attention, which does not, stays whole.
    assert all(block.qk_dim == block.v_dim == 16 for block in small.blocks)
    assert all(block.mlp_dim > 100 for block in small.blocks)
    assert len({block.mlp_dim for block in small.blocks}) == 1


def test_resnets_are_not_pruned():
    resnet, _ = create("resnet18")
    with pytest.raises(InputError, match="a resnet only serves as a feature extractor"):
        check_budget(resnet, Budget(macs=0.5))


def test_a_budget_needs_a_bound():
    with pytest.raises(InputError, match="at least one"):
        Budget()
