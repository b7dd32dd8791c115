"""Every criterion against its formula, written down with one loop for every index."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance import deletion, statistics
from tapvit_jax.importance.criteria import (
    CRITERIA,
    CriterionConfig,
    criterion,
    unit_importance,
)
from tapvit_jax.importance.deletion import deletion_divergences
from tapvit_jax.importance.gradients import gate_gradients, summed_loss
from tapvit_jax.importance.neurons import (
    NeuronConfig,
    TermWeights,
    min_max,
    neuron_importance,
)
from tapvit_jax.importance.statistics import MOMENTS, fisher_statistic, gate_statistic, variance
from tapvit_jax.importance.streaming import sum_over_batches
from tapvit_jax.models import backbone
from tapvit_jax.models.backbone import apply, apply_with_taps
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import PruneConfig, score_units
from tapvit_jax.prune.mask import Plan, apply_masks
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh, replicate, shard_rows
from tests.conftest import realistic

BACKBONES = ["tiny_model", "swin_model"]
ONE = data_mesh(jax.local_devices()[:1])


def scores_of(*args, **options):
    """On one device: a program for several takes longer to compile than all else here."""
    return unit_importance(*args, mesh=ONE, **options)


@pytest.fixture(scope="module")
def labels(tiny_config):
    return np.arange(6, dtype=np.int32) % tiny_config.num_classes


@pytest.fixture(scope="module")
def batches(images, labels):
    """Two labelled batches."""
    more = np.random.default_rng(9).standard_normal(images.shape).astype(np.float32)
    return [(images, labels), (more, labels[::-1])]


def with_blocks(config, *blocks, **fields):
    config = dataclasses.replace(config, blocks=blocks, **fields)
    shapes = backbone.param_shapes(config)
    return Model(config, realistic(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), 4))


@pytest.fixture(scope="module")
def one_block(tiny_config):
    return with_blocks(tiny_config, BlockConfig(2, 4, 3, 6))


def groups_of(model):
    return [group for group in unit_table(model.config) if group.shape]


def unit_entries(tree, group, unit):
    """The entries of all parameters that belong to one unit, flat."""
    part = tree[f"blocks_{group.block}"]
    if group.kind == "mlp":
        mlp, (j,) = part["mlp"], unit
        found = [mlp["fc1"]["kernel"][:, j], mlp["fc1"]["bias"][j], mlp["fc2"]["kernel"][j]]
    else:
        attn = part["attn"]
        names = {"qk": ("q", "k"), "vo": ("v",), "head": ("q", "k", "v")}[group.kind]
        found = [attn[name]["kernel"][(slice(None), *unit)] for name in names]
        found += [attn[name]["bias"][unit] for name in names]
        if group.kind != "qk":
            found.append(attn["proj"]["kernel"][unit])
        if group.kind == "head" and "rel_pos_bias" in attn:
            found.append(attn["rel_pos_bias"][:, unit[0]])
    return np.concatenate([np.ravel(np.float64(array)) for array in found])


def by_unit(model, formula):
    """A number for every unit."""
    scores = {}
    for group in groups_of(model):
        scores[group.key] = np.zeros(group.shape)
        for unit in np.ndindex(group.shape):
            scores[group.key][unit] = formula(group, unit)
    return scores


def assert_scores_close(found, expected, rtol=1e-4, atol=1e-7):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].shape == values.shape, key
        scale = np.abs(values).max() if values.size else 0.0
        np.testing.assert_allclose(found[key], values, rtol=rtol, atol=atol * scale, err_msg=key)


def with_heads(scores, of_dims):
    for key in [key for key in scores if key.endswith("/vo")]:
        scores[key.replace("/vo", "/head")] = [of_dims(dims) for dims in scores[key]]
    return {key: np.asarray(values) for key, values in scores.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_magnitudes_count_all_parameters_of_a_unit(request, backbone):
    model = request.getfixturevalue(backbone)
    for method, order in (("magnitude_l1", 1), ("magnitude_l2", 2)):
        params = jax.tree.map(np.asarray, model.params)
        expected = by_unit(
            model, lambda *unit, p=order, q=params: np.linalg.norm(unit_entries(q, *unit), p)
        )
        assert_scores_close(scores_of(model, [], method), expected)


def weight_pairs(model, group):
    """(what makes a unit, what uses it) for every unit of a group."""
    part = jax.tree.map(np.asarray, model.params[f"blocks_{group.block}"])
    scale = {name: part.get(name, {"gamma": 1.0})["gamma"] for name in ("ls1", "ls2")}
    pairs = {}
    for unit in np.ndindex(group.shape):
        if group.kind == "mlp":
            fc1, fc2 = part["mlp"]["fc1"]["kernel"], part["mlp"]["fc2"]["kernel"]
            pairs[unit] = fc1[:, unit[0]], fc2[unit[0]] * scale["ls2"]
        else:
            q, k, v, proj = (part["attn"][name]["kernel"] for name in ("q", "k", "v", "proj"))
            at = (slice(None), *unit)
            pairs[unit] = (
                (q[at], k[at]) if group.kind == "qk" else (v[at], proj[unit] * scale["ls1"])
            )
    return pairs


@pytest.fixture(scope="module")
def scaled_model(tiny_config):
    """With layer scales that differ from channel to channel."""
    return with_blocks(tiny_config, BlockConfig(2, 4, 3, 6), layer_scale=True)


@pytest.mark.parametrize("backbone", ["scaled_model", "swin_model"])
def test_toast_measures_the_distance_to_the_median_unit(request, backbone):
    model = request.getfixturevalue(backbone)
    expected = {}
    for group in groups_of(model):
        if group.kind == "head":
            continue
        pairs = {unit: np.concatenate(pair) for unit, pair in weight_pairs(model, group).items()}
        scores = np.zeros(group.shape)
        for unit, row in pairs.items():
            # The units of the same head; hidden units have none.
            peers = [other for at, other in pairs.items() if at[:-1] == unit[:-1]]
            scores[unit] = np.linalg.norm(row - np.median(peers, axis=0))
        expected[group.key] = scores
    assert_scores_close(scores_of(model, [], "toast"), with_heads(expected, np.linalg.norm))


@pytest.mark.parametrize("backbone", ["scaled_model", "swin_model"])
def test_nuwa_is_the_norm_of_a_rank_one_term(request, backbone):
    model = request.getfixturevalue(backbone)
    expected = {}
    for group in groups_of(model):
        if group.kind != "head":
            pairs = weight_pairs(model, group)
            norms = [np.linalg.norm(np.outer(*pairs[unit])) for unit in np.ndindex(group.shape)]
            expected[group.key] = np.reshape(norms, group.shape)
    assert_scores_close(scores_of(model, [], "nuwa"), with_heads(expected, np.linalg.norm))


def test_nuwa_is_the_spectrum_of_heads_that_stand_in_their_singular_basis(one_block):
    params = jax.tree.map(np.array, one_block.params)
    attn = params["blocks_0"]["attn"]
    spectra = []
    for h in range(2):
        product = attn["q"]["kernel"][:, h] @ attn["k"]["kernel"][:, h].T
        left, values, right = np.linalg.svd(product)
        spectra.append(values[:4])
        attn["q"]["kernel"][:, h] = left[:, :4] * np.sqrt(values[:4])
        attn["k"]["kernel"][:, h] = right[:4].T * np.sqrt(values[:4])
    found = scores_of(one_block.replace(params=params), [], "nuwa")
    np.testing.assert_allclose(found["blocks_0/qk"], spectra, rtol=1e-4)


def test_random_scores_depend_on_the_seed_alone(tiny_model):
    first, again, other = (scores_of(tiny_model, [], "random", seed=seed) for seed in (3, 3, 4))
    for group in groups_of(tiny_model):
        np.testing.assert_array_equal(first[group.key], again[group.key])
        assert not np.array_equal(first[group.key], other[group.key])
        assert len(np.unique(first[group.key])) == group.size
        assert 0 <= first[group.key].min() <= first[group.key].max() < 1


def unit_values(model, batches):
    """All values of hidden units, head outputs and single dims' logits, one column a unit."""
    columns = {group.key: [] for group in groups_of(model) if group.kind != "head"}
    run = jax.jit(functools.partial(apply_with_taps, model.config))
    for images, _ in batches:
        _, blocks = run(model.params, images)
        for name, tap in blocks.items():
            q, k, out = (
                np.float64(tap[kind]).reshape(-1, *tap[kind].shape[-3:])
                for kind in ("q", "k", "vo")
            )
            for queries, keys in zip(q, k, strict=True):
                pairs = np.einsum("nhk,mhk->nmhk", queries, keys)
                columns[f"{name}/qk"].append(pairs.reshape(-1, *pairs.shape[2:]))
            columns[f"{name}/vo"].append(out.reshape(-1, *out.shape[2:]))
            hidden = np.float64(tap["mlp"])
            columns[f"{name}/mlp"].append(hidden.reshape(-1, hidden.shape[-1]))
    return {key: np.concatenate(found) for key, found in columns.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_variance_is_that_over_tokens_and_images(request, batches, backbone):
    model = request.getfixturevalue(backbone)
    expected = {key: values.var(axis=0) for key, values in unit_values(model, batches).items()}
    found = scores_of(model, batches, "variance")
    assert_scores_close(found, with_heads(expected, np.sum), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("key", "layer"), [("mlp", ("mlp", "fc1")), ("vo", ("attn", "v"))])
def test_variance_survives_a_mean_far_from_zero(one_block, batches, key, layer):
    params = jax.tree.map(np.array, one_block.params)
    params["blocks_0"][layer[0]][layer[1]]["bias"][:] = 3000.0
    moved = one_block.replace(params=params)
    found = scores_of(moved, batches, "variance")[f"blocks_0/{key}"]
    values = unit_values(moved, batches)[f"blocks_0/{key}"]
    assert np.abs(values.mean(axis=0)).min() > 500 * values.std(axis=0).max()
    np.testing.assert_allclose(found, values.var(axis=0), rtol=2e-3)


@pytest.mark.parametrize("backbone", ["scaled_model", "swin_model"])
def test_corp_is_energy_times_outgoing_weights(request, batches, backbone):
    model = request.getfixturevalue(backbone)
    expected, every = {}, unit_values(model, batches)
    for group in groups_of(model):
        if group.kind == "head":
            continue
        energy = np.square(every[group.key]).mean(axis=0)
        if group.kind == "qk":
            expected[group.key] = energy / model.config.block_spec(group.block).head_dim
        else:
            pairs = weight_pairs(model, group)
            norms = [np.square(pairs[unit][1]).sum() for unit in np.ndindex(group.shape)]
            expected[group.key] = energy * np.reshape(norms, group.shape)
    found = scores_of(model, batches, "corp")
    assert_scores_close(found, with_heads(expected, np.sum), rtol=1e-3, atol=1e-6)


def image_gradients(model, batches, loss):
    """Every image's own gradients at gates of one, gates of whole heads among them."""
    found = {}

    def total(gates, images, labels):
        logits, _ = apply_with_taps(model.config, model.params, images, gates)
        return summed_loss(logits, labels, loss, jnp.zeros_like(logits))

    run = jax.jit(jax.grad(total))
    for images, labels in batches:
        gates = {}
        for group in groups_of(model):
            gate = jnp.ones((len(images), *group.shape))
            gates.setdefault(f"blocks_{group.block}", {})[group.kind] = gate
        for name, kinds in run(gates, images, labels).items():
            for kind, gradient in kinds.items():
                found.setdefault(f"{name}/{kind}", []).append(np.float64(gradient))
    return {key: np.concatenate(parts) for key, parts in found.items()}


@pytest.mark.parametrize("backbone", ["one_block", "swin_model"])
def test_taylor_scores_are_means_over_every_images_gradient(request, batches, backbone):
    model = request.getfixturevalue(backbone)
    gradients = image_gradients(model, batches, "label")
    expected = {key: np.abs(g).mean(axis=0) for key, g in gradients.items()}
    assert_scores_close(scores_of(model, batches, "taylor_label"), expected, rtol=1e-3)
    expected = {key: np.square(g).mean(axis=0) for key, g in gradients.items()}
    assert_scores_close(scores_of(model, batches, "taylor_squared"), expected, rtol=1e-3)


def test_entropy_taylor_needs_no_labels(one_block, batches):
    gradients = image_gradients(one_block, batches, "entropy")
    expected = {key: np.abs(g).mean(axis=0) for key, g in gradients.items()}
    found = scores_of(one_block, [images for images, _ in batches], "entropy_taylor")
    assert_scores_close(found, expected, rtol=1e-3)


def test_taylor_is_the_composites_gradient_before_scaling(tiny_model, batches):
    found = scores_of(tiny_model, batches, "taylor", seed=5)
    only = TermWeights(relevance=0.0, redundancy=0.0, activation=0.0, gradient=1.0)
    config = NeuronConfig(mlp=only, attn=only)
    scaled = neuron_importance(tiny_model, batches, config=config, seed=5, mesh=ONE)
    for group in groups_of(tiny_model):
        if group.kind != "head":
            np.testing.assert_allclose(min_max(found[group.key]), scaled[group.key], atol=1e-4)
    # Half the mean square of the drawn gradient, in the divergence's own unit.
    key = jax.random.fold_in(jax.random.key(5), 0)
    run = jax.jit(functools.partial(gate_gradients, tiny_model.config, loss="kl"))
    (images, labels), *_ = batches
    _, _, gates = run(tiny_model.params, images, labels, key=key)
    found = scores_of(tiny_model, batches[:1], "taylor", seed=5)
    expected = np.square(np.float64(gates["blocks_1"]["vo"])).mean(axis=0) / 2
    np.testing.assert_allclose(found["blocks_1/vo"], expected, rtol=1e-3)


def test_programs_mean_by_taylor_what_the_registry_does(tiny_model, batches):
    config = dataclasses.replace(PruneConfig(), **PruneConfig().ranked_by("taylor"))
    found = score_units(tiny_model, batches, config, 5)
    assert_scores_close(found, scores_of(tiny_model, batches, "taylor", seed=5))


@functools.cache
def loss_gradient(config):
    """The gradient of the mean cross-entropy, by plain autodiff."""

    def loss(params, images, labels):
        log_p = jax.nn.log_softmax(apply(config, params, images))
        return -log_p[jnp.arange(len(images)), labels].mean()

    return jax.jit(jax.grad(loss))


def weight_products(model, images, labels):
    """w dL/dw."""
    gradient = loss_gradient(model.config)(model.params, images, labels)
    return jax.tree.map(lambda w, g: np.float64(w) * np.float64(g), model.params, gradient)


@pytest.mark.parametrize("backbone", ["one_block", "swin_model"])
def test_fisher_squares_a_units_sum_over_the_batch(request, batches, backbone):
    model = request.getfixturevalue(backbone)
    products = [weight_products(model, *batch) for batch in batches]

    def formula(*unit):
        return np.mean([unit_entries(found, *unit).sum() ** 2 for found in products])

    found = scores_of(model, batches, "fisher")
    # A sum over weights of both signs cancels: compare with the size of the layer's scores.
    assert_scores_close(found, by_unit(model, formula), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("statistic", [gate_statistic("kl", 2), fisher_statistic("kl")])
def test_backward_passes_of_parts_keep_less(tiny_model, images, labels, statistic, monkeypatch):
    def program(most_bytes):
        monkeypatch.setattr(statistics, "part_bytes", lambda: most_bytes)
        run = jax.jit(functools.partial(statistic.of_batch, tiny_model.config))
        return run.lower(tiny_model.params, images, labels, jax.random.key(0)).compile()

    whole, parts = program(2**31), program(1)
    kept = [run.memory_analysis().temp_size_in_bytes for run in (parts, whole)]
    assert kept[0] < 0.6 * kept[1]
    found, expected = (
        run(tiny_model.params, images, labels, jax.random.key(0)) for run in (parts, whole)
    )
    assert_scores_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hessian_sums_the_squares_of_every_image_and_weight(one_block, batches):
    products = [
        weight_products(one_block, images[i : i + 1], labels[i : i + 1])
        for images, labels in batches
        for i in range(len(images))
    ]

    def formula(*unit):
        return np.mean([np.square(unit_entries(found, *unit)).sum() / 2 for found in products])

    found = scores_of(one_block, batches, "hessian")
    assert_scores_close(found, by_unit(one_block, formula), rtol=1e-3)


def test_drawn_classes_stand_in_for_labels(one_block, images):
    key = jax.random.fold_in(jax.random.key(2), 0)
    logits = one_block.apply(images)
    drawn = np.asarray(jax.random.categorical(key, logits), np.int32)
    found = scores_of(one_block, [images], "fisher_kl", seed=2)
    assert_scores_close(found, scores_of(one_block, [(images, drawn)], "fisher"), rtol=1e-3)

    keys = jax.random.split(key, len(images))
    drawn = np.int32([jax.random.categorical(k, logits[i : i + 1])[0] for i, k in enumerate(keys)])
    found = scores_of(one_block, [images], "hessian_kl", seed=2)
    assert_scores_close(found, scores_of(one_block, [(images, drawn)], "hessian"), rtol=1e-3)


def slow_deletions(model, images):
    """Mask one unit, run the whole model again, compare."""

    def log_probabilities(changed):
        logits = np.float64(changed.apply(images))
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    original = log_probabilities(model)

    def formula(group, unit):
        keep = np.ones(group.shape, bool)
        keep[unit] = False
        deleted = log_probabilities(apply_masks(model, Plan(model.config, {group.key: keep})))
        return (np.exp(original) * (original - deleted)).sum(axis=1).mean()

    return by_unit(model, formula)


@pytest.mark.parametrize("backbone", ["one_block", "swin_model"])
def test_single_channel_kl_deletes_one_unit_at_a_time(request, batches, backbone):
    model = request.getfixturevalue(backbone)
    every = np.concatenate([images for images, _ in batches])
    config = CriterionConfig(max_images=12, chunk=5)
    found = scores_of(model, batches, "single_channel_kl", config=config)
    expected = slow_deletions(model, every)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-2, atol=1e-6, err_msg=key)
        assert values.max() > 1e-4


def test_deletions_run_the_last_block_for_the_class_token_alone(one_block, images):
    def flops(pool):
        model = with_blocks(one_block.config, *one_block.config.blocks, pool=pool)
        given = model.config, groups_of(model)
        run = functools.partial(deletion._batch_divergences, *given, chunk=32, devices=1)
        program = jax.jit(run).lower(model.params, images, np.ones(len(images))).compile()
        return program.cost_analysis()["flops"]

    assert flops("cls") < 0.8 * flops("mean")


def test_deletions_send_nothing_from_device_to_device(one_block):
    """Hundreds of sums over all devices, queued at once, stop a CPU of several for good."""
    mesh = data_mesh()
    images = np.zeros((mesh.size, 8, 8, 3), np.float32)
    rows, real = (shard_rows(array, mesh)[0] for array in (images, images[:, 0, 0, 0]))
    given = one_block.config, groups_of(one_block)
    run = functools.partial(deletion._batch_divergences, *given, chunk=32, devices=mesh.size)
    compiled = jax.jit(run).lower(replicate(one_block.params, mesh), rows, real).compile()
    assert "all-" not in compiled.as_text()


@pytest.mark.parametrize(("method", "of_dims"), [("residual", np.sum), ("tap", np.mean)])
def test_heads_score_what_their_values_do(one_block, images, method, of_dims):
    found = scores_of(one_block, [images], method)
    dims = found["blocks_0/vo"]
    np.testing.assert_allclose(found["blocks_0/head"], of_dims(dims, axis=1), rtol=1e-5)


def test_single_channel_kl_reads_no_more_than_it_needs(one_block, images):
    def unlimited():
        yield images
        raise AssertionError("read too far")

    few = deletion_divergences(one_block, unlimited(), max_images=6, mesh=ONE)
    assert_scores_close(deletion_divergences(one_block, [images]), few, rtol=1e-2, atol=1e-4)


def test_experiments_say_how_many_images_are_read_for_deletions(one_block, images):
    config = PruneConfig(criterion="single_channel_kl", deletion_images=3)
    found = score_units(one_block, [images], config)
    few = deletion_divergences(one_block, [images], max_images=3, mesh=ONE)
    assert_scores_close(found, few, rtol=1e-4, atol=1e-6)
    more = deletion_divergences(one_block, [images], max_images=6, mesh=ONE)
    assert any(not np.allclose(found[key], more[key], rtol=1e-2) for key in found)
    with pytest.raises(InputError, match="deletion_images is 0"):
        PruneConfig(deletion_images=0)


@pytest.mark.parametrize("name", ["relevance", "redundancy", "activation"])
def test_terms_are_the_composite_with_one_weight(one_block, images, name):
    weights = TermWeights(
        **dict.fromkeys(("relevance", "redundancy", "activation"), 0.0) | {name: 1}
    )
    expected = neuron_importance(
        one_block, [images], config=NeuronConfig(weights, weights), mesh=ONE
    )
    assert_scores_close(scores_of(one_block, [images], name), expected)


@pytest.mark.parametrize("name", ["tap", "tap_published"])
def test_the_composite_is_neuron_importance(tiny_model, batches, name):
    expected = neuron_importance(tiny_model, batches[:1], name, seed=1, mesh=ONE)
    config = CriterionConfig(max_batches=1)
    found = scores_of(tiny_model, batches, name, seed=1, config=config)
    assert_scores_close(found, expected)


QUICK = ["magnitude_l2", "toast", "nuwa", "variance", "corp", "taylor", "fisher_kl", "hessian_kl"]


def test_dead_units_score_nothing(one_block, images):
    dead = jax.tree.map(np.array, one_block.params)
    for layer, at in (("fc1", np.s_[..., :2]), ("fc2", np.s_[:2])):
        for name, array in dead["blocks_0"]["mlp"][layer].items():
            if (layer, name) != ("fc2", "bias"):
                array[at] = 0.0
    for name in ("q", "k"):
        for array in dead["blocks_0"]["attn"][name].values():
            array[..., 1, 2:] = 0.0
    model = one_block.replace(params=dead)
    for method in [*QUICK, "single_channel_kl"]:
        if method == "toast":
            continue
        found = scores_of(model, [images], method)
        limit = 1e-6 if method == "single_channel_kl" else 0.0
        assert np.abs(found["blocks_0/mlp"][:2]).max() <= limit, method
        assert np.abs(found["blocks_0/qk"][1, 2:]).max() <= limit, method
        assert found["blocks_0/mlp"][2:].min() > limit, method
        assert min(values.min() for values in found.values()) >= 0.0, method


def test_twins_score_alike(one_block, images):
    twins = jax.tree.map(np.array, one_block.params)
    mlp = twins["blocks_0"]["mlp"]
    for array in (mlp["fc1"]["kernel"].T, mlp["fc1"]["bias"], mlp["fc2"]["kernel"]):
        array[4] = array[1]
    for method in QUICK:
        found = scores_of(one_block.replace(params=twins), [images], method)
        assert found["blocks_0/mlp"][4] == pytest.approx(found["blocks_0/mlp"][1], rel=1e-4)


def test_groups_without_units_get_scores_without_entries(tiny_config, images):
    absent = BlockConfig(0, 0, 0, 0, attn=False, mlp=False)
    model = with_blocks(tiny_config, BlockConfig(2, 0, 3, 0), absent, BlockConfig(2, 3, 0, 4))
    for method in ["toast", "corp", "taylor", "hessian_kl", "single_channel_kl", "random"]:
        found = scores_of(model, [images], method)
        shapes = {group.key: group.shape for group in groups_of(model)}
        assert {key: values.shape for key, values in found.items()} == shapes
        assert all(values.dtype == np.float32 for values in found.values())
        assert all(np.isfinite(values).all() for values in found.values()), method


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), method=st.sampled_from(["toast", "corp", "taylor"]))
def test_permuting_units_permutes_scores(one_block_module, seed, method):
    model, images = one_block_module
    rng = np.random.default_rng(seed)
    params = jax.tree.map(np.array, model.params)
    attn, mlp = params["blocks_0"]["attn"], params["blocks_0"]["mlp"]
    units, heads = rng.permutation(6), rng.permutation(2)
    qk, vo = (np.stack([rng.permutation(n) for _ in range(2)]) for n in (4, 3))
    mlp["fc1"]["kernel"] = mlp["fc1"]["kernel"][:, units]
    mlp["fc1"]["bias"] = mlp["fc1"]["bias"][units]
    mlp["fc2"]["kernel"] = mlp["fc2"]["kernel"][units]
    for name, order in (("q", qk), ("k", qk), ("v", vo)):
        attn[name]["kernel"] = attn[name]["kernel"][:, heads[:, None], order]
        attn[name]["bias"] = attn[name]["bias"][heads[:, None], order]
    attn["proj"]["kernel"] = attn["proj"]["kernel"][heads[:, None], vo]
    before = scores_of(model, [images], method)
    expected = {
        "blocks_0/qk": before["blocks_0/qk"][heads[:, None], qk],
        "blocks_0/vo": before["blocks_0/vo"][heads[:, None], vo],
        "blocks_0/head": before["blocks_0/head"][heads],
        "blocks_0/mlp": before["blocks_0/mlp"][units],
    }
    found = scores_of(model.replace(params=params), [images], method)
    # The permuted network computes the same up to rounding; nearly all draws stay as they are.
    assert_scores_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_block_module(one_block, images):
    return one_block, images


def many_batches():
    rng = np.random.default_rng(11)
    for size in (4, 4, 4, 3):
        images = rng.standard_normal((size, 8, 8, 3)).astype(np.float32)
        yield images + 2 * rng.standard_normal(), rng.integers(0, 5, size).astype(np.int32)


@pytest.mark.parametrize("statistic", [MOMENTS, fisher_statistic("label")])
def test_devices_and_processes_change_nothing(one_block, monkeypatch, statistic):
    alone = sum_over_batches(one_block, many_batches(), statistic, mesh=ONE)
    spread = sum_over_batches(one_block, many_batches(), statistic)
    # Two processes, one after the other, each with every second batch.
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "process_count", lambda: 2)
        patch.setattr(distributed, "gather", lambda array: np.stack([array, array]))
        patch.setattr(distributed, "sum_over_processes", lambda tree: tree)
        for rank in range(2):
            patch.setattr(distributed, "process_index", lambda rank=rank: rank)
            own = list(many_batches())[rank::2]
            parts.append(sum_over_batches(one_block, own, statistic, mesh=ONE))
    joined = jax.tree.map(np.add, *parts)
    for found in (spread, joined):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_a_process_without_batches_adds_nothing(one_block, images, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda array: np.array([array, True]))
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tree: tree)
    for leaf in jax.tree.leaves(sum_over_batches(one_block, [], MOMENTS)):
        assert not leaf.any()


def test_moments_of_shifted_batches_merge(one_block):
    """Chan's update against all values at once, where the batches' own means differ."""
    found = variance(sum_over_batches(one_block, many_batches(), MOMENTS, mesh=ONE)["blocks_0/mlp"])
    values = unit_values(one_block, many_batches())["blocks_0/mlp"]
    np.testing.assert_allclose(found, values.var(axis=0), rtol=1e-3)


def test_processes_share_the_images_of_single_channel_kl(one_block, images, monkeypatch):
    batches = [images, 2 * images, 3 * images]
    alone = deletion_divergences(one_block, batches, max_images=15, mesh=ONE)
    parts = []
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda tree: parts.append(tree) or tree)
    for rank in range(2):
        monkeypatch.setattr(distributed, "process_index", lambda rank=rank: rank)
        deletion_divergences(one_block, batches[rank::2], max_images=15, mesh=ONE)
    sums, count = jax.tree.map(np.add, *parts)
    assert count == 15
    for key, values in alone.items():
        found = sums[key].reshape(values.shape) / count
        np.testing.assert_allclose(found, values, rtol=1e-2, atol=1e-6)


def test_padding_rows_change_nothing(one_block, images, labels):
    padded = np.concatenate([images[:2], np.full((2, 8, 8, 3), 1e3, np.float32), images[2:]])
    mask = np.float32([1, 1, 0, 0, 1, 1, 1, 1])
    batch = {"image": padded, "label": np.insert(labels, 2, [0, 0]), "mask": mask}
    for method in ("variance", "taylor_label"):
        found = scores_of(one_block, [batch], method)
        for key, values in scores_of(one_block, [(images, labels)], method).items():
            np.testing.assert_array_equal(found[key], values)


def test_no_batch_beyond_max_batches_is_read(one_block, images):
    def batches():
        yield images
        raise AssertionError("read too far")

    config = CriterionConfig(max_batches=1)
    found = scores_of(one_block, batches(), "variance", config=config)
    assert_scores_close(scores_of(one_block, [images], "variance"), found)


def test_the_registry_says_what_criteria_need(one_block, images):
    def unread():
        raise AssertionError("read")
        yield

    for name, found in CRITERIA.items():
        assert criterion(name) is found
        assert found.name == name
        assert found.source
        assert found.summary
        if found.needs == "parameters":
            assert found.score(one_block, unread(), 0).keys()
        if found.needs_labels:
            for batch in (images, (images, np.int32([0, 1, 2, -1, 3, 4]))):
                with pytest.raises(InputError, match="need labels"):
                    found.score(one_block, [batch], 0)
    assert inspect.signature(unit_importance).parameters["method"].default in CRITERIA


@pytest.mark.parametrize("method", ["variance", "single_channel_kl", "tap"])
@pytest.mark.parametrize("batches", [[], [np.zeros((0, 8, 8, 3), np.float32)]])
def test_missing_images_are_refused(one_block, method, batches):
    with pytest.raises(InputError, match="at least one batch"):
        scores_of(one_block, batches, method)


@pytest.mark.parametrize("method", [name for name in CRITERIA if name != "random"])
def test_what_is_not_finite_is_refused(one_block, batches, method):
    (images, labels), _ = batches
    images = np.array(images)
    images[3, 2, 2, 1] = np.nan
    if CRITERIA[method].needs == "parameters":
        params = jax.tree.map(np.array, one_block.params)
        for layer in ("q", "v"):
            params["blocks_0"]["attn"][layer]["kernel"][0, 1, 2] = np.nan
        one_block = one_block.replace(params=params)
    elif method == "tap_published":
        one_block = with_blocks(one_block.config, BlockConfig(2, 4, 4, 6))
    with pytest.raises(InputError, match="not finite"):
        scores_of(one_block, [(images, labels)], method)


def test_an_unknown_criterion_is_refused(one_block, images):
    with pytest.raises(InputError, match="criterion is 'magic', expected one of random, magnitude"):
        scores_of(one_block, [images], "magic")


@pytest.mark.parametrize("field", ["max_images", "chunk"])
def test_useless_limits_on_deletions_are_refused(one_block, field):
    with pytest.raises(InputError, match=f"{field}.* 0.*, expected 1 or more"):
        deletion_divergences(one_block, [], **{field: 0})


def test_negative_seeds_are_refused(one_block):
    with pytest.raises(InputError, match="seed is -1, expected 0 or more"):
        scores_of(one_block, [], "random", seed=-1)


def test_configs_of_another_kind_are_refused(one_block, images):
    with pytest.raises(InputError, match="config is a NeuronConfig, expected a CriterionConfig"):
        scores_of(one_block, [images], "tap", config=NeuronConfig())
    with pytest.raises(InputError, match="config is a CriterionConfig, expected a NeuronConfig"):
        neuron_importance(one_block, [images], config=CriterionConfig())


@pytest.mark.parametrize("field", ["max_batches", "max_images", "chunk"])
def test_useless_limits_are_refused(field):
    with pytest.raises(InputError, match=f"{field} is 0"):
        CriterionConfig(**{field: 0})
