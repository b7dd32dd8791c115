"""Layer scores against the slow way: mask one branch, run the whole model again, compare."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.bench_scoring import block_evaluations
from tapvit_jax.errors import InputError
from tapvit_jax.importance import layers
from tapvit_jax.importance.layers import LayerConfig, layer_importance, probe_count, probe_mask
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan, apply_masks, top_k_mask
from tapvit_jax.prune.recover import RecoverConfig, recover, solve_queries_keys
from tapvit_jax.prune.streams import Streams
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh
from tests.conftest import realistic

KINDS = {"mlp": ("mlp",), "attn": ("qk", "vo")}


def random_scores(config, seed=0):
    rng = np.random.default_rng(seed)
    return {group.key: rng.random(group.shape) for group in unit_table(config)}


def kept(scores, sparsity, ragged):
    """The highest scores: of all heads together, or of every head alike."""
    if scores.ndim == 2 and not ragged:
        return np.stack([kept(row, sparsity, ragged) for row in scores])
    count = int(scores.size * (1 - sparsity) + 1e-9)
    ranks = np.argsort(np.argsort(-scores, axis=None)).reshape(scores.shape)
    return ranks < count


def log_probabilities(model, images):
    logits = np.float64(model.apply(images))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def slow_divergences(model, images, units, config):
    """The divergence of every image for (branch, sparsity, block)."""
    original = log_probabilities(model, images)
    found = {branch: np.zeros((len(config.sparsity), 0, len(images))) for branch in KINDS}
    for branch, kinds in KINDS.items():
        columns = []
        for i, block in enumerate(model.config.blocks):
            column = np.zeros((len(config.sparsity), len(images)))
            for row, sparsity in enumerate(config.sparsity if getattr(block, branch) else ()):
                keys = [f"blocks_{i}/{kind}" for kind in kinds]
                keep = {key: kept(units[key], sparsity, config.ragged) for key in keys}
                keep[f"blocks_{i}/{branch}_branch"] = np.array(sparsity < 1)
                pruned = log_probabilities(apply_masks(model, Plan(model.config, keep)), images)
                a, b = (original, pruned) if config.direction == "forward" else (pruned, original)
                column[row] = (np.exp(a) * (a - b)).sum(axis=1)
            columns.append(column)
        found[branch] = np.stack(columns, axis=1)
    return found


@pytest.fixture(scope="module")
def units(tiny_config):
    return random_scores(tiny_config)


@pytest.mark.parametrize(
    "config",
    [
        LayerConfig((0.3, 1.0)),
        LayerConfig((0.3, 0.75), direction="reverse", ragged=True),
    ],
    ids=["forward", "reverse"],
)
@pytest.mark.parametrize("backbone", ["tiny_model", "swin_model"])
def test_scores_equal_the_slow_way(request, images, config, backbone):
    model = request.getfixturevalue(backbone)
    units = random_scores(model.config)
    found = layer_importance(model, [images], units, config=config)
    expected = slow_divergences(model, images, units, config)
    for branch in KINDS:
        scores = getattr(found, branch)
        assert scores.min() > 1e-4
        np.testing.assert_allclose(scores, expected[branch].mean(axis=-1), atol=1e-5)
        np.testing.assert_allclose(found.mean(branch), scores.mean(axis=0))


@pytest.mark.parametrize("recovery", ["none", "ridge"])
@pytest.mark.parametrize("backbone", ["tiny_model", "swin_model"])
def test_whole_heads_are_probed(request, images, backbone, recovery):
    model = request.getfixturevalue(backbone)
    units, one = random_scores(model.config), data_mesh(jax.local_devices()[:1])
    config = LayerConfig((0.45, 1.0), attention="heads", recovery=recovery)
    found = layer_importance(model, [images], units, config=config, mesh=one)
    dims = layer_importance(
        model, [images], units, config=dataclasses.replace(config, attention="dims"), mesh=one
    )
    np.testing.assert_allclose(found.mlp, dims.mlp, rtol=1e-3, atol=1e-5)
    assert found.qk is None and found.vo is None
    original = log_probabilities(model, images)
    alone = RecoverConfig(order="parallel", head=False)
    for i, block in enumerate(model.config.blocks):
        scores = units[f"blocks_{i}/head"]
        for row, count in enumerate((max(round(0.55 * block.num_heads), 1), 0)):
            mask = top_k_mask(scores, count)
            if recovery == "none" or count == 0:
                keep = {f"blocks_{i}/head": mask, f"blocks_{i}/attn_branch": np.array(count > 0)}
                small = apply_masks(model, Plan(model.config, keep))
            else:
                # As a head without values; without the head, its queries and keys would go as well.
                values = np.repeat(mask[:, None], block.v_dim, axis=1)
                plan = Plan(model.config, {f"blocks_{i}/vo": values})
                small = recover(model, plan, [images], config=alone, mesh=one)
            pruned = log_probabilities(small, images)
            expected = (np.exp(original) * (original - pruned)).sum(axis=1).mean()
            np.testing.assert_allclose(found.attn[row, i], expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "probed"),
    [
        ("tiny_model", ["blocks_0/vo", "blocks_1/mlp"]),
        # Behind patch merging.
        ("swin_model", ["blocks_2/vo"]),
    ],
)
def test_recovered_scores_equal_the_slow_way(request, images, backbone, probed):
    """Recover one group at a time on the dense model's own activations, and run it all again."""
    model = request.getfixturevalue(backbone)
    units = random_scores(model.config)
    one = data_mesh(jax.local_devices()[:1])
    config = LayerConfig((1.0, 0.75), recovery="ridge")
    batches = [images[:4], images[4:]]
    found = layer_importance(model, batches, units, config=config, mesh=one)
    original = log_probabilities(model, images)
    alone = RecoverConfig(order="parallel", head=False)
    for key in probed:
        name, _, kind = key.partition("/")
        plan = Plan(model.config, {key: kept(units[key], config.sparsity[1], False)})
        small = recover(model, plan, batches, config=alone, mesh=one)
        pruned = log_probabilities(small, images)
        expected = (np.exp(original) * (original - pruned)).sum(axis=1).mean()
        score = getattr(found, kind)[1, int(name.removeprefix("blocks_"))]
        assert expected > 1e-5
        np.testing.assert_allclose(score, expected, rtol=1e-2)
    np.testing.assert_allclose(found.attn, found.qk + found.vo)
    assert set(found.arrays()) == {"mlp", "attn", "qk", "vo"}


@pytest.mark.parametrize("recovery", ["none", "ridge"])
@pytest.mark.parametrize("branch", ["mlp", "attn"])
def test_a_branch_without_units_takes_its_bias_along(tiny_model, images, branch, recovery):
    last = {"mlp": "fc2", "attn": "proj"}[branch]
    block = tiny_model.params["blocks_0"]
    kernel = np.zeros_like(block[branch][last]["kernel"])
    bias = 3 * np.random.default_rng(0).standard_normal(kernel.shape[-1]).astype(np.float32)
    block = block | {branch: block[branch] | {last: {"kernel": kernel, "bias": bias}}}
    model = tiny_model.replace(params=tiny_model.params | {"blocks_0": block})
    config, one = LayerConfig((0.5, 1.0), recovery=recovery), data_mesh(jax.local_devices()[:1])
    found = layer_importance(model, [images], random_scores(model.config), config=config, mesh=one)
    plan = Plan(model.config, {f"blocks_0/{branch}_branch": np.array(False)})
    original, without = (log_probabilities(m, images) for m in (model, apply_masks(model, plan)))
    expected = (np.exp(original) * (original - without)).sum(axis=1).mean()
    assert expected > 0.01
    np.testing.assert_allclose(getattr(found, branch)[:, 0], [0, expected], atol=1e-5)


def test_recovered_queries_and_keys_alone(tiny_model, images):
    """A real recovery would also solve the projection behind them once more."""
    units = random_scores(tiny_model.config)
    config = LayerConfig((0.5, 0.75), recovery="ridge")
    found = layer_importance(tiny_model, [images], units, config=config)
    mask = kept(units["blocks_0/qk"], 0.75, False)
    part = tiny_model.params["blocks_0"]
    streams = Streams(tiny_model, [images], None)
    moments = streams.logit_moments(streams.begin(0, parallel=True))
    attn = part["attn"] | solve_queries_keys(part["attn"], *moments, mask)
    params = tiny_model.params | {"blocks_0": part | {"attn": attn}}
    original = log_probabilities(tiny_model, images)
    pruned = log_probabilities(tiny_model.replace(params=params), images)
    expected = (np.exp(original) * (original - pruned)).sum(axis=1).mean()
    assert expected > 1e-4
    np.testing.assert_allclose(found.qk[1, 0], expected, rtol=1e-3)


def test_recovered_divergences_of_the_first_batches(tiny_model, images):
    units = random_scores(tiny_model.config)
    config = LayerConfig((0.5,), recovery="ridge", max_batches=1)
    first = layer_importance(tiny_model, [images, images], units, config=config)
    both = dataclasses.replace(config, max_batches=2)
    for name, scores in first.arrays().items():
        # The same images twice: the same mean, and the same recovery.
        again = getattr(layer_importance(tiny_model, [images, images], units, config=both), name)
        np.testing.assert_allclose(scores, again, rtol=1e-4)
    other = layer_importance(tiny_model, [images, -images], units, config=config)
    assert np.abs(other.mlp - first.mlp).max() > 1e-6


def test_recovery_lowers_scores(tiny_model):
    """On many images, so that there is something to solve from."""
    rng = np.random.default_rng(4)
    many = rng.standard_normal((48, 8, 8, 3)).astype(np.float32)
    units = random_scores(tiny_model.config)
    batches = np.split(many, 8)
    found = {
        recovery: layer_importance(
            tiny_model,
            batches,
            units,
            config=LayerConfig((0.5, 0.75), recovery=recovery),
            mesh=data_mesh(jax.local_devices()[:1]),
        )
        for recovery in ("none", "ridge")
    }
    for branch in KINDS:
        assert found["ridge"].mean(branch).sum() < 0.7 * found["none"].mean(branch).sum()


def test_recovered_absent_branches_score_nothing(sparse_model, images):
    units = random_scores(sparse_model.config, 1)
    config = LayerConfig((0.5,), recovery="ridge")
    found = layer_importance(sparse_model, [images], units, config=config)
    assert np.flatnonzero(found.mlp).tolist() == [2]
    assert np.flatnonzero(found.attn).tolist() == [0]


def test_several_sparsities_equal_separate_calls(tiny_model, images, units):
    together = layer_importance(tiny_model, [images], units, (0.3, 0.75))
    for row, sparsity in enumerate((0.3, 0.75)):
        alone = layer_importance(tiny_model, [images], units, sparsity)
        assert alone.sparsity == (sparsity,)
        np.testing.assert_allclose(alone.mlp[0], together.mlp[row], rtol=1e-4)
        np.testing.assert_allclose(alone.attn[0], together.attn[row], rtol=1e-4)


@pytest.fixture(scope="module")
def sparse_model(tiny_config):
    """Blocks without MLP, without attention, and without either."""
    blocks = (
        BlockConfig(2, 4, 4, 0, mlp=False),
        BlockConfig(0, 0, 0, 0, attn=False, mlp=False),
        BlockConfig(0, 0, 0, 6, attn=False),
    )
    config = dataclasses.replace(tiny_config, blocks=blocks)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    return Model(config, realistic(ones, 5))


@pytest.mark.parametrize("quirk", [False, True])
def test_absent_branches_and_batches_of_two_sizes(sparse_model, images, quirk):
    config = LayerConfig((0.5,), batch_quirk=quirk)
    units = random_scores(sparse_model.config, 1)
    padded = {"image": images, "mask": np.float32([1, 0, 1, 1, 1, 0])}
    found = layer_importance(sparse_model, [images, images[:0], padded], units, config=config)
    slow = slow_divergences(sparse_model, images, units, config)
    real = padded["mask"] > 0
    for branch in KINDS:
        every = slow[branch]
        if quirk:
            expected = every.mean(axis=-1) / 6 + every[..., real].mean(axis=-1) / 4
        else:
            expected = (every.sum(axis=-1) + every[..., real].sum(axis=-1)) / 10
        np.testing.assert_allclose(getattr(found, branch), expected, atol=1e-5)
    assert np.flatnonzero(found.mlp).tolist() == [2]
    assert np.flatnonzero(found.attn).tolist() == [0]


def test_probes_share_the_dense_prefix(tiny_model, images, units, monkeypatch):
    evaluated = []

    def counted(name):
        original = getattr(layers, name)

        def run(*args):
            out = original(*args)
            evaluated.append((name, len(out) // len(images)))
            return out

        monkeypatch.setattr(layers, name, run)

    counted("run_block")
    counted("_gated_block")
    layer_importance(tiny_model, [images], units, (0.3, 0.75))
    depth, probes = len(tiny_model.config.blocks), 2
    assert [n for name, n in evaluated if name == "_gated_block"] == [2 * probes] * depth
    total = depth + 2 * probes * depth + probes * depth * (depth - 1)
    assert sum(n for _, n in evaluated) == total
    monkeypatch.undo()
    scored = functools.partial(layer_importance, tiny_model, [images], units, (0.3, 0.75))
    assert block_evaluations(scored, len(images)) == total


def test_no_batch_beyond_max_batches_is_read(tiny_model, images, units):
    def batches():
        yield images
        raise AssertionError("read too far")

    config = LayerConfig((0.3, 0.75), max_batches=1)
    found = layer_importance(tiny_model, batches(), units, config=config)
    np.testing.assert_array_equal(
        found.mlp, layer_importance(tiny_model, [images], units, (0.3, 0.75)).mlp
    )


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [(10, 0.3, 7), (10, 0.9, 1), (10, 0.99, 0), (7, 0.5, 3), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_probe_count(size, sparsity, count):
    assert probe_count(size, sparsity) == count


@pytest.mark.parametrize("shape", [(0,), (0, 0), (2, 0)])
def test_probes_of_groups_without_units(shape):
    assert probe_mask(np.zeros(shape), 0.5, ragged=False).shape == shape


@pytest.mark.parametrize("sparsity", [(), (0.0,), (1.1,), (0.5, -0.1), (0.3, 0.3)])
def test_useless_sparsities_are_refused(tiny_model, images, units, sparsity):
    with pytest.raises(InputError, match="expected different values above 0, at most 1"):
        layer_importance(tiny_model, [images], units, sparsity)
    with pytest.raises(InputError, match=r"sparsity\[0\] is nan"):
        layer_importance(tiny_model, [images], units, (np.nan,))


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 8, 8, 3), np.float32)]])
def test_no_images_are_refused(tiny_model, units, batches):
    with pytest.raises(InputError, match="at least one batch"):
        layer_importance(tiny_model, batches, units)


@pytest.mark.parametrize("recovery", ["none", "ridge"])
@pytest.mark.parametrize(
    ("key", "scores", "message"),
    [
        ("blocks_1/mlp", np.full(32, np.nan), "scores of blocks_1/mlp are not finite: .* NaN"),
        ("blocks_1/mlp", None, "no scores for blocks_1/mlp"),
        ("blocks_0/qk", np.ones(16), r"blocks_0/qk have shape \(16,\), expected \(2, 8\)"),
    ],
    ids=["nan", "missing", "shape"],
)
def test_scores_that_do_not_fit_are_refused(
    tiny_model, images, units, key, scores, message, recovery
):
    units = {name: found for name, found in units.items() if name != key}
    units |= {} if scores is None else {key: scores}
    with pytest.raises(InputError, match=message):
        layer_importance(tiny_model, [images], units, config=LayerConfig(recovery=recovery))


@pytest.mark.parametrize("changes", [{"ragged": True}, {"batch_quirk": True}])
def test_recovery_goes_with_no_quirks(changes):
    with pytest.raises(InputError, match="recovery in the loop"):
        LayerConfig(recovery="ridge", **changes)


@pytest.mark.parametrize(
    "changes", [{"direction": "both"}, {"max_batches": 0}, {"recovery_batches": 0}]
)
def test_bad_options_are_refused(changes):
    with pytest.raises(InputError, match="attention 'heads' goes not with ragged"):
        LayerConfig(attention="heads", ragged=True)
    with pytest.raises(InputError, match=f"{next(iter(changes))} is "):
        LayerConfig(**changes)


def test_probes_run_the_last_block_for_the_class_token_alone(tiny_model, images):
    probes = LayerConfig((0.5,))

    def flops(pool):
        config = dataclasses.replace(tiny_model.config, pool=pool)
        params = backbone.init(config, jax.random.key(0))
        units = {group.key: np.zeros(group.shape) for group in unit_table(config)}
        gates = layers._probe_gates(config, probes, units)
        run = functools.partial(layers._probe_batch, config, probes, 1)
        program = jax.jit(run).lower(params, gates, images, np.ones(len(images))).compile()
        return program.cost_analysis()["flops"]

    assert flops("cls") < 0.8 * flops("mean")
