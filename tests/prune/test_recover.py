"""Closed-form recovery against least squares on explicit activations."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.prune import moments, streams
from tapvit_jax.prune.mask import Plan, apply_masks, param_masks, unit_masks
from tapvit_jax.prune.moments import Moments
from tapvit_jax.prune.recover import (
    RecoverConfig,
    kept_moments,
    move_prior,
    recover,
    solve_mlp,
    solve_queries_keys,
    solve_values,
)
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.prune.streams import Streams
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh
from tapvit_jax.train.classes import prior_weights
from tests.conftest import realistic, tiny_swin

ONE = data_mesh(jax.local_devices()[:1])
ROWS, EMBED, HIDDEN, HEADS, DIMS = 60, 5, 8, 2, 4
# Twice an odd number: its halves are padded to the same shape, yet end on different folds.
COUNT = 22


def recovered(model, plan, batches, method=None, **options):
    """On one device: a program for several takes longer to compile than all else here."""
    return recover(model, plan, batches, method, mesh=ONE, **options)


def images_of(count, seed=3):
    return np.random.default_rng(seed).standard_normal((count, 8, 8, 3)).astype(np.float32)


# The layers' solvers, without a model.


@pytest.fixture
def no_penalty(monkeypatch):
    monkeypatch.setattr(moments, "PENALTIES", (0.0,))


def folds_of(x, y):
    """Moments of even and of odd rows in float64."""

    def exact(x, y):
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        centred = (x - mean_x).T
        return Moments(len(x), mean_x, mean_y, centred @ (x - mean_x), centred @ (y - mean_y))

    return [exact(x[fold::2], y[fold::2]) for fold in (0, 1)]


def least_squares(x, y):
    """Weights and bias."""
    found = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return found[:-1], found[-1]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("scaled", [False, True])
def test_mlp_is_solved_by_least_squares(no_penalty, rng, scaled):
    hidden, target = rng.standard_normal((ROWS, HIDDEN)) + 1, rng.standard_normal((ROWS, EMBED))
    draw = rng.standard_normal
    mlp = {
        "fc1": {"kernel": draw((EMBED, HIDDEN)), "bias": draw(HIDDEN)},
        "fc2": {"kernel": draw((HIDDEN, EMBED)), "bias": draw(EMBED)},
    }
    # What a layer scale of zero hides is left alone.
    scale = np.array([0.1, -2.0, 0.0, 1.0, 3.0]) if scaled else 1.0
    keep = np.arange(HIDDEN) % 3 != 1
    folds = folds_of(hidden, target)
    moments = kept_moments(folds, keep, mlp["fc2"]["kernel"] * scale)
    found = solve_mlp(mlp, *moments, keep, scale=scale)
    kernel, bias = least_squares(hidden[:, keep], target)
    seen = np.broadcast_to(scale, EMBED) != 0
    np.testing.assert_allclose(
        (found["fc2"]["kernel"] * scale)[keep][:, seen], kernel[:, seen], 1e-4
    )
    np.testing.assert_allclose((found["fc2"]["bias"] * scale)[seen], bias[seen], 1e-4)
    np.testing.assert_allclose(found["fc2"]["bias"][~seen], mlp["fc2"]["bias"][~seen], 1e-6)
    for leaf in (found["fc1"]["kernel"].T, found["fc1"]["bias"], found["fc2"]["kernel"]):
        np.testing.assert_array_equal(leaf[~keep], 0)
    np.testing.assert_allclose(found["fc1"]["kernel"][:, keep], mlp["fc1"]["kernel"][:, keep], 1e-6)
    moments = kept_moments(folds, keep, mlp["fc2"]["kernel"])
    mean = solve_mlp(mlp, *moments, keep, ridge=False)["fc2"]
    np.testing.assert_allclose(mean["kernel"], mlp["fc2"]["kernel"] * keep[:, None], 1e-6)
    made = hidden @ mean["kernel"] + mean["bias"]
    np.testing.assert_allclose(made.mean(axis=0), target.mean(axis=0), atol=1e-5)


def attention_of(rng, heads=HEADS, dims=DIMS):
    draw = rng.standard_normal
    return {
        "v": {"kernel": draw((EMBED, heads, dims)), "bias": draw((heads, dims))},
        "proj": {"kernel": draw((heads, dims, EMBED)), "bias": draw(EMBED)},
    }


def values_of(attn, x):
    """What heads say that attend to one token each."""
    return np.einsum("rd,dhv->rhv", x, attn["v"]["kernel"]) + attn["v"]["bias"]


@pytest.mark.parametrize("low_rank", [False, True])
def test_values_are_solved_by_least_squares(no_penalty, rng, low_rank):
    attn, x = attention_of(rng), rng.standard_normal((ROWS, EMBED))
    target = rng.standard_normal((ROWS, EMBED))
    outputs = values_of(attn, x).reshape(ROWS, -1)
    # Few enough of them to be linearly independent.
    keep = np.array([[True, False, True, False], [False, False, False, True]])
    found, (kernel, bias) = solve_values(
        attn, folds_of(outputs, target), keep, low_rank=low_rank, scale=0.5
    )
    changed = values_of(found, x)
    np.testing.assert_array_equal(changed[:, ~keep], 0)
    np.testing.assert_array_equal(found["proj"]["kernel"][~keep], 0)
    if not low_rank:
        np.testing.assert_allclose(changed[:, keep], values_of(attn, x)[:, keep], 1e-4)
    weights, constant = least_squares(changed[:, keep], target)
    expected = changed[:, keep] @ weights + constant
    made = changed.reshape(ROWS, -1) @ found["proj"]["kernel"].reshape(-1, EMBED)
    made = 0.5 * (made + found["proj"]["bias"])
    np.testing.assert_allclose(made, expected, atol=1e-4)
    np.testing.assert_allclose(outputs @ kernel + bias, expected, atol=1e-4)


def test_low_rank_values_lose_the_least_that_a_head_can(no_penalty, rng):
    attn, x = attention_of(rng, heads=1), rng.standard_normal((ROWS, EMBED))
    outputs = values_of(attn, x)[:, 0]
    target = outputs @ attn["proj"]["kernel"][0]
    folds, keep = folds_of(outputs, target), np.array([[False, True, True, False]])
    error = {}
    for low_rank in (False, True):
        _, (kernel, bias) = solve_values(attn, folds, keep, low_rank=low_rank)
        error[low_rank] = np.linalg.norm(outputs @ kernel + bias - target)
    tail = np.linalg.svd(target - target.mean(axis=0), compute_uv=False)[2:]
    np.testing.assert_allclose(error[True], np.linalg.norm(tail), 1e-4)
    assert error[False] > 1.05 * error[True]


def test_heads_wider_than_the_stream_need_no_more_dims_and_use_them(no_penalty, rng):
    dims = 2 * EMBED
    attn, outputs = attention_of(rng, 1, dims), rng.standard_normal((ROWS, dims))

    def error(target, kept):
        keep = np.arange(dims)[None] < kept
        found, (kernel, bias) = solve_values(attn, folds_of(outputs, target), keep)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        return np.linalg.norm(outputs @ kernel + bias - target)

    for kept in (EMBED, EMBED + 2):
        assert error(outputs @ attn["proj"]["kernel"][0], kept) < 1e-4
    # What the stream lacks besides may follow from the others.
    target = rng.standard_normal((ROWS, EMBED))
    assert error(target, EMBED + 2) < 0.99 * error(target, EMBED)


def logit_error(found, queries, keys):
    """Over all pairs of a query and a key, for heads whose queries and keys are their inputs."""
    made = [rows @ found[name]["kernel"][:, 0] for name, rows in (("q", queries), ("k", keys))]
    return np.linalg.norm(made[0] @ made[1].T - queries @ keys.T)


def test_low_rank_logits_lose_the_tail_of_the_singular_values(rng):
    queries, keys = rng.standard_normal((2, ROWS, DIMS)) @ rng.standard_normal((2, DIMS, DIMS))
    attn = {name: {"kernel": np.eye(DIMS)[:, None]} for name in ("q", "k")}
    grams = (queries.T @ queries)[None], (keys.T @ keys)[None]
    keep = np.array([[True, False, False, True]])
    found = solve_queries_keys(attn, *grams, keep)
    tail = np.linalg.svd(queries @ keys.T, compute_uv=False)[2:]
    np.testing.assert_allclose(logit_error(found, queries, keys), np.linalg.norm(tail), 1e-3)
    for name in ("q", "k"):
        np.testing.assert_array_equal(found[name]["kernel"][:, ~keep], 0)
    # Both are as long as each other, dim by dim.
    lengths = [np.linalg.norm(found[name]["kernel"][:, 0, keep[0]], axis=0) for name in ("q", "k")]
    np.testing.assert_allclose(*lengths, 1e-4)

    kept = solve_queries_keys(attn, *grams, keep, low_rank=False)
    direct = np.linalg.lstsq(keys[:, keep[0]], keys, rcond=None)[0]
    expected = np.linalg.norm(queries @ (keys[:, keep[0]] @ direct - keys).T)
    np.testing.assert_allclose(logit_error(kept, queries, keys), expected, 1e-3)
    np.testing.assert_array_equal(kept["k"]["kernel"][:, 0], np.diag(keep[0]))
    assert expected > 1.05 * np.linalg.norm(tail)


def test_subspaces_of_the_weights_alone(tiny):
    """NuWa's: the best products of queries' and keys' and of values' and outgoing weights."""
    keep = {f"blocks_0/{kind}": np.tile([True] * 4 + [False] * 4, (2, 1)) for kind in ("qk", "vo")}
    config = RecoverConfig(order="parallel", attention="weights", head=False)
    found = recovered(tiny, Plan(tiny.config, keep), [images_of(COUNT)], config=config)
    dense, small = (np_params["blocks_0"]["attn"] for np_params in (tiny.params, found.params))

    def kernel(attn, name, head):
        return np.float64(attn[name]["kernel"])[:, head]

    for head in range(2):
        products = [kernel(a, "q", head) @ kernel(a, "k", head).T for a in (dense, small)]
        tail = np.linalg.svd(products[0], compute_uv=False)[4:]
        error = np.linalg.norm(products[0] - products[1])
        np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-3)
        # Values span what the leading singular vectors of their product do.
        values, out = kernel(dense, "v", head), np.float64(dense["proj"]["kernel"])[head]
        leading = np.linalg.svd(values @ out)[0][:, :4]
        made = kernel(small, "v", head)[:, :4]
        span = np.linalg.qr(made)[0]
        np.testing.assert_allclose(np.linalg.norm(span.T @ leading), 2.0, rtol=1e-3)


@pytest.mark.parametrize("low_rank", [False, True])
def test_heads_kept_whole_or_not_at_all_need_no_solving(rng, low_rank):
    attn = {
        name: {"kernel": rng.standard_normal((EMBED, 3, DIMS)), "bias": np.ones((3, DIMS))}
        for name in ("q", "k")
    }
    keep = np.array([[True] * DIMS, [False] * DIMS, [True, True, False, False]])
    # Queries and keys that are always zero.
    dead = np.zeros((3, DIMS, DIMS))
    found = solve_queries_keys(attn, dead, dead, keep, low_rank)
    for name, leaves in found.items():
        for leaf, array in leaves.items():
            assert np.isfinite(array).all()
            np.testing.assert_array_equal(array[..., 0, :], np.float32(attn[name][leaf][..., 0, :]))
            np.testing.assert_array_equal(array[..., 1, :], 0)


# Whole models.

VARIANTS = {
    "cls": {},
    "mean": {"pool": "mean", "qkv_bias": False},
    "distilled": {"distilled": True, "layer_scale": True},
    "swin": None,
}
METRIC_PRIOR = RecoverConfig("mean", prior="metric")
CONFIGS = {
    "ridge": RecoverConfig(),
    "kept": RecoverConfig(attention="kept", order="parallel"),
    "mean": RecoverConfig("mean"),
}


def make(variant, config):
    if variant == "swin":
        config = tiny_swin()
    else:
        config = dataclasses.replace(config, **VARIANTS[variant])
    shapes = backbone.param_shapes(config)
    return Model(config, realistic(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), 2))


def uneven_plan(config):
    """Ragged heads, then a pruned head and even ones, then a branch that is gone."""
    rng = np.random.default_rng(1)
    keep = {}
    for group in unit_table(config):
        if group.kind == "mlp":
            keep[group.key] = (
                rng.permutation(group.size) < (0.4, 0.7, 0.2)[group.block] * group.size
            )
        elif group.kind in ("qk", "vo"):
            # In the first block some heads are whole and some have no dims.
            most = (np.arange(group.shape[0]) % 2 if group.block == 0 else 0.6) * group.shape[1]
            ranks = rng.permuted(np.tile(np.arange(group.shape[1]), (group.shape[0], 1)), axis=1)
            keep[group.key] = ranks < np.reshape(most + (group.kind == "qk"), (-1, 1))
        elif group.kind == "head" and group.block == 1:
            keep[group.key] = np.arange(group.size) > 0
        elif group.kind == "attn_branch":
            keep[group.key] = np.array(group.block < 2)
    keep["blocks_1/mlp_branch"] = np.array(False)
    return Plan(config, keep)


@pytest.fixture(scope="module")
def tiny(tiny_config):
    return make("cls", tiny_config)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tiny_config):
    model = make(request.param, tiny_config)
    return model, uneven_plan(model.config), images_of(COUNT)


def assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recovered_model_is_a_masked_one_and_reshapes(case, name):
    model, plan, images = case
    found = recovered(model, plan, [images], config=CONFIGS[name])
    masks = param_masks(model.config, unit_masks(plan))
    pruned = jax.tree.map(
        lambda leaf, mask: np.asarray(leaf) * np.asarray(mask), found.params, masks
    )
    assert_same(pruned, found.params)
    small, logits = reshape(found, plan), np.asarray(found.apply(images))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(small.apply(images), logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_dead_and_repeated_units_and_a_single_image_leave_finite_numbers(case, order):
    model, plan, images = case
    leaves = flatten(jax.tree.map(np.array, model.params))
    for path, leaf in leaves.items():
        if path[1:] in (("mlp", "fc1", "kernel"), ("attn", "v", "kernel"), ("attn", "q", "kernel")):
            # Units are last: a dead one, and two that are one.
            leaf[..., 0], leaf[..., 2] = 0.0, leaf[..., 1]
    dead = model.replace(params=unflatten(leaves))
    found = recovered(dead, plan, [images[:1]], config=RecoverConfig(order=order))
    assert all(np.isfinite(leaf).all() for leaf in flatten(found.params).values())
    assert np.isfinite(found.apply(images)).all()


@pytest.mark.parametrize("variant", ["cls", "swin"])
def test_logits_count_by_who_attends_to_what(tiny_config, variant):
    """Sums over every query, against its own keys' mean under its own attention."""
    model = make(variant, tiny_config)
    i, real = 1, np.float32(np.arange(COUNT) != 5)
    spec, part = model.config.block_spec(i), model.params[f"blocks_{i}"]
    rng = np.random.default_rng(8)
    x = rng.standard_normal((COUNT, spec.tokens, spec.embed_dim)).astype(np.float32)
    # Windows are not told apart by their tokens: all of them count the same.
    weights = np.float32(rng.random(spec.tokens) < 0.5) if variant == "cls" else np.ones(64)
    found = streams._logit_sums(spec, 1, part, x, real, np.float32(weights))
    taps = jax.jit(lambda x: backbone.apply_block_with_taps(spec, part, x)[1])(x)
    taps = {name: np.float64(tap[real > 0]) for name, tap in taps.items()}
    attention = taps["attention"].reshape(-1, *taps["attention"].shape[-3:])
    q, k = (taps[name].reshape(-1, *taps[name].shape[-3:]) for name in ("q", "k"))
    rows = weights[: q.shape[1]]
    for h in range(q.shape[2]):
        expected = np.einsum("bnk,bnl,n->kl", q[:, :, h], q[:, :, h], rows)
        np.testing.assert_allclose(found[0][0, h], expected, atol=1e-4 * np.abs(expected).max())
        mean = np.einsum("bnm,bmk->bnk", attention[:, h], k[:, :, h])
        around = k[:, None, :, h] - mean[:, :, None]
        expected = np.einsum("bnm,bnmk,bnml,n->kl", attention[:, h], around, around, rows)
        np.testing.assert_allclose(found[1][0, h], expected, atol=1e-4 * np.abs(expected).max())


def dense_error(model, found, images):
    """Root mean square, on the scale of the dense logits."""
    dense = np.asarray(model.apply(images))
    return np.linalg.norm(found.apply(images) - dense) / np.linalg.norm(dense - dense.mean(axis=0))


def halved(config):
    """The first half of every kind of dims and units."""
    keep = {}
    for group in unit_table(config):
        if group.kind in ("mlp", "qk", "vo"):
            half = np.arange(group.shape[-1]) < group.shape[-1] // 2
            keep[group.key] = np.broadcast_to(half, group.shape)
    return Plan(config, keep)


def test_better_recovery_is_nearer_to_the_dense_model(tiny):
    plan = uneven_plan(tiny.config)
    # Images that vary along three directions.
    rng = np.random.default_rng(4)
    images = np.tensordot(rng.standard_normal((COUNT, 3)), images_of(3), 1).astype(np.float32)
    error = {
        name: dense_error(tiny, recovered(tiny, plan, [images], name), images)
        for name in ("none", "mean", "ridge")
    }
    assert error["ridge"] < 0.7 * error["mean"] < 0.6 * error["none"], error


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("branch", ["attn_branch", "mlp_branch"])
def test_what_follows_makes_up_for_a_branch_that_is_gone(tiny, branch, order):
    images = images_of(COUNT)
    plan = Plan(tiny.config, {f"blocks_1/{branch}": np.array(False)})
    config = RecoverConfig(order=order, head=False)
    dense, masked = (np.asarray(m.apply(images)) for m in (tiny, apply_masks(tiny, plan)))
    found = np.asarray(recovered(tiny, plan, [images], config=config).apply(images))
    assert np.linalg.norm(found - dense) < 0.7 * np.linalg.norm(masked - dense)


GONE_AT_THE_END = {
    "the last MLP": ("blocks_2/mlp_branch",),
    "the last block": ("blocks_2/attn_branch", "blocks_2/mlp_branch"),
}


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("cls", RecoverConfig("mean")),
        ("cls", RecoverConfig("mean", order="parallel")),
        ("distilled", RecoverConfig()),
    ],
    ids=["mean", "parallel", "distilled"],
)
@pytest.mark.parametrize("gone", GONE_AT_THE_END)
def test_what_goes_at_the_end_leaves_its_mean(tiny_config, variant, config, gone):
    model, images = make(variant, tiny_config), images_of(COUNT)
    plan = Plan(model.config, dict.fromkeys(GONE_AT_THE_END[gone], np.array(False)))
    dense, masked = (np.asarray(m.apply(images)) for m in (model, apply_masks(model, plan)))
    found = recovered(model, plan, [images], config=config)
    error = np.linalg.norm(found.apply(images) - dense)
    assert error < 0.5 * np.linalg.norm(masked - dense)
    np.testing.assert_allclose(found.apply(images), reshape(found, plan).apply(images), atol=1e-4)


def test_a_mean_is_not_folded_through_merged_patches():
    model, images = make("swin", None), images_of(COUNT)
    gone = {
        group.key: np.array(False)
        for group in unit_table(model.config)
        if group.kind in ("attn_branch", "mlp_branch") and group.block == 2
    }
    assert model.config.block_spec(2).merge
    plan = Plan(model.config, gone)
    found = recovered(model, plan, [images], "mean")
    assert_same(found.params, apply_masks(model, plan).params)


def test_parallel_recovery_leaves_the_head(tiny):
    plan, images = halved(tiny.config), images_of(COUNT)
    found = recovered(tiny, plan, [images], config=RecoverConfig(order="parallel"))
    assert_same(found.params["head"], tiny.params["head"])
    # A block sees the dense stream whatever is done to the blocks in front of it.
    only_last = Plan(plan.config, {key: m for key, m in plan.keep.items() if "blocks_2" in key})
    alone = recovered(tiny, only_last, [images], config=RecoverConfig(order="parallel"))
    for path, leaf in flatten(alone.params["blocks_2"]).items():
        np.testing.assert_allclose(flatten(found.params["blocks_2"])[path], leaf, atol=1e-5)
    assert_same(
        {n: alone.params[n] for n in ("blocks_0", "blocks_1")},
        {n: tiny.params[n] for n in ("blocks_0", "blocks_1")},
    )


@pytest.mark.parametrize("attention", ["low_rank", "kept"])
def test_units_that_others_determine_go_without_loss(tiny, attention):
    rng = np.random.default_rng(5)
    params = jax.tree.map(np.array, tiny.params)
    mix = rng.standard_normal((3, 2, 4, 4)) / 2
    for i in range(3):
        fc1 = params[f"blocks_{i}"]["mlp"]["fc1"]
        for leaf in fc1.values():
            leaf[..., 16:] = leaf[..., :16]
        attn = params[f"blocks_{i}"]["attn"]
        for turn, name in enumerate(("q", "k", "v")):
            for leaf in attn[name].values():
                leaf[..., 4:] = np.einsum("...hk,hkl->...hl", leaf[..., :4], mix[turn])
    model = tiny.replace(params=params)
    plan, images = halved(model.config), images_of(COUNT)
    found = recovered(model, plan, [images], config=RecoverConfig(attention=attention))
    assert dense_error(model, found, images) < 1e-3
    # Not because the units were of no use.
    assert dense_error(model, apply_masks(model, plan), images) > 0.3


def test_a_head_like_another_goes_without_loss(tiny):
    params = jax.tree.map(np.array, tiny.params)
    for i in range(3):
        for name in ("q", "k", "v"):
            for leaf in params[f"blocks_{i}"]["attn"][name].values():
                leaf[..., 1, :] = leaf[..., 0, :]
    model, images = tiny.replace(params=params), images_of(COUNT)
    plan = Plan(model.config, {f"blocks_{i}/head": np.array([True, False]) for i in range(3)})
    assert dense_error(model, recovered(model, plan, [images]), images) < 1e-3
    assert dense_error(model, apply_masks(model, plan), images) > 0.3


def test_nothing_pruned_is_nothing_changed(case):
    model, _, images = case
    found = recovered(model, Plan(model.config, {}), [images])
    assert_same(found.params, model.params)
    assert found.config == model.config


def test_no_recovery_is_masking(case):
    model, plan, images = case
    assert_same(recovered(model, plan, [images], "none").params, apply_masks(model, plan).params)


def test_blocks_in_front_of_the_first_pruned_one_stay(tiny):
    plan = Plan(tiny.config, {"blocks_1/mlp": np.arange(32) < 9})
    shares = []
    found = recovered(tiny, plan, [images_of(COUNT)], on_share=shares.append)
    for name in ("patch_embed", "blocks_0", "norm"):
        assert_same(found.params[name], tiny.params[name])
    np.testing.assert_allclose(shares, np.full(3, 1 / 3))
    assert found.history["recovered"]["method"] == "ridge"


def test_models_without_heads_can_be_recovered(tiny_config):
    model = make("cls", dataclasses.replace(tiny_config, blocks=(BlockConfig(0, 8, 8, 32),)))
    plan, images = Plan(model.config, {"blocks_0/mlp": np.arange(32) < 12}), images_of(COUNT)
    found = recovered(model, plan, [images], "mean")
    assert dense_error(model, found, images) < dense_error(model, apply_masks(model, plan), images)


def test_layer_scales_of_zero_add_nothing_to_the_recovered_stream(tiny_config, monkeypatch):
    model, images = make("distilled", tiny_config), images_of(COUNT)
    block = model.params["blocks_1"]
    gamma = np.where(np.arange(16) == 3, 0.0, block["ls1"]["gamma"]).astype(np.float32)
    model = model.replace(params=model.params | {"blocks_1": block | {"ls1": {"gamma": gamma}}})
    passed, pass_mlp = [], Streams.pass_mlp

    def watched(self, *given):
        pass_mlp(self, *given)
        passed.append(self._found[0])

    monkeypatch.setattr(Streams, "pass_mlp", watched)
    # What the branch that is gone has added is missing in all channels.
    keep = halved(model.config).keep | {"blocks_0/mlp_branch": np.array(False)}
    found = recovered(model, Plan(model.config, keep), [images])
    run = jax.jit(backbone.apply_blocks, static_argnums=0)
    expected = run(model.config, found.params, images)
    np.testing.assert_allclose(passed[-1], expected, atol=1e-3)


def test_blocks_without_branches_can_be_recovered(tiny_config):
    blocks = (
        BlockConfig(0, 0, 0, 32, attn=False),
        BlockConfig(0, 0, 0, 0, attn=False, mlp=False),
    )
    model = make("cls", dataclasses.replace(tiny_config, blocks=blocks))
    plan, images = Plan(model.config, {"blocks_0/mlp": np.arange(32) < 12}), images_of(COUNT)
    found = recovered(model, plan, [images])
    assert_same(apply_masks(found, plan).params, found.params)
    logits = np.asarray(found.apply(images))
    np.testing.assert_allclose(reshape(found, plan).apply(images), logits, atol=1e-4)


def test_devices_batches_and_processes_change_nothing(tiny, monkeypatch):
    plan, images = halved(tiny.config), images_of(COUNT)
    alone = np.asarray(recovered(tiny, plan, [images]).apply(images))
    parts = [images[:11], images[:0], images[11:]]
    padded = {"image": images[[*range(COUNT), 0, 1]], "mask": np.arange(COUNT + 2) < COUNT}
    found = {
        "devices": recover(tiny, plan, [images]),
        "batches": recovered(tiny, plan, parts),
        "padding": recovered(tiny, plan, [padded]),
    }
    # Two processes with the same images have what one has, twice.
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda sent: np.stack([sent, sent]))
    found["processes"] = recovered(tiny, plan, [images])
    for name, other in found.items():
        np.testing.assert_allclose(
            other.apply(images), alone, atol=1e-4 * np.abs(alone).max(), err_msg=name
        )


@pytest.mark.parametrize("kept", [0, 1, 7, None])
def test_moments_of_kept_units_are_those_of_all_units(tiny, kept):
    streams = Streams(tiny, [images_of(8), images_of(8)], None)
    dense = streams.begin(0, parallel=True)
    streams.see_dense_middle()
    kernel = dense["mlp"]["fc2"]["kernel"]
    keep = np.random.default_rng(0).permutation(len(kernel)) < (
        len(kernel) if kept is None else kept
    )
    expected = kept_moments(streams.hidden_moments(dense), keep, kernel)
    found = streams.kept_hidden_moments(dense, keep, kernel)
    for folds, others in zip(found, expected, strict=True):
        for fold, other in zip(folds, others, strict=True):
            for name, value in fold._asdict().items():
                np.testing.assert_allclose(value, getattr(other, name), atol=1e-4, err_msg=name)


def test_the_prior_of_the_metric_set_only_moves_the_biases(case):
    model, plan, images = case
    logits = np.asarray(model.apply(images), np.float64)
    shares = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).mean(axis=0)
    shift = np.log(prior_weights(shares, COUNT))
    assert np.ptp(shift) > 0.1
    mean = recovered(model, plan, [images], "mean").apply(images)
    everything = Plan(model.config, {})
    for kept, batches, expected in (
        (everything, [images], logits),
        (plan, [images], mean),
        # What is padded says nothing about classes.
        (everything, [images[:9], images[9:]], logits),
    ):
        found = recovered(model, kept, batches, config=METRIC_PRIOR)
        np.testing.assert_allclose(found.apply(images), expected + shift, atol=1e-4)
        assert found.prior and found.history["recovered"]["prior"] == "metric"
        # It counts once, whatever the history says, and "none" is none.
        bare = found.replace(history={})
        again = recovered(bare, everything, batches, config=METRIC_PRIOR)
        assert_same(again.params, found.params)
        twice = recovered(bare, plan, batches, config=METRIC_PRIOR)
        assert twice.prior and twice.history["recovered"]["prior"] == "dense"
    given = recovered(model, plan, [images], config=METRIC_PRIOR, prior=np.exp(shift))
    np.testing.assert_allclose(given.apply(images), mean + shift, atol=1e-4)
    none = dataclasses.replace(METRIC_PRIOR, method="none")
    assert_same(
        recovered(model, plan, [images], config=none).params, apply_masks(model, plan).params
    )


def test_the_prior_of_a_mixture_only_moves_the_biases(case):
    model, plan, images = case
    weights = np.random.default_rng(0).uniform(0.2, 3.0, model.config.num_classes)
    options = dataclasses.replace(METRIC_PRIOR, prior="mixture")
    mean = recovered(model, plan, [images], "mean").apply(images)
    everything = Plan(model.config, {})
    for kept, expected in ((everything, model.apply(images)), (plan, mean)):
        found = recovered(model, kept, [images], config=options, prior=weights)
        np.testing.assert_allclose(found.apply(images), expected + np.log(weights), atol=1e-4)
        assert found.history["recovered"]["prior"] == "mixture"
        # A device's prior counts once, whichever it is.
        for again, given in ((options, weights), (options, None), (METRIC_PRIOR, None)):
            twice = recovered(found, everything, [images], config=again, prior=given)
            assert_same(twice.params, found.params)
            assert twice.prior


def test_the_prior_alone_leaves_what_is_pruned_as_it_is(case):
    model, plan, images = case
    weights = np.linspace(0.5, 2.0, model.config.num_classes)
    masked = apply_masks(model, plan)
    options = RecoverConfig("prior", prior="mixture")
    found = recovered(model, plan, [images], config=options, prior=weights)
    assert found.prior and not masked.prior
    np.testing.assert_allclose(
        found.apply(images), masked.apply(images) + np.log(weights), rtol=1e-6, atol=1e-6
    )
    assert_same(move_prior(masked, weights).params, found.params)
    with pytest.raises(InputError, match="counts once"):
        move_prior(found, weights)
    with pytest.raises(InputError, match="method 'prior' does nothing with prior 'dense'"):
        RecoverConfig("prior")


@pytest.mark.parametrize(
    ("config", "prior", "message"),
    [
        (RecoverConfig(prior="mixture"), None, "prior is missing"),
        (RecoverConfig(), np.ones(5), "prior: nothing uses it"),
        (RecoverConfig("none", prior="mixture"), np.ones(5), "prior: nothing uses it"),
        (RecoverConfig(prior="mixture"), np.ones(4), r"prior has shape \(4,\), expected \(5,\)"),
        (RecoverConfig(prior="mixture"), np.arange(5), "prior holds no weights"),
        (RecoverConfig(prior="mixture"), np.array([1, 1, np.nan, 1, 1]), "prior holds no weights"),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused(tiny, config, prior, message):
    assert tiny.config.num_classes == 5
    with pytest.raises(InputError, match=message):
        recovered(tiny, uneven_plan(tiny.config), [images_of(2)], config=config, prior=prior)


def test_a_process_without_images_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda array: np.stack([array, ~array]))
    with pytest.raises(InputError, match="images in every process"):
        recovered(tiny, uneven_plan(tiny.config), [images_of(COUNT)])


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 8, 8, 3), np.float32)]])
def test_no_images_are_refused(tiny, batches):
    with pytest.raises(InputError, match="at least one batch of images"):
        recovered(tiny, uneven_plan(tiny.config), batches)


@pytest.mark.parametrize("kind", ["qk", "vo", "mlp"])
def test_images_that_are_not_finite_are_refused(tiny, kind):
    images = images_of(COUNT)
    images[3, 0, 0, 0] = np.nan
    key = f"blocks_0/{kind}"
    plan = Plan(tiny.config, {key: halved(tiny.config).keep[key]})
    with pytest.raises(InputError, match="not finite"):
        recovered(tiny, plan, [images])


def test_a_plan_for_another_model_is_refused(tiny):
    with pytest.raises(InputError, match="another config"):
        recovered(tiny, Plan(tiny_swin(), {}), [images_of(2)])


@pytest.mark.parametrize("field", ["method", "order", "attention", "prior"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(InputError, match=field):
        RecoverConfig(**{field: "best"})


def test_an_unknown_method_is_refused(tiny):
    with pytest.raises(InputError, match="method"):
        recovered(tiny, uneven_plan(tiny.config), [images_of(2)], "best")
