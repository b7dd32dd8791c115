"""Elimination against least squares solved anew, and the scores of a whole model."""

import dataclasses

import jax
import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.importance import residual
from tapvit_jax.importance.criteria import unit_importance
from tapvit_jax.importance.residual import eliminate, residual_importance
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import unit_key, unit_table
from tapvit_jax.sharding import data_mesh
from tests.conftest import realistic

ONE = data_mesh(jax.local_devices()[:1])


def correlated(rows=400, features=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, features)) @ rng.standard_normal((features, features))


def error_without(x, y, gone):
    """Mean squared error of the best linear map from the features that are left."""
    left = np.delete(x, gone, axis=1)
    return np.square(y - left @ np.linalg.lstsq(left, y, rcond=None)[0]).sum() / len(x)


@pytest.fixture
def no_ridge(monkeypatch):
    monkeypatch.setattr(residual, "_RIDGE", 1e-9)


def test_every_step_is_the_least_error_there_is(no_ridge):
    x, rng = correlated(), np.random.default_rng(1)
    weights = rng.standard_normal((7, 3))
    y = x @ weights
    scores = eliminate(x.T @ x / len(x), weights)
    gone, before = [], 0.0
    for u in np.argsort(scores)[:6]:
        left = [v for v in range(7) if v not in gone]
        errors = {v: error_without(x, y, [*gone, v]) for v in left}
        assert min(errors, key=errors.get) == u
        # Errors add up: what is left has been solved for in between.
        assert scores[u] == pytest.approx(errors[u] - before, rel=1e-3)
        gone, before = [*gone, u], errors[u]


def test_what_others_reproduce_costs_nothing(no_ridge):
    x = correlated(features=5)
    x = np.concatenate([x, x[:, :1] + x[:, 1:2], np.zeros((len(x), 1))], axis=1)
    weights = np.random.default_rng(2).standard_normal((7, 4))
    scores = eliminate(x.T @ x / len(x), weights)
    assert scores[6] < 1e-6 * scores.max()
    # One of three dependent features is free, whichever it is; its going binds the other two.
    assert np.sum(scores < 1e-6 * scores.max()) == 2


@pytest.mark.parametrize("rounds", [1, 6, 64])
def test_rounds_rank_nearly_alike(rounds):
    x = correlated(features=12, seed=3)
    weights = np.random.default_rng(4).standard_normal((12, 5))
    gram = x.T @ x / len(x)
    exact, found = eliminate(gram, weights), eliminate(gram, weights, rounds)
    assert np.all(np.diff(np.sort(found)) >= 0) and np.all(found >= 0)
    ranks = [np.argsort(np.argsort(scores)) for scores in (exact, found)]
    least = {1: 0.2, 6: 0.6, 64: 1.0}[rounds]
    assert np.corrcoef(ranks)[0, 1] >= least - 1e-9


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_scores_nothing(count):
    np.testing.assert_array_equal(eliminate(np.zeros((count,) * 2), np.ones((count, 2))), 0.0)


@pytest.mark.parametrize("backbone", ["tiny_model", "swin_model"])
def test_scores_of_a_model(request, images, backbone):
    model = request.getfixturevalue(backbone)
    mlp = model.params["blocks_0"]["mlp"]
    first = {name: np.array(leaf) for name, leaf in mlp["fc1"].items()}
    for leaf in first.values():
        leaf[..., 5] = leaf[..., 3]
    block = model.params["blocks_0"] | {"mlp": mlp | {"fc1": first}}
    model = model.replace(params=model.params | {"blocks_0": block})
    found = unit_importance(model, [images], "residual", mesh=ONE)
    for group in unit_table(model.config):
        if group.kind in ("mlp", "qk", "vo", "head"):
            assert found[group.key].shape == group.shape
            assert np.isfinite(found[group.key]).all() and (found[group.key] >= 0).all()
            assert group.kind == "head" or found[group.key].max() > 0
    scores = found["blocks_0/mlp"]
    # Of two units that always agree one is free.
    assert min(scores[3], scores[5]) < 1e-2 * max(scores[3], scores[5])


def test_negative_rounds_are_refused(tiny_model):
    with pytest.raises(InputError, match="rounds is -1, expected 0 or more"):
        residual_importance(tiny_model, [], rounds=-1)


@pytest.mark.parametrize("kind", ["mlp", "qk", "vo"])
def test_more_of_the_same_images_change_nothing(tiny_model, images, kind):
    once, twice = (residual_importance(tiny_model, b, mesh=ONE) for b in ([images], [images] * 2))
    for i in range(len(tiny_model.config.blocks)):
        key = unit_key(i, kind)
        np.testing.assert_allclose(twice[key], once[key], rtol=1e-3)


@pytest.mark.parametrize("block", [BlockConfig(2, 0, 3, 0), BlockConfig(0, 4, 4, 8)])
def test_blocks_without_heads_or_dims_are_scored(tiny_config, images, block):
    config = dataclasses.replace(tiny_config, blocks=(block,))
    model = Model(config, realistic(backbone.init(config, jax.random.key(0))))
    found = residual_importance(model, [images], mesh=ONE)
    for group in unit_table(config):
        if group.kind in ("mlp", "qk", "vo"):
            assert found[group.key].shape == group.shape
            assert not group.size or found[group.key].max() > 0
