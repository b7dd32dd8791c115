"""Features, likely classes, layer-wise rates, moving averages and training without labels."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.mask import Plan, param_masks, unit_masks
from tapvit_jax.prune.reshape import reshape, reshape_tree
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh
from tapvit_jax.train import finetune
from tapvit_jax.train.evaluate import evaluate_indices
from tapvit_jax.train.features import apply_with_features, feature_loss
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.train.step import cut_and_mix, initial_rest, layer_factors, learning_rate
from tests.conftest import realistic, tiny_swin

CLASSES = 5
COUNT = 12
PREPROCESS = Preprocess(8, (0.0,) * 3, (1.0,) * 3)
CONFIG = vit_config(
    image_size=8,
    patch_size=4,
    num_classes=CLASSES,
    depth=1,
    num_heads=2,
    embed_dim=8,
    mlp_ratio=1.0,
)
TWO_BLOCKS = dataclasses.replace(CONFIG, blocks=CONFIG.blocks * 2)
LIKELY = np.array([True, False, True, True, False])
ALL = TrainConfig(
    epochs=3,
    batch_size=4,
    learning_rate=3e-3,
    min_rate=0.1,
    warmup_epochs=0.5,
    layer_decay=0.6,
    weight_decay=0.1,
    label_smoothing=0.1,
    distill=0.5,
    temperature=3.0,
    feature_distill=0.7,
    feature_blocks=(0, -1),
    ema=0.8,
    checkpoint_epochs=9,
    checkpoint_steps=2,
)


def make_params(seed, config=CONFIG):
    shapes = backbone.param_shapes(config)
    return realistic(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes), seed)


def make_data(labels=None):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((COUNT + 9, 8, 8, 3)).astype(np.float32)
    drawn = rng.integers(0, CLASSES, len(images))
    source = MemorySource(images, drawn if labels is None else labels, list("abcde"))
    return TrainData(source, PREPROCESS, np.arange(COUNT), np.arange(COUNT, len(images)))


def make_plan():
    rng = np.random.default_rng(3)
    table = unit_table(CONFIG)
    return Plan(
        CONFIG, {g.key: rng.random(g.shape) < 0.6 for g in table if g.kind in ("mlp", "vo")}
    )


PLAN = make_plan()
PRIOR = np.array([0.5, 2.0, 1.0, 0.2, 3.0])
MASKS = param_masks(CONFIG, unit_masks(PLAN))
TEACHER = Teacher(CONFIG, make_params(5))


def tune(options=ALL, data=None, **changes):
    arguments = {"seed": 1, "teacher": TEACHER, "classes": LIKELY} | changes
    start = arguments.pop("model", Model(CONFIG, make_params(0)))
    return train(start.config, start.params, data or make_data(), options, **arguments)


def assert_trees_close(found, expected, **tolerance):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        # The softmax does not see the keys' biases: their gradients are rounding, nothing else.
        if path[-2:] != ("k", "bias"):
            np.testing.assert_allclose(found[path], leaf, err_msg="/".join(path), **tolerance)


@contextlib.contextmanager
def measured():
    """What train() measures: a list to which every epoch's state comes, as NumPy arrays."""
    kept, measure = [], finetune._OneRun.measure

    def spy(self, state, alive):
        kept.append(jax.tree.map(np.array, state))
        return measure(self, state, alive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune._OneRun, "measure", spy)
        yield kept


@pytest.fixture(scope="module")
def masked():
    """A whole masked run and its states."""
    with measured() as states:
        return tune(masks=MASKS), states


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, images):
    return backbone.apply(config, params, images)


def test_all_options_equal_a_loop_by_hand():
    # The whole set is one batch.
    config = TWO_BLOCKS
    options = dataclasses.replace(ALL, epochs=4, batch_size=COUNT, cutmix=1.0)
    start, teacher = make_params(0, config), make_params(5, config)
    with measured() as states:
        teaching = {"teacher": Teacher(config, teacher), "prior": PRIOR}
        result = tune(options, model=Model(config, start), **teaching)

    data = make_data()
    labels = data.source.labels[:COUNT]
    chosen = np.flatnonzero(LIKELY)
    # The labels' own classes against the device's, one image of each added.
    among = (np.bincount(labels, minlength=CLASSES) + 1) * CLASSES / (COUNT + CLASSES) / PRIOR

    def drawn(epoch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), epoch), 0)
        order = finetune.epoch_order(options, np.arange(COUNT), 1, epoch)
        images, real = jnp.asarray(data.source.images[order]), np.ones(COUNT)
        mix_key = jax.random.fold_in(key, 2)
        assert all((mix_key != used).all() for used in jax.random.split(key))
        images, own, _ = cut_and_mix(1.0, images, real, mix_key)
        hard = np.eye(CLASSES)[labels[order]]
        own = np.asarray(own)[:, None]
        assert 0.3 < own.mean() < 0.9
        return images, (own * hard + (1 - own) * hard[::-1]) * 0.9 + 0.1 / CLASSES

    def soft(logits):
        return jax.nn.log_softmax(logits[:, chosen] / 3.0)

    def network(params, images):
        x, behind = backbone.embed(config, params, images), []
        for i in range(2):
            x = backbone.apply_block(config.block_spec(i), params[f"blocks_{i}"], x)
            behind.append(x)
        return backbone.classify(config, params, x), behind

    def loss(params, images, hard):
        teacher_logits, teacher_features = network(teacher, images)
        logits, features = network(params, images)
        found = 0.5 * -(hard * jax.nn.log_softmax(logits + np.log(among))).sum(axis=1).mean()
        # The prior counts at temperature 1.
        p = jnp.exp(soft(teacher_logits + np.log(PRIOR)))
        found += 0.5 * 9.0 * -(p * soft(logits)).sum(axis=1).mean()
        for s, t in zip(features, teacher_features, strict=True):
            error = ((s - t) ** 2).sum(axis=(1, 2)) / (t**2).sum(axis=(1, 2))
            found += 0.7 * error.mean() / 2
        return found

    def factor(path, update):
        exponents = {"blocks_1": 1, "blocks_0": 2, "norm": 0, "head": 0}
        return update * 0.6 ** exponents.get(path[0].key, 3)

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    # Half an epoch of warm-up rounds to no step at all here.
    rates = optax.cosine_decay_schedule(3e-3, 4, alpha=0.1)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rates, weight_decay=0.1, mask=kernels)
    )

    @jax.jit
    def step(params, moments, images, hard):
        value, found = jax.value_and_grad(loss)(params, images, hard)
        updates, moments = chain.update(found, moments, params)
        updates = jax.tree_util.tree_map_with_path(factor, updates)
        return optax.apply_updates(params, updates), moments, value

    params, moments, average = start, chain.init(start), jax.tree.map(np.float64, start)
    for t in range(1, 5):
        params, moments, value = step(params, moments, *drawn(t))
        d = min(0.8, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.asarray(p), average, params)
        assert result.record[t]["train_loss"] == pytest.approx(float(value), rel=1e-4)
        assert_trees_close(states[t]["params"], params, atol=2e-5)
        assert_trees_close(states[t]["rest"]["ema"], average, atol=2e-5)
    assert np.abs(params["head"]["kernel"] - start["head"]["kernel"]).max() > 5e-3


def test_the_average_is_what_is_evaluated_and_kept(masked):
    result, states = masked
    data = make_data()
    assert result.best_epoch > 0
    for state, row in zip(states, result.record, strict=True):
        found = evaluate_indices(
            CONFIG, state["rest"]["ema"], data.source, data.validation, PREPROCESS, 4
        )
        assert (row["top1"], row["loss"]) == pytest.approx((found.top1, found.loss), rel=1e-6)
    best = states[result.best_epoch]
    for path, leaf in flatten(result.params).items():
        np.testing.assert_array_equal(leaf, flatten(best["rest"]["ema"])[path])
    assert (best["params"]["head"]["kernel"] != result.params["head"]["kernel"]).any()


def test_masked_entries_stay_zero_and_equal_the_reshaped_model(masked):
    _, states = masked
    pruned = {path: np.asarray(mask) == 0 for path, mask in flatten(MASKS).items()}
    assert any(mask.any() for mask in pruned.values())
    for state in states:
        for tree in (state["params"], state["best"], state["rest"]["ema"]):
            for path, leaf in flatten(tree).items():
                assert not leaf[np.broadcast_to(pruned[path], leaf.shape)].any(), path
    with measured() as small:
        tune(model=reshape(Model(CONFIG, make_params(0)), PLAN))
    expected, found = small[-1], states[-1]
    assert_trees_close(reshape_tree(PLAN, found["params"]), expected["params"], atol=1e-4)
    average = reshape_tree(PLAN, found["rest"]["ema"])
    assert_trees_close(average, expected["rest"]["ema"], atol=1e-4)


class StopError(Exception):
    pass


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_interrupted_within_an_epoch_ends_bit_for_bit_the_same(
    masked, tmp_path, monkeypatch, devices
):
    expected, mesh = masked[0], None
    if devices > 1:
        mesh = data_mesh(jax.devices()[:devices])
        one, expected = expected, tune(masks=MASKS, mesh=mesh)
        assert_trees_close(expected.params, one.params, atol=1e-4)
    step, taken = finetune._OneRun.step, []

    def counted(self, state, batch, epoch, i, alive):
        taken.append((epoch, i))
        if len(taken) == 6:
            raise StopError
        return step(self, state, batch, epoch, i, alive)

    monkeypatch.setattr(finetune._OneRun, "step", counted)
    with pytest.raises(StopError):
        tune(masks=MASKS, mesh=mesh, checkpoints=tmp_path / "run")
    found = tune(masks=MASKS, mesh=mesh, checkpoints=tmp_path / "run")
    # Three steps an epoch, a checkpoint behind every second of all: the fourth is the last whole.
    assert taken[6] == (2, 1)
    assert found.record == expected.record
    for path, leaf in flatten(expected.params).items():
        np.testing.assert_array_equal(flatten(found.params)[path], leaf)


FREE = dataclasses.replace(ALL, distill=1.0, choose="teacher")


def test_training_without_labels_measures_against_the_teacher():
    unlabelled = make_data(labels=np.full(COUNT + 9, -1))
    with measured() as states:
        free, labelled = tune(FREE, unlabelled, prior=PRIOR), tune(FREE, prior=PRIOR)
    assert free.record == labelled.record
    assert len({row["loss"] for row in free.record}) == len(free.record)

    images = unlabelled.source.images[unlabelled.validation]
    wanted = forward(CONFIG, TEACHER.params, images) + np.log(PRIOR)
    log_t = np.asarray(jax.nn.log_softmax(wanted[:, LIKELY]))
    for state, row in zip(states, free.record, strict=False):
        logits = forward(CONFIG, state["rest"]["ema"], images)[:, LIKELY]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        kl = (np.exp(log_t) * (log_t - log_p)).sum(axis=1).mean()
        assert row["loss"] == pytest.approx(kl, rel=1e-4)
        assert row["top1"] == pytest.approx((log_p.argmax(1) == log_t.argmax(1)).mean())


def test_the_epoch_is_chosen_by_what_the_device_sees(masked):
    data = make_data()
    labels = data.source.labels[data.validation]
    with measured() as states:
        result = tune(masks=MASKS, prior=PRIOR)
    counts = PRIOR[labels] / (np.bincount(labels, minlength=CLASSES) + 1)[labels]
    counts /= counts.sum()
    for state, row in zip(states, result.record, strict=True):
        logits = forward(CONFIG, state["rest"]["ema"], data.source.images[data.validation])
        loss = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels]
        # Weights have steps of 2^-10.
        assert row["loss"] == pytest.approx((counts * loss).sum(), rel=2e-3)
        right = np.asarray(logits).argmax(axis=1) == labels
        assert row["top1"] == pytest.approx((counts * right).sum(), abs=2e-3)
    plain = masked[0].record[0]
    assert (plain["top1"], plain["loss"]) != (result.record[0]["top1"], result.record[0]["loss"])


def test_a_student_like_its_teacher_agrees_with_it():
    options = dataclasses.replace(FREE, epochs=0)
    (start,) = tune(options, teacher=Teacher(CONFIG, make_params(0))).record
    assert start["top1"] == 1.0
    assert start["loss"] == pytest.approx(0.0, abs=1e-6)
    # With the prior in its biases, it agrees with a teacher that takes it into account.
    moved = make_params(0)
    moved["head"] = moved["head"] | {
        "bias": moved["head"]["bias"] + np.log(PRIOR).astype(np.float32)
    }
    teaching = {"teacher": Teacher(CONFIG, make_params(0)), "prior": PRIOR}
    (start,) = tune(options, model=Model(CONFIG, moved), **teaching).record
    assert (start["top1"], start["loss"]) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_missing_labels_are_refused_where_they_are_read():
    labels = np.append(np.zeros(COUNT, int), np.full(9, -1))
    for prior in (None, PRIOR):
        with pytest.raises(InputError, match="evaluation needs labels"):
            tune(dataclasses.replace(FREE, choose="labels"), make_data(labels), prior=prior)
    with pytest.raises(InputError, match="training on labels needs labels"):
        tune(dataclasses.replace(FREE, distill=0.9), make_data(labels[::-1]))


def by_part(tree):
    """The values of every part of a network; they must all be alike."""
    found = {}
    for path, value in flatten(tree).items():
        found.setdefault(path[0], set()).add(round(value, 6))
    assert all(len(values) == 1 for values in found.values())
    return {name: values.pop() for name, values in found.items()}


def test_layer_factors_of_a_vit():
    config = dataclasses.replace(TWO_BLOCKS, distilled=True)
    assert by_part(layer_factors(config, make_params(0, config), 0.5)) == {
        "patch_embed": 0.125,
        "pos_embed": 0.125,
        "cls_token": 0.125,
        "dist_token": 0.125,
        "blocks_0": 0.25,
        "blocks_1": 0.5,
        "norm": 1.0,
        "head": 1.0,
        "head_dist": 1.0,
    }
    config = dataclasses.replace(CONFIG, pool="mean", class_token=False)
    assert by_part(layer_factors(config, make_params(0, config), 0.5))["fc_norm"] == 1.0


def test_layer_factors_of_a_swin():
    config = tiny_swin()
    assert by_part(layer_factors(config, make_params(0, config), 0.5)) == {
        "patch_embed": 0.0625,
        "patch_norm": 0.0625,
        "blocks_0": 0.125,
        "blocks_1": 0.25,
        "blocks_2": 0.5,
        "norm": 1.0,
        "head": 1.0,
    }
    assert any(path[:2] == ("blocks_2", "merge") for path in flatten(make_params(0, config)))


def test_layer_factors_do_not_depend_on_pruned_blocks():
    params = make_params(0, TWO_BLOCKS)
    del params["blocks_1"]
    assert by_part(layer_factors(TWO_BLOCKS, params, 0.5))["blocks_0"] == 0.25


@pytest.mark.parametrize("kind", ["vit", "mean", "distilled", "swin"])
def test_features_come_with_the_logits(kind):
    changes = {"mean": {"pool": "mean"}, "distilled": {"distilled": True}}.get(kind, {})
    config = tiny_swin() if kind == "swin" else dataclasses.replace(TWO_BLOCKS, **changes)
    params, images = make_params(0, config), make_data().source.images[:3]
    given = (None, (0,), (-1, 0))

    @jax.jit
    def compare(params, images):
        found = [apply_with_features(config, params, images, blocks) for blocks in given]
        first = backbone.apply_blocks(config.first_blocks(1), params, images)
        last = backbone.apply_blocks(config, params, images)
        pooled = backbone.pooled(config, params, images)
        return found, backbone.apply(config, params, images), ([pooled], [first], [first, last])

    found, logits, expected = compare(params, images)
    for (found_logits, features), wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(found_logits, logits, atol=1e-5)
        for one, other in zip(features, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_feature_loss_by_hand():
    student = [np.array([[3.0, 1.0], [0.0, 0.0]]), np.array([[[1.0]], [[2.0]]])]
    teacher = [np.array([[1.0, 1.0], [2.0, 1.0]]), np.array([[[2.0]], [[2.0]]])]
    found = feature_loss(student, teacher)
    np.testing.assert_allclose(found, [(4 / 2 + 1 / 4) / 2, (5 / 5 + 0) / 2])


def linear(config, params, images):
    return images.reshape(len(images), -1)[:, :CLASSES] @ params["kernel"]


LINEAR = {"kernel": np.eye(CLASSES, dtype=np.float32)}


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"feature_blocks": (0, 2)}, {}, "2 is no block of the student, expected -1 to 0"),
        ({"feature_blocks": (-3,)}, {}, "-3 is no block"),
        (
            {},
            {"teacher": Teacher(None, LINEAR, linear)},
            "the teacher is a NoneType, expected a ViT or a Swin",
        ),
        (
            {},
            {"model": Model(None, LINEAR), "forward": linear},
            "the student is a NoneType, expected a ViT or a Swin",
        ),
        (
            {},
            {"teacher": Teacher(tiny_swin(), make_params(0, tiny_swin()))},
            r"student have shapes \(\(5, 8\),\), of the teacher",
        ),
        (
            {"feature_distill": 0.0},
            {"model": Model(None, LINEAR), "forward": linear},
            "layer_decay: the network is a NoneType",
        ),
        ({}, {"teacher": None}, "^distill > 0 needs a teacher"),
        ({"distill": 0.0}, {"teacher": None}, "^feature_distill > 0 needs a teacher"),
        (
            {"distill": 0.0, "feature_distill": 0.0, "choose": "teacher"},
            {"teacher": None},
            "^choose='teacher' needs a teacher",
        ),
        ({"distill": 0.0}, {}, "classes: nothing uses it"),
        ({}, {"classes": np.ones(4, bool)}, r"classes has shape \(4,\), expected \(5,\)"),
        ({}, {"model": Model(CONFIG, LINEAR)}, "^params: .* missing blocks_0/attn/k/bias"),
        ({}, {"teacher": Teacher(CONFIG, LINEAR)}, "^teacher: .* missing blocks_0/attn/k/bias"),
        ({}, {"masks": LINEAR}, "^masks: .* missing blocks_0/attn/k/bias.* unexpected kernel"),
        (
            {},
            {"masks": MASKS | {"head": {"kernel": np.ones((3, 1)), "bias": np.ones(())}}},
            r"head/kernel has shape \(3, 1\), expected one that fits \(8, 5\)$",
        ),
        ({}, {"prior": np.ones(4)}, r"prior has shape \(4,\), expected \(5,\)"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(options, changes, message):
    with pytest.raises(InputError, match=message):
        tune(dataclasses.replace(ALL, **options), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_rate": 1.1},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"feature_distill": -1.0},
        {"feature_distill": float("inf")},
        {"feature_blocks": ()},
        {"feature_blocks": (0.5,)},
        {"ema": 0.0},
        {"ema": 1.0},
        {"choose": "loss"},
    ],
)
def test_bad_options_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        TrainConfig(**changes)


def test_the_cosine_ends_at_the_lowest_rate():
    lengths = jnp.asarray([100, 20], jnp.float32)
    options = TrainConfig(learning_rate=1e-2, min_rate=0.2)
    for step, expected in {0: 0.05, 20: 1.0, 60: 0.6, 100: 0.2, 120: 0.2}.items():
        found = learning_rate(options, jnp.asarray(step), lengths)
        np.testing.assert_allclose(found, 1e-2 * expected, rtol=1e-5)


def test_no_average_is_carried_when_none_is_asked_for():
    assert "ema" not in initial_rest(TrainConfig(), {"a": np.zeros(2)}, 1)
