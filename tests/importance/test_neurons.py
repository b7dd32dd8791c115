"""Neuron scores against slow float64 loops written from the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.importance import gradients, neurons
from tapvit_jax.importance.gradients import gate_gradients
from tapvit_jax.importance.neurons import (
    NeuronConfig,
    TermWeights,
    batch_terms,
    neuron_importance,
)
from tapvit_jax.importance.streaming import unpack_batch
from tapvit_jax.models import backbone
from tapvit_jax.models.backbone import apply_with_taps
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh, shard_rows
from tests.conftest import realistic
from tests.importance.test_hsic import slow_hsic, slow_kernel

KEY = jax.random.key(3)
ONLY_GRADIENT = TermWeights(relevance=0.0, redundancy=0.0, activation=0.0, gradient=1.0)
GRADIENT = NeuronConfig(mlp=ONLY_GRADIENT, attn=ONLY_GRADIENT)


@pytest.fixture(scope="module")
def labels(tiny_config):
    return np.arange(6, dtype=np.int32) % tiny_config.num_classes


@pytest.fixture(scope="module")
def more_images(images):
    return np.random.default_rng(9).standard_normal(images.shape).astype(np.float32)


def with_blocks(config, *blocks):
    config = dataclasses.replace(config, blocks=blocks)
    shapes = backbone.param_shapes(config)
    return Model(config, realistic(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), 4))


def scaled(values):
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def standardised(points):
    centred, deviation = points - points.mean(axis=0), points.std(axis=0, ddof=1)
    varies = deviation > 1e-6 * np.abs(points).max()
    return np.where(varies, centred / np.where(varies, deviation, 1), 0)


def joined(tap):
    """Tokens of all windows in a row."""
    return np.stack([image.reshape(-1, *image.shape[-2:]) for image in tap])


def pair_norms(q, k):
    """Norm of q_n k_m over all pairs of tokens that attend to each other, for one image."""
    windows = zip(q, k, strict=True) if q.ndim == 4 else [(q, k)]
    pairs = [np.einsum("nhk,mhk->nmhk", *window) for window in windows]
    return np.sqrt(np.square(pairs).sum(axis=(0, 1, 2)))


class SlowScores:
    """The composite score with one loop for every index."""

    def __init__(self, config):
        self.config = config
        self.terms, self.summed = {}, {}

    def add(self, logits, taps, gradients):
        logits = np.asarray(logits, np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p -= p.mean(axis=0)
        self.target = p @ p.T
        for name, tap in ((f"blocks_{i}", tap) for i, tap in enumerate(taps)):
            tap = {kind: np.asarray(value, np.float64) for kind, value in tap.items()}
            if "mlp" in tap:
                self._keep(f"{name}/mlp", self._mlp(tap["mlp"]), gradients)
            if "vo" in tap:
                out = joined(tap["vo"])
                activation = np.abs(out).sum(axis=(0, 1))
                self._keep(f"{name}/vo", self._heads(out, activation), gradients)
            if "vo" in tap and not self.config.couple_qk_vo:
                both = np.concatenate([joined(tap["q"]), joined(tap["k"])], axis=1)
                norms = np.array([pair_norms(*qk) for qk in zip(tap["q"], tap["k"], strict=True)])
                self._keep(f"{name}/qk", self._heads(both, norms.sum(axis=0)), gradients)

    def _unit(self, points, references):
        kernel = slow_kernel(points, self.config.bandwidth)
        varied = standardised(points) if self.config.standardize else points
        relevance = slow_hsic(slow_kernel(varied, self.config.bandwidth), self.target)
        return relevance, sum(slow_hsic(kernel, r) for r in references) / max(len(references), 1)

    def _mlp(self, hidden):
        reference = slow_kernel(hidden.mean(axis=-1), self.config.bandwidth)
        units = [self._unit(hidden[..., j], [reference]) for j in range(hidden.shape[-1])]
        relevance, redundancy = np.array(units).T
        activation = np.abs(hidden).sum(axis=(0, 1))
        return {"relevance": relevance, "redundancy": redundancy, "activation": activation}

    def _heads(self, points, activation):
        _, _, h, k = points.shape
        heads = [
            slow_kernel(points[:, :, i].mean(axis=-1), self.config.bandwidth) for i in range(h)
        ]
        relevance, redundancy = np.zeros((h, k)), np.zeros((h, k))
        for i in range(h):
            others = heads[:i] + heads[i + 1 :]
            for j in range(k):
                relevance[i, j], redundancy[i, j] = self._unit(points[:, :, i, j], others)
        return {"relevance": relevance, "redundancy": redundancy, "activation": activation}

    def _keep(self, key, terms, gradients):
        block, kind = key.split("/")
        if block in gradients:
            gradient = np.asarray(gradients[block][kind], np.float64)
            gradient = gradient**2 / 2 if self.config.loss == "kl" else np.abs(gradient)
            terms["gradient"] = gradient.sum(axis=0)
        if self.config.scale == "batch":
            self.summed[key] = self.summed.get(key, 0) + self._compose(key, terms)
        else:
            sums = self.terms.setdefault(key, dict.fromkeys(terms, 0))
            self.terms[key] = {name: sums[name] + terms[name] for name in terms}

    def _compose(self, key, terms):
        weights = self.config.mlp if key.endswith("mlp") else self.config.attn
        total = weights.relevance * scaled(terms["relevance"])
        total = total + weights.redundancy * (1 - scaled(terms["redundancy"]))
        total = total + weights.activation * scaled(terms["activation"])
        if "gradient" in terms:
            total = total + weights.gradient * scaled(terms["gradient"])
        return total

    def result(self):
        if self.config.scale == "batch":
            scores = dict(self.summed)
        else:
            scores = {key: self._compose(key, terms) for key, terms in self.terms.items()}
        for key in [key for key in scores if key.endswith("/vo")]:
            block = key.split("/")[0]
            scores[f"{block}/head"] = scores[key].mean(axis=1)
            if self.config.couple_qk_vo:
                scores[f"{block}/qk"] = scores[key]
        return scores


def slow_scores(model, config, batches, seed=0):
    slow = SlowScores(config)
    # The gradients have their own test below.
    loss = config.loss if config.needs_gradient else None
    run = functools.partial(
        gradients.dense_pass, model.config, loss=loss, summarize=lambda taps: taps
    )
    run = jax.jit(run)
    for i, images in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        slow.add(*jax.device_get(run(params=model.params, images=images, labels=ZEROS, key=key)))
    return slow.result()


ZEROS = np.zeros(6, np.int32)


@pytest.mark.parametrize("loss", ["kl", "label"])
def test_gradients_in_parts_are_those_of_the_whole_batch(tiny_model, images, loss, monkeypatch):
    config = tiny_model.config

    def program(most_bytes, *needed):
        run = functools.partial(gradients.dense_pass, config, loss=loss, needed=needed)
        run = functools.partial(run, most_bytes=most_bytes)
        run = jax.jit(functools.partial(run, summarize=lambda taps: taps["mlp"].sum(axis=1)))
        return run.lower(params=tiny_model.params, images=images, labels=ZEROS, key=KEY).compile()

    def found(run):
        return run(params=tiny_model.params, images=images, labels=ZEROS, key=KEY)

    # Six parts that take no taps along, six that do, and taps that are too many to take along.
    whole, apart, handed = program(2**31), program(1), program(1, "mlp")
    limit = gradients._tap_bytes(config, len(images)) - 1
    monkeypatch.setattr(gradients, "_MOST_TAP_BYTES", limit)
    refused = program(1, "mlp")
    for run in (apart, handed, refused):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
            *(found(run), found(whole)),
        )
    # Who takes taps along needs no forward pass of its own.
    flops = [run.cost_analysis()["flops"] for run in (handed, refused)]
    assert flops[0] < 0.8 * flops[1]


def test_nothing_is_computed_of_tokens_that_no_logit_depends_on(tiny_model, images):
    """A class token costs the last block less than the mean of all tokens does."""

    def flops(pool):
        model = with_blocks(dataclasses.replace(tiny_model.config, pool=pool), *blocks)
        run = functools.partial(gradients.dense_pass, model.config, loss="label")
        run = functools.partial(run, summarize=lambda taps: ())
        given = {"params": model.params, "images": images, "labels": ZEROS, "key": KEY}
        return jax.jit(run).lower(**given).compile().cost_analysis()["flops"]

    blocks = (dataclasses.replace(tiny_model.config.blocks[0], mlp_dim=64),)
    assert flops("cls") < 0.6 * flops("mean")


def test_blocks_of_long_networks_share_their_code(tiny_model, images, monkeypatch):
    given = {"params": tiny_model.params, "images": images, "labels": ZEROS, "key": KEY}

    def passed():
        run = functools.partial(gradients.dense_pass, tiny_model.config, loss="label")
        run = functools.partial(run, summarize=lambda taps: taps["mlp"].sum(axis=1))
        program = jax.jit(run).lower(**given)
        return program.as_text().count("stablehlo.while"), program.compile()(**given)

    few, unrolled = passed()
    monkeypatch.setattr(backbone, "_MOST_UNROLLED", 1)
    more, scanned = passed()
    # One loop forth and one back.
    assert more >= few + 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), unrolled, scanned
    )


def assert_scores_close(found, expected, atol=1e-4):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-4, atol=atol, err_msg=key)


@pytest.mark.parametrize("method", ["tap", "tap_published"])
@pytest.mark.parametrize("backbone", ["tiny_model", "swin_model"])
def test_scores_equal_the_formulas(request, images, more_images, method, backbone):
    model, batches = request.getfixturevalue(backbone), [images, more_images]
    expected = slow_scores(model, NeuronConfig.of_method(method), batches)
    found = neuron_importance(model, batches, method)
    assert {group.key for group in unit_table(model.config) if group.shape} == found.keys()
    assert_scores_close(found, expected)


@pytest.mark.parametrize("bandwidth", ["fixed", "mean"])
def test_coordinates_are_standardised_and_constant_ones_say_nothing(bandwidth):
    # Six equal numbers do not sum to six times one of them in float32: what rounding leaves must
    # not be standardised into a signal.
    rng = np.random.default_rng(5)
    points = (rng.standard_normal((6, 5, 3)) * [0.1, 1, 30]).astype(np.float32)
    config = NeuronConfig(bandwidth=bandwidth)
    constant = points[:1, 0].copy()
    for first in (0, constant, np.nextafter(constant, rng.choice([-99, 99], (6, 3)).astype("f4"))):
        points[:, 0] = first
        _, found = neurons._kernels(config, config.mlp, points)
        for u in range(3):
            expected = slow_kernel(standardised(np.float64(points[:, 1:, u])), bandwidth)
            np.testing.assert_allclose(found[u], expected, rtol=1e-4, atol=1e-6)


def gate_ones(config, b):
    gates = {}
    for i, block in enumerate(config.blocks):
        heads = (b, block.num_heads)
        gates[f"blocks_{i}"] = {
            "qk": jnp.ones((*heads, block.qk_dim)),
            "vo": jnp.ones((*heads, block.v_dim)),
            "mlp": jnp.ones((b, block.mlp_dim)),
        }
    return gates


@pytest.fixture(scope="module")
def one_block(tiny_config):
    return with_blocks(tiny_config, BlockConfig(2, 4, 3, 6))


@pytest.fixture(scope="module")
def brute(one_block, images):
    """Every image's own gradients, one image at a time: of each -log p_c, and of the entropy."""

    def losses(gates, image):
        gates = jax.tree.map(lambda gate: gate[None], gates)
        log_p = jax.nn.log_softmax(
            apply_with_taps(one_block.config, one_block.params, image[None], gates)[0][0]
        )
        return jnp.append(-log_p, -(jnp.exp(log_p) * log_p).sum())

    gates = jax.tree.map(lambda gate: gate[0], gate_ones(one_block.config, 1))
    every = jax.jit(jax.vmap(jax.jacrev(losses), (None, 0)))(gates, images)
    probabilities = np.asarray(jax.nn.softmax(one_block.apply(images)))
    classes = jax.tree.map(lambda leaf: np.asarray(leaf[:, :-1], np.float64), every)
    entropy = jax.tree.map(lambda leaf: np.asarray(leaf[:, -1]), every)
    return classes, entropy, probabilities


@pytest.mark.parametrize("loss", ["label", "entropy"])
def test_gate_gradients_are_every_images_own(one_block, images, labels, brute, loss):
    run = jax.jit(functools.partial(gate_gradients, one_block.config, loss=loss))
    logits, _, found = run(one_block.params, images, labels, key=KEY)
    classes, entropy, _ = brute
    expected = entropy
    if loss == "label":
        expected = jax.tree.map(lambda leaf: leaf[np.arange(6), labels], classes)
    np.testing.assert_allclose(logits, one_block.apply(images), atol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(b).max() > 1e-3


def test_the_drawn_fisher_loss_is_unbiased(one_block, images, brute):
    draws = 512
    run = functools.partial(batch_terms, one_block.config, GRADIENT, one_block.params, images)
    keys = jax.random.split(KEY, draws)
    drawn = jax.jit(jax.vmap(lambda key: run(ZEROS, key)))(keys)
    classes, _, p = brute
    for group in unit_table(one_block.config):
        if group.kind not in ("mlp", "qk", "vo"):
            continue
        squares = classes[f"blocks_{group.block}"][group.kind] ** 2 / 2
        weights = p.reshape(p.shape + (1,) * (squares.ndim - 2))
        mean = (weights * squares).sum(axis=1)
        variance = (weights * squares**2).sum(axis=1) - mean**2
        found = np.asarray(drawn[group.key]["gradient"]).mean(axis=0)
        error = np.sqrt(variance.sum(axis=0) / draws)
        expected = mean.sum(axis=0)
        assert np.all(np.abs(found - expected) <= 5 * error + 1e-6), group.key
        assert abs(found.sum() / expected.sum() - 1) < 0.1


def test_dead_units_and_equal_images_give_finite_scores(tiny_model, images):
    dead = jax.tree.map(np.array, tiny_model.params)
    for array in dead["blocks_1"]["mlp"]["fc1"].values():
        array[..., :4] = 0.0
    found = neuron_importance(tiny_model.replace(params=dead), [images])
    assert all(np.isfinite(values).all() for values in found.values())
    # Neither relevant nor active nor missed: only that it repeats nothing speaks for a dead unit.
    np.testing.assert_allclose(found["blocks_1/mlp"][:4], NeuronConfig().mlp.redundancy, atol=1e-6)

    equal = neuron_importance(tiny_model, [np.repeat(images[:1], 6, axis=0)])
    assert all(np.isfinite(values).all() for values in equal.values())


def test_terms_that_are_not_finite_cannot_be_scaled():
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(neurons.min_max(jnp.array([0.0, bad, 1.0]))).any()
    assert np.isnan(neurons.min_max(jnp.full(3, jnp.inf))).all()
    np.testing.assert_array_equal(neurons.min_max(jnp.array([2.0, 4.0, 3.0])), [0, 1, 0.5])
    np.testing.assert_array_equal(neurons.min_max(jnp.full(3, 2.0)), 0)


@pytest.mark.parametrize("method", ["tap", "tap_published"])
def test_a_single_bad_pixel_is_no_silent_constant(tiny_model, images, method):
    bad = np.array(images)
    bad[3, 2, 2, 1] = np.nan
    with pytest.raises(InputError, match="not finite: parameters, activations or gradients"):
        neuron_importance(tiny_model, [images, bad], method)


def test_padding_rows_change_nothing(tiny_model, images):
    padded = np.concatenate([images[:2], np.full((2, 8, 8, 3), 1e6), images[2:]])
    batch = {"image": padded.astype(np.float32), "mask": np.float32([1, 1, 0, 0, 1, 1, 1, 1])}
    found = neuron_importance(tiny_model, [batch])
    for key, values in neuron_importance(tiny_model, [images]).items():
        np.testing.assert_array_equal(found[key], values)


def test_batches_come_as_arrays_pairs_and_dicts(images, labels):
    mask = np.float32([1, 1, 0, 1, 1, 0])
    for batch in ((images, labels), [images, labels], {"image": images, "label": labels}):
        found = unpack_batch(batch)
        assert found[0] is images
        assert found[1] is labels
    assert unpack_batch(images)[1] is None
    assert unpack_batch({"image": images, "mask": mask})[1] is None
    for form in (np.asarray, np.ndarray.tolist):
        batch = {"image": form(images), "label": form(labels), "mask": form(mask)}
        found = unpack_batch(batch)
        np.testing.assert_array_equal(found[0], images[[0, 1, 3, 4]])
        np.testing.assert_array_equal(found[1], labels[[0, 1, 3, 4]])


TWO = np.zeros((2, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"images": 0, "label": 0}, "batch is a dict of images, label, expected images .*, a pair"),
        ((np.zeros((2, 8, 8, 3)),), "batch is a tuple of 1, expected images"),
        ([np.zeros((8, 8, 3))] * 3, "batch is a list of 3, expected images"),
        (np.zeros((8, 8, 3)), "batch is a ndarray of 3 axes, expected images"),
        (
            {"image": TWO, "mask": np.ones((2, 1))},
            r"mask of a batch have shape \(2, 1\), expected one for each of the 2 images",
        ),
        ((TWO, np.zeros(3, int)), r"labels of a batch have shape \(3,\), expected one .* 2 im"),
        ((TWO, np.zeros(2)), "labels are float64, expected whole numbers"),
        ((TWO, ["a", "b"]), "labels are <U1, expected whole numbers"),
        ((TWO[0], np.zeros(8, int)), "batch is a ndarray of 3 axes, expected images"),
        (None, "batch is a NoneType of 0 axes, expected images"),
    ],
    ids=["dict", "single", "list", "image", "mask", "count", "float", "text", "pair", "none"],
)
def test_batches_of_other_forms_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        unpack_batch(batch)


def test_no_batch_beyond_max_batches_is_read(tiny_config, images, monkeypatch):
    def terms(model_config, config, params, images, labels, key):
        return {"blocks_0/mlp": {"activation": jnp.asarray(images[:2, 0, 0, :3].sum(axis=0))}}

    def batches():
        for i in range(3):
            yield images + i**2 * np.arange(3, dtype=np.float32)
        raise AssertionError("read too far")

    monkeypatch.setattr(neurons, "batch_terms", terms)
    model = with_blocks(tiny_config, BlockConfig(0, 0, 0, 3, attn=False))
    found = neuron_importance(model, batches(), config=NeuronConfig(max_batches=3))
    summed = 3 * np.float64(images[:2, 0, 0]).sum(axis=0) + 2 * 5 * np.arange(3)
    np.testing.assert_allclose(found["blocks_0/mlp"], 0.3 * scaled(summed), rtol=1e-5)


def test_a_batch_of_one_image_is_skipped(tiny_model, images):
    found = neuron_importance(tiny_model, [images, images[:1]])
    for key, values in neuron_importance(tiny_model, [images]).items():
        np.testing.assert_array_equal(found[key], values)


def test_the_seed_draws_the_classes(tiny_model, images):
    first, again, other = (
        neuron_importance(tiny_model, [images], config=GRADIENT, seed=seed)["blocks_0/mlp"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_a_single_head_repeats_no_other(tiny_config):
    model = with_blocks(tiny_config, BlockConfig(1, 4, 4, 3))
    images = np.random.default_rng(7).standard_normal((6, 8, 8, 3)).astype(np.float32)
    config = NeuronConfig.as_published()
    assert_scores_close(
        neuron_importance(model, [images], config=config), slow_scores(model, config, [images])
    )


def test_scores_do_not_depend_on_how_a_batch_is_sharded(tiny_config):
    model = with_blocks(tiny_config, BlockConfig(2, 3, 2, 0, mlp=False))
    images = np.random.default_rng(8).standard_normal((8, 8, 8, 3)).astype(np.float32)
    spread, _ = shard_rows(images, data_mesh())
    assert len(spread.sharding.device_set) == 8
    assert_scores_close(
        neuron_importance(model, [spread]), neuron_importance(model, [images]), atol=1e-5
    )


def test_groups_without_units_get_scores_without_entries(tiny_config, images):
    absent = BlockConfig(0, 0, 0, 0, attn=False, mlp=False)
    model = with_blocks(tiny_config, BlockConfig(2, 0, 3, 0), absent, BlockConfig(0, 0, 0, 4))
    weights = TermWeights(relevance=0.1, redundancy=0.1, activation=0.8)
    found = neuron_importance(model, [images], config=NeuronConfig(mlp=weights, attn=weights))
    shapes = {group.key: group.shape for group in unit_table(model.config) if group.shape}
    assert {key: values.shape for key, values in found.items()} == shapes
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("batches", [[], [np.zeros((1, 8, 8, 3), np.float32)]])
def test_too_few_images_are_refused(tiny_model, batches):
    with pytest.raises(InputError, match="at least one batch of 2 images or more"):
        neuron_importance(tiny_model, batches)


def test_missing_labels_are_refused(tiny_model, images, labels):
    config = dataclasses.replace(GRADIENT, loss="label")
    unknown = np.where(labels == 2, -1, labels)
    for batch in (images, (images, unknown), {"image": images}):
        with pytest.raises(InputError, match="need labels"):
            neuron_importance(tiny_model, [batch], config=config)


def test_labels_beyond_the_classes_are_refused(tiny_model, images, labels):
    found = np.where(labels == 2, 9, labels)
    with pytest.raises(InputError, match="label 9, expected 0 to 4"):
        neuron_importance(
            tiny_model, [(images, found)], config=dataclasses.replace(GRADIENT, loss="label")
        )
    # Where no label is looked at, any will do.
    first, other = (
        neuron_importance(tiny_model, [(images, given)], config=GRADIENT)
        for given in (found, labels)
    )
    np.testing.assert_array_equal(first["blocks_0/mlp"], other["blocks_0/mlp"])


def test_an_unknown_method_is_refused(tiny_model, images):
    # Criteria of the registry are no methods of the composite.
    for name in ("magic", "taylor"):
        message = f"method is '{name}', expected one of tap, tap_published$"
        with pytest.raises(InputError, match=message):
            neuron_importance(tiny_model, [images], name)


def test_coupled_scores_of_unequal_dims_are_refused(one_block, images):
    with pytest.raises(InputError, match="blocks_0: coupled scores need equal qk_dim and v_dim"):
        neuron_importance(one_block, [images], "tap_published")


@pytest.mark.parametrize("weights", [(0, 0, 0, 0), (-0.1, 1, 1, 0)])
def test_useless_weights_are_refused(weights):
    with pytest.raises(InputError, match="term weights"):
        TermWeights(*weights)


@pytest.mark.parametrize(
    "changes",
    [{"loss": "mse"}, {"bandwidth": "median"}, {"scale": "image"}, {"max_batches": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_bad_options_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))} is "):
        NeuronConfig(**changes)
