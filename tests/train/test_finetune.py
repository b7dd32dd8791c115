"""Training: known updates, masks, distillation, the schedule, and interrupted runs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.mask import Plan, param_masks, unit_masks
from tapvit_jax.prune.reshape import reshape, reshape_tree
from tapvit_jax.prune.units import unit_table
from tapvit_jax.train import finetune
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.evaluate import Metrics
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.train.step import augment, cut_and_mix, learning_rate
from tests.conftest import realistic

CLASSES = 3
PIXELS = 4


def linear(config, params, images):
    x = images.reshape(len(images), -1)
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((PIXELS, CLASSES)).astype(np.float32)
    return {"dense": {"kernel": kernel, "bias": rng.standard_normal(CLASSES).astype(np.float32)}}


def make_data(count=12, seed=0, labels=None):
    """Images of 2 x 2 pixels; the first half trains, the other half validates."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((2 * count, 2, 2, 1)).astype(np.float32)
    drawn = rng.integers(0, CLASSES, 2 * count)
    if labels is not None:
        drawn[:count] = labels
    source = MemorySource(images, drawn, [str(c) for c in range(CLASSES)])
    preprocess = Preprocess(2, (0.0,), (1.0,), channels=1)
    return TrainData(source, preprocess, np.arange(count), np.arange(count, 2 * count))


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def assert_trees_equal(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))


@pytest.fixture
def states(monkeypatch):
    """What train() would have kept after every epoch."""
    kept = []

    class Spy:
        def __init__(self, directory, identity):
            pass

        def restore(self, template):
            return None

        def save(self, step, state, record):
            kept.append(jax.tree.map(np.asarray, state))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(finetune, "Checkpoints", Spy)
    return kept


ONE_STEP = TrainConfig(
    epochs=1, batch_size=16, learning_rate=1e-3, schedule="constant", checkpoint_epochs=1
)


@pytest.mark.parametrize(("smoothing", "clip_norm"), [(0.0, 0.05), (0.2, 0.05), (0.0, None)])
def test_the_first_step_is_known_by_hand(states, tmp_path, smoothing, clip_norm):
    # Twelve images in a batch of sixteen: the padding must not count.
    data, params = make_data(), make_params()
    options = dataclasses.replace(
        ONE_STEP, label_smoothing=smoothing, weight_decay=0.1, clip_norm=clip_norm
    )
    result = train(None, params, data, options, seed=0, forward=linear, checkpoints=tmp_path)

    x = np.float64(data.source.images[data.train].reshape(12, PIXELS))
    kernel, bias = np.float64(params["dense"]["kernel"]), np.float64(params["dense"]["bias"])
    p = softmax(x @ kernel + bias)
    targets = np.eye(CLASSES)[data.source.labels[data.train]]
    targets = targets * (1 - smoothing) + smoothing / CLASSES
    assert result.record[1]["train_loss"] == pytest.approx(-(targets * np.log(p)).sum() / 12)

    gradient = {"kernel": x.T @ (p - targets) / 12, "bias": (p - targets).mean(axis=0)}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > 0.05
    limit = norm if clip_norm is None else clip_norm
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        clipped = gradient[name] * limit / norm
        before = np.float64(params["dense"][name])
        update = clipped / (np.abs(clipped) + 1e-8) + decay * before
        (state,) = states
        np.testing.assert_allclose(
            state["params"]["dense"][name], before - 1e-3 * update, rtol=1e-5
        )
        np.testing.assert_allclose(
            state["rest"]["moments"][1].mu["dense"][name], 0.1 * clipped, rtol=1e-4
        )
    assert state["rest"]["step"] == 1


def test_the_warm_up_shortens_the_first_step(states, tmp_path):
    data, params = make_data(), make_params()
    options = dataclasses.replace(ONE_STEP, batch_size=12, warmup_epochs=4.0)
    train(None, params, data, options, seed=0, forward=linear, checkpoints=tmp_path)
    moved = np.abs(states[0]["params"]["dense"]["kernel"] - params["dense"]["kernel"])
    np.testing.assert_allclose(moved, 1e-3 / 4, rtol=1e-2)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 7: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1.0, 50: 1.0}),
        ("cosine", 0, {0: 1.0, 25: (1 + np.sqrt(0.5)) / 2, 50: 0.5, 100: 0.0, 120: 0.0}),
        ("cosine", 20, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0}),
        ("cosine", 100, {0: 0.01, 50: 0.51, 99: 1.0}),
    ],
)
def test_learning_rate(schedule, warmup, expected):
    options = TrainConfig(learning_rate=1e-2, schedule=schedule)
    lengths = jnp.asarray([100, warmup], jnp.float32)
    for step, factor in expected.items():
        found = learning_rate(options, jnp.asarray(step), lengths)
        np.testing.assert_allclose(found, 1e-2 * factor, atol=1e-7)


def test_images_are_shifted_and_mirrored_each_on_its_own():
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    images = np.repeat(image[None], 200, axis=0)
    key = jax.random.key(0)

    def shifted(image):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        return [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]

    mirrored = image[:, ::-1]
    for options, expected in (
        (TrainConfig(), [image]),
        (TrainConfig(flip=True), [image, mirrored]),
        (TrainConfig(shift=1), shifted(image)),
        (TrainConfig(shift=1, flip=True), shifted(image) + shifted(mirrored)),
    ):
        found = np.asarray(augment(options, images, key))
        assert {i.tobytes() for i in found} == {np.ascontiguousarray(i).tobytes() for i in expected}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 5.0]), st.integers(1, 7))
def test_images_are_covered_by_boxes_of_their_partners(seed, alpha, count):
    # Every pixel says whose it is and where.
    numbers = np.arange(count, dtype=np.float32)[:, None, None]
    places = np.arange(64, dtype=np.float32).reshape(8, 8)
    images = np.stack(np.broadcast_arrays(numbers, places), axis=-1)
    # Padding may lie anywhere, and be most of a batch.
    real = np.random.default_rng(seed).integers(0, 2, count).astype(np.float32)
    mixed, own, partners = cut_and_mix(alpha, images, real, jax.random.key(seed))
    mixed = np.asarray(mixed)
    np.testing.assert_array_equal(mixed[..., 1], images[..., 1])
    expected = np.arange(count)
    expected[real > 0] = expected[real > 0][::-1]
    np.testing.assert_array_equal(partners, expected)
    for i, partner in enumerate(expected):
        covered = mixed[i, ..., 0] != i
        assert (mixed[i, ..., 0][covered] == partner).all()
        rows, columns = covered.any(axis=1), covered.any(axis=0)
        assert covered.sum() == rows.sum() * columns.sum()
        # The one in the middle covers itself.
        assert i == partner or own[i] == pytest.approx(1 - covered.mean())


def test_half_of_an_image_is_covered_on_average():
    images = np.zeros((4000, 16, 16, 1), np.float32)
    _, own, _ = cut_and_mix(200.0, images, np.ones(4000), jax.random.key(0))
    # A box of half the area, 0.707 of the side, with its centre anywhere: a share of
    # (1 - 0.707 / 4)^2 of it lies within.
    assert np.asarray(own).mean() == pytest.approx(1 - 0.5 * (1 - 0.5**0.5 / 4) ** 2, abs=0.01)


def tiny_network(seed=0):
    config = vit_config(
        image_size=8, patch_size=4, num_classes=CLASSES, depth=1, num_heads=2, embed_dim=8
    )
    config = dataclasses.replace(config, blocks=(BlockConfig(2, 4, 4, 8),))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    return Model(config, realistic(ones, seed))


def test_masked_training_equals_training_of_the_reshaped_model(states, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((18, 8, 8, 3)).astype(np.float32)
    source = MemorySource(images, rng.integers(0, CLASSES, 18), ["a", "b", "c"])
    preprocess = Preprocess(8, (0.0,) * 3, (1.0,) * 3)
    data = TrainData(source, preprocess, np.arange(12), np.arange(12, 18))
    options = TrainConfig(epochs=3, batch_size=4, weight_decay=0.1, checkpoint_epochs=1)

    model = tiny_network()
    keep = {
        group.key: rng.random(group.shape) < 0.6
        for group in unit_table(model.config)
        if group.kind in ("mlp", "qk", "vo")
    }
    assert all(0.2 < mask.mean() < 0.8 for mask in keep.values())
    plan = Plan(model.config, keep)
    masks = param_masks(model.config, unit_masks(plan))
    small = reshape(model, plan)
    train(model.config, model.params, data, options, seed=1, masks=masks, checkpoints=tmp_path)
    train(small.config, small.params, data, options, seed=1, checkpoints=tmp_path)

    masked, reshaped = states[2], states[5]
    pruned = {path: np.asarray(mask) == 0 for path, mask in flatten(masks).items()}
    adam = masked["rest"]["moments"][1]
    for tree in (masked["params"], masked["best"], adam.mu, adam.nu):
        for path, leaf in flatten(tree).items():
            assert not leaf[np.broadcast_to(pruned[path], leaf.shape)].any(), path
    gathered = flatten(reshape_tree(plan, masked["params"]))
    start = flatten(small.params)
    for path, leaf in flatten(reshaped["params"]).items():
        # The softmax does not see the keys' biases: their gradients are rounding, nothing else.
        if path[-2:] != ("k", "bias"):
            np.testing.assert_allclose(gathered[path], leaf, atol=1e-4, err_msg="/".join(path))
            assert leaf.size == 0 or np.abs(leaf - start[path]).max() > 1e-3


LONG = TrainConfig(
    epochs=6, batch_size=4, learning_rate=0.3, shift=1, flip=True, distill=0.5, checkpoint_epochs=2
)


def long_run(directory=None, **changes):
    arguments = {
        "params": make_params(),
        "data": make_data(seed=7),
        "options": LONG,
        "seed": 5,
        "forward": linear,
        "masks": {"dense": {"kernel": np.float32(np.arange(PIXELS) > 0)[:, None], "bias": 1.0}},
        "teacher": Teacher(None, make_params(7), linear),
        "checkpoints": directory,
    }
    return train(None, **(arguments | changes))


class StopError(Exception):
    pass


def stop_after(last):
    def on_epoch(epoch, metrics):
        if epoch == last:
            raise StopError

    return on_epoch


@pytest.mark.parametrize("stops", [(1,), (3, 5), (6,)])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path, stops):
    expected = long_run()
    assert expected.best_epoch == 1
    directory = tmp_path / "run"
    for stop in stops:
        with pytest.raises(StopError):
            long_run(directory, on_epoch=stop_after(stop))
        # A run that is killed while it saves leaves this behind.
        (directory / "step_000000099.orbax-checkpoint-tmp").mkdir()
    seen, shares = [], []
    found = long_run(
        directory, on_epoch=lambda epoch, _: seen.append(epoch), on_share=shares.append
    )
    kept = stops[-1] // 2 * 2
    assert seen == list(range(kept + 1, 7))
    # What was done before, then three steps an epoch.
    before = [kept / 6] if kept else []
    np.testing.assert_allclose(shares, before + [1 / 18] * 3 * (6 - kept))
    assert found.best_epoch == expected.best_epoch
    assert found.record == expected.record
    assert_trees_equal(found.params, expected.params)
    assert not directory.exists()


def test_an_exception_releases_the_checkpoints(tmp_path, monkeypatch):
    closed = []
    close = Checkpoints.close

    def spy(self, delete=False):
        closed.append(delete)
        close(self, delete)

    monkeypatch.setattr(Checkpoints, "close", spy)
    with pytest.raises(StopError):
        long_run(tmp_path / "run", on_epoch=stop_after(3))
    with pytest.raises(InputError, match="another configuration"):
        long_run(tmp_path / "run", seed=6)
    assert closed == [False, False]
    long_run(tmp_path / "run")
    assert closed == [False, False, True]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(StopError):
        long_run(directory, on_epoch=stop_after(2))
    return directory


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"seed": 6}, [r"seed \(5 there, 6 here\)"]),
        (
            {"options": dataclasses.replace(LONG, learning_rate=0.2)},
            [r"options.learning_rate \(0.3 there, 0.2 here\)"],
        ),
        ({"data": make_data(seed=7, count=11)}, ["source", "train", "validation"]),
        ({"data": make_data(seed=5)}, ["source"]),
        ({"params": make_params(1)}, ["params"]),
        ({"masks": None}, [r"masks \('.*' there, None here\)"]),
        (
            {"masks": {"dense": {"kernel": np.ones((PIXELS, 1), np.float32), "bias": 1.0}}},
            ["masks"],
        ),
        ({"teacher": Teacher(None, make_params(8), linear)}, ["teacher.params"]),
    ],
    ids=["seed", "options", "train", "images", "params", "no_masks", "masks", "teacher"],
)
def test_checkpoints_of_another_run_are_refused(interrupted, changes, fields):
    named = r" \(.* here\), ".join(fields) if len(fields) > 1 else fields[0]
    with pytest.raises(InputError, match=f"run with another configuration; .* differ: {named}"):
        long_run(interrupted, **changes)
    assert (interrupted / "step_000000006").is_dir()


def test_states_survive_checkpoints(tmp_path):
    # Fully pruned widths have arrays without entries.
    state = {"params": make_params() | {"empty": np.zeros((0, 3), np.float32)}, "step": np.int32(7)}
    record = {"epochs": [{"epoch": 2, "top1": 1 / 3, "loss": 0.1}]}
    keeper = Checkpoints(tmp_path / "run", {"seed": 1})
    keeper.save(1, jax.tree.map(np.zeros_like, state), {})
    keeper.save(2, state, record)
    keeper.close()
    keeper = Checkpoints(tmp_path / "run", {"seed": 1})
    found, kept = keeper.restore(jax.tree.map(np.ones_like, state))
    keeper.close()
    assert kept == record
    assert_trees_equal(found, state)


def test_a_file_in_the_way_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(InputError, match="run: cannot hold checkpoints"):
        long_run(tmp_path / "run")


def test_no_epochs_return_the_start(tmp_path):
    options = dataclasses.replace(LONG, epochs=0)
    found = long_run(tmp_path / "run", options=options)
    expected = make_params()
    expected["dense"]["kernel"][0] = 0
    assert_trees_equal(found.params, expected)
    assert found.best_epoch == 0
    assert [row["epoch"] for row in found.record] == [0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("top1", "loss", "best"),
    [
        ([0.5, 0.6, 0.7, 0.4], [1.0, 1.0, 1.0, 1.0], 2),
        ([0.5, 0.6, 0.6, 0.6], [1.0, 0.9, 0.8, 0.9], 2),
        ([0.5, 0.6, 0.6, 0.6], [1.0, 0.8, 0.8, 0.8], 1),
        ([0.5, 0.5, 0.4, 0.3], [1.0, 1.0, 0.1, 0.1], 0),
        ([0.5, 0.4, 0.4, 0.6], [1.0, 1.0, 1.0, 2.0], 3),
    ],
    ids=["accuracy", "loss", "earliest", "start", "last"],
)
def test_the_best_epoch(monkeypatch, top1, loss, best):
    seen = []

    def scripted(config, params, *arguments, **keywords):
        seen.append(jax.tree.map(np.array, params))
        return Metrics(top1[len(seen) - 1], loss[len(seen) - 1], 12)

    monkeypatch.setattr(finetune, "evaluate_indices", scripted)
    options = dataclasses.replace(LONG, epochs=3)
    found = long_run(options=options)
    assert found.best_epoch == best
    assert_trees_equal(found.params, seen[best])
    distinct = {tree["dense"]["kernel"].tobytes() for tree in seen}
    assert len(distinct) == 4
    assert [row["top1"] for row in found.record] == top1
    assert [row["loss"] for row in found.record] == loss


def test_training_learns(tmp_path):
    data = make_data(count=60)
    rule = data.source.images.reshape(120, -1)[:, :CLASSES].argmax(axis=1)
    data = dataclasses.replace(data, source=data.source.with_labels(rule))
    options = TrainConfig(epochs=20, batch_size=16, learning_rate=0.05)
    reported = []
    found = train(
        None,
        make_params(),
        data,
        options,
        seed=0,
        forward=linear,
        on_epoch=lambda epoch, metrics: reported.append((epoch, metrics.top1)),
    )
    assert found.record[found.best_epoch]["top1"] > found.record[0]["top1"] + 0.3
    assert reported == [(row["epoch"], row["top1"]) for row in found.record[1:]]


def test_soft_labels_need_no_labels():
    params, teacher = make_params(), make_params(7)
    options = dataclasses.replace(ONE_STEP, distill=1.0, temperature=3.0)
    unlabelled, labelled = (
        train(
            None,
            params,
            make_data(labels=labels),
            options,
            seed=0,
            forward=linear,
            teacher=Teacher(None, teacher, linear),
        )
        for labels in (-1, None)
    )
    data = make_data()
    x = np.float64(data.source.images[data.train].reshape(12, PIXELS))
    soft = softmax((x @ teacher["dense"]["kernel"] + teacher["dense"]["bias"]) / 3)
    log_p = np.log(softmax((x @ params["dense"]["kernel"] + params["dense"]["bias"]) / 3))
    expected = 3**2 * -(soft * log_p).sum(axis=1).mean()
    assert unlabelled.record[1]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert_trees_equal(unlabelled.params, labelled.params)


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_missing_labels_are_refused(distill):
    options = dataclasses.replace(ONE_STEP, distill=distill)
    labels = [0, 1, -1] * 4
    with pytest.raises(InputError, match="training on labels needs labels"):
        long_run(options=options, data=make_data(labels=labels))


@pytest.mark.parametrize(
    ("place", "options"),
    [(3, {"distill": 0.5, "choose": "teacher"}), (15, {"distill": 1.0, "choose": "labels"})],
    ids=["train", "validation"],
)
def test_labels_beyond_the_classes_are_refused_where_they_are_read(place, options):
    data = make_data()
    labels = np.where(np.arange(24) == place, CLASSES, data.source.labels)
    data = dataclasses.replace(data, source=data.source.with_labels(labels))
    options = dataclasses.replace(ONE_STEP, **options)
    with pytest.raises(
        InputError, match="label 3 is beyond the network's classes, expected 0 to 2"
    ):
        long_run(options=options, data=data)
    other = {"distill": 1.0, "choose": "teacher"}
    assert long_run(options=dataclasses.replace(options, **other), data=data)


@pytest.mark.parametrize("field", ["train", "validation"])
@pytest.mark.parametrize("index", [24, -1])
def test_images_that_the_source_does_not_have_are_refused(field, index):
    data = dataclasses.replace(make_data(), **{field: np.array([0, index])})
    with pytest.raises(InputError, match=f"image indices .*{index}.*, expected 0 to 23"):
        long_run(data=data)


def test_a_shift_out_of_the_image_is_refused():
    data = make_data()
    side = data.preprocess.image_size
    with pytest.raises(InputError, match=f"shift is {side}, expected less than .* side of {side}"):
        long_run(options=dataclasses.replace(ONE_STEP, shift=side), data=data)
    assert long_run(options=dataclasses.replace(ONE_STEP, shift=side - 1), data=data)


def test_a_missing_teacher_is_refused():
    with pytest.raises(InputError, match="distill > 0 needs a teacher"):
        long_run(teacher=None)


def test_an_empty_training_set_is_refused():
    data = dataclasses.replace(make_data(), train=np.zeros(0, np.int64))
    with pytest.raises(InputError, match="at least one image"):
        long_run(data=data)


@pytest.mark.parametrize("batch_size", [2, 16], ids=["in_an_epoch", "after_the_last_step"])
def test_a_diverging_loss_names_the_learning_rate(batch_size):
    options = TrainConfig(epochs=1, batch_size=batch_size, learning_rate=1e38)
    with pytest.raises(InputError, match=r"epoch 1: lower learning_rate \(now 1e\+38\)"):
        train(None, make_params(), make_data(), options, seed=0, forward=linear)


def test_a_start_without_a_loss_is_refused_before_training():
    params = jax.tree.map(lambda leaf: leaf * np.nan, make_params())
    with pytest.raises(InputError, match="validation loss is nan before training"):
        train(None, params, make_data(), ONE_STEP, seed=0, forward=linear)


def test_every_batch_is_augmented_in_its_own_way(monkeypatch):
    original, keys = finetune._step, []

    def spy(*arguments):
        key, epoch, i = arguments[-3:]
        keys.append((key.tobytes(), int(epoch), int(i)))
        return original(*arguments)

    monkeypatch.setattr(finetune, "_step", spy)
    long_run()
    long_run(seed=6)
    assert len(set(keys)) == len(keys) == 2 * LONG.epochs * 3


@pytest.mark.parametrize(("asked", "count"), [(None, 12), (5, 5), (40, 12)])
def test_images_per_epoch(monkeypatch, asked, count):
    original, read = finetune.batches, []

    def spy(source, indices, *arguments, **keywords):
        read.append(list(indices))
        return original(source, indices, *arguments, **keywords)

    monkeypatch.setattr(finetune, "batches", spy)
    options = TrainConfig(epochs=6, batch_size=4, images_per_epoch=asked, learning_rate=1e-3)
    train(None, make_params(), make_data(), options, seed=0, forward=linear)
    epochs = read
    assert len(epochs) == 6
    assert all(len(set(indices)) == len(indices) == count for indices in epochs)
    assert all(a != b for a, b in itertools.pairwise(epochs))
    assert set(itertools.chain.from_iterable(epochs)) == set(range(12))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"checkpoint_epochs": 0},
        {"images_per_epoch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_epochs": -1.0},
        {"weight_decay": -0.1},
        {"label_smoothing": 1.0},
        {"distill": 1.5},
        {"temperature": 0.0},
        {"shift": -1},
        {"clip_norm": 0.0},
        {"patience": 0},
        {"checkpoint_steps": 0},
        {"schedule": "linear"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_bad_options_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        TrainConfig(**changes)


def test_as_published():
    options = TrainConfig.as_published()
    assert (options.learning_rate, options.epochs, options.batch_size) == (1e-5, 50, 64)
    assert (options.schedule, options.weight_decay, options.distill) == ("constant", 0.0, 0.0)
