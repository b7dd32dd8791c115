"""Many runs in one program end as each of them would have ended alone."""

import dataclasses

import jax
import numpy as np
import pytest

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.mask import Plan, param_masks, unit_masks
from tapvit_jax.prune.units import unit_table
from tapvit_jax.sharding import data_mesh
from tapvit_jax.train import variants as module
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.train.variants import Variant, regroup, train_variants
from tests.conftest import realistic

CLASSES = 3
PREPROCESS = Preprocess(8, (0.0,) * 3, (1.0,) * 3)
CONFIG = dataclasses.replace(
    vit_config(image_size=8, patch_size=4, num_classes=CLASSES, depth=1, num_heads=2, embed_dim=8),
    blocks=(BlockConfig(2, 4, 4, 8),),
)
OPTIONS = TrainConfig(
    epochs=4,
    batch_size=4,
    learning_rate=3e-3,
    warmup_epochs=0.5,
    weight_decay=0.1,
    distill=0.5,
    shift=1,
    flip=True,
    cutmix=0.5,
    patience=2,
    checkpoint_epochs=2,
)


def make_source(count=60):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 8, 8, 3)).astype(np.float32)
    return MemorySource(images, rng.integers(0, CLASSES, count), ["a", "b", "c"])


def make_params(seed):
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(CONFIG))
    return realistic(ones, seed)


def make_masks(seed):
    rng = np.random.default_rng(seed)
    keep = {
        group.key: rng.random(group.shape) < 0.6
        for group in unit_table(CONFIG)
        if group.kind in ("mlp", "qk")
    }
    return param_masks(CONFIG, unit_masks(Plan(CONFIG, keep)))


def make_variants():
    """Four runs of 2, 4, 3 and 1 steps an epoch; one has no mask."""
    rng = np.random.default_rng(1)
    return [
        Variant(
            params=make_params(v % 2),
            train=rng.permutation(40)[:size],
            validation=40 + rng.permutation(20)[: 5 + v],
            masks=None if v == 2 else make_masks(v),
            seed=10 + v,
        )
        for v, size in enumerate((8, 14, 11, 3))
    ]


TEACHER = Teacher(CONFIG, make_params(5))


def alone(variant, options=OPTIONS, **arguments):
    data = TrainData(make_source(), PREPROCESS, variant.train, variant.validation)
    return train(
        CONFIG,
        variant.params,
        data,
        options,
        seed=variant.seed,
        masks=variant.masks,
        teacher=TEACHER,
        **arguments,
    )


def together(variants, options=OPTIONS, **arguments):
    arguments = {
        "mesh": None if jax.process_count() > 1 else data_mesh(jax.devices()[:2])
    } | arguments
    return train_variants(
        CONFIG, variants, make_source(), PREPROCESS, options, teacher=TEACHER, **arguments
    )


@pytest.fixture(scope="module")
def sequential():
    return [alone(variant) for variant in make_variants()]


def assert_close(found, expected):
    assert found.best_epoch == expected.best_epoch
    assert len(found.record) == len(expected.record)
    for one, other in zip(found.record, expected.record, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    tree = flatten(expected.params)
    for path, leaf in flatten(found.params).items():
        # The softmax does not see the keys' biases: their gradients are rounding, nothing else.
        if path[-2:] != ("k", "bias"):
            np.testing.assert_allclose(leaf, tree[path], atol=1e-4, err_msg="/".join(path))


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_variants_end_as_sequential_runs(sequential, devices):
    # Four variants do not fill three devices, and are fewer than eight.
    seen, shares = [], []
    found = together(
        make_variants(),
        mesh=data_mesh(jax.devices()[:devices]),
        on_epoch=lambda v, epoch, _: seen.append((v, epoch)),
        on_share=shares.append,
    )
    for one, other in zip(found, sequential, strict=True):
        assert_close(one, other)
    lengths = [len(result.record) for result in sequential]
    assert len(set(lengths)) > 1, "some runs should stop early"
    assert {result.best_epoch for result in sequential} != {0}
    assert sorted(seen) == [(v, e) for v, n in enumerate(lengths) for e in range(1, n)]
    np.testing.assert_allclose(sum(shares), (max(lengths) - 1) / OPTIONS.epochs)


def test_masked_entries_stay_zero():
    variants = make_variants()
    for variant, result in zip(variants, together(variants), strict=True):
        if variant.masks is not None:
            masks = flatten(variant.masks)
            for path, leaf in flatten(result.params).items():
                pruned = np.broadcast_to(np.asarray(masks[path]) == 0, leaf.shape)
                assert not leaf[pruned].any(), path


EVERYTHING = dataclasses.replace(
    OPTIONS,
    min_rate=0.1,
    layer_decay=0.7,
    distill=1.0,
    feature_distill=0.5,
    ema=0.8,
    choose="teacher",
    checkpoint_epochs=9,
    checkpoint_steps=3,
)


def restricted_variants():
    """Two runs, one with masks and likely classes, one with neither."""
    _, masked, plain, _ = make_variants()
    prior = np.array([0.5, 1.0, 2.0])
    return [dataclasses.replace(masked, classes=np.array([True, False, True]), prior=prior), plain]


def test_variants_with_every_option_end_as_sequential_runs(tmp_path, monkeypatch):
    source = make_source().with_labels(np.full(60, -1))
    monkeypatch.setattr(f"{__name__}.make_source", lambda: source)
    variants = restricted_variants()
    found = together(variants, EVERYTHING)
    for variant, one in zip(variants, found, strict=True):
        soft = {"classes": variant.classes, "prior": variant.prior}
        assert_close(one, alone(variant, EVERYTHING, **soft))
        if variant.masks is not None:
            masks = flatten(variant.masks)
            for path, leaf in flatten(one.params).items():
                assert not leaf[np.broadcast_to(np.asarray(masks[path]) == 0, leaf.shape)].any()
    assert {result.best_epoch for result in found} != {0}

    # And interrupted within an epoch, bit for bit.
    step, taken = module._ManyRuns.step, []

    def counted(self, state, batch, epoch, i, alive):
        taken.append((epoch, i))
        if len(taken) == 8:
            raise StopError
        return step(self, state, batch, epoch, i, alive)

    monkeypatch.setattr(module._ManyRuns, "step", counted)
    with pytest.raises(StopError):
        together(variants, EVERYTHING, checkpoints=tmp_path / "run")
    again = together(variants, EVERYTHING, checkpoints=tmp_path / "run")
    assert taken[8] == (2, 2)
    for one, other in zip(again, found, strict=True):
        assert one.record == other.record
        for path, leaf in flatten(other.params).items():
            np.testing.assert_array_equal(flatten(one.params)[path], leaf)


def test_variants_learn_labels_under_their_own_prior():
    options = dataclasses.replace(OPTIONS, distill=0.5, patience=None)
    variants = restricted_variants()
    moved, plain = together(variants, options)
    told = {"classes": variants[0].classes, "prior": variants[0].prior}
    assert_close(moved, alone(variants[0], options, **told))
    assert_close(plain, alone(variants[1], options))
    # Labels and validation, not the teacher alone: a run without the prior goes elsewhere.
    other = alone(variants[0], options, classes=variants[0].classes)
    assert abs(moved.record[0]["loss"] - other.record[0]["loss"]) > 1e-3


class StopError(Exception):
    pass


@pytest.mark.parametrize("steps", [None, 3])
def test_interrupted_variants_end_as_if_nothing_had_happened(tmp_path, monkeypatch, steps):
    options = dataclasses.replace(OPTIONS, checkpoint_steps=steps)
    expected = together(make_variants(), options)
    taken, step = [], module._ManyRuns.step

    def counted(self, state, batch, epoch, i, alive):
        taken.append((epoch, i))
        if len(taken) == 11:
            raise StopError
        return step(self, state, batch, epoch, i, alive)

    monkeypatch.setattr(module._ManyRuns, "step", counted)
    with pytest.raises(StopError):
        together(make_variants(), options, checkpoints=tmp_path / "run")
    stopped = len(taken)
    found = together(make_variants(), options, checkpoints=tmp_path / "run")
    # Four steps an epoch: 9 is within the third one.
    assert taken[stopped] == ((3, 1) if steps else (3, 0))
    for one, other in zip(found, expected, strict=True):
        assert one.record == other.record
        for path, leaf in flatten(other.params).items():
            np.testing.assert_array_equal(flatten(one.params)[path], leaf)
    assert not (tmp_path / "run").exists()


def test_results_that_cannot_be_saved_cost_no_training(tmp_path, monkeypatch):
    def full(results):
        raise StopError

    with pytest.raises(StopError):
        together(make_variants(), checkpoints=tmp_path / "run", on_results=full)
    monkeypatch.setattr(module._ManyRuns, "step", lambda *_: pytest.fail("a step again"))
    saved = []
    found = together(make_variants(), checkpoints=tmp_path / "run", on_results=saved.extend)
    assert saved == found and len(found) == len(make_variants())
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_variant_is_refused(tmp_path):
    def stop(v, epoch, metrics):
        if epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        together(make_variants(), checkpoints=tmp_path / "run", on_epoch=stop)
    other = make_variants()
    other[1] = dataclasses.replace(other[1], seed=99)
    with pytest.raises(InputError, match=r"differ: variants.1.seed \(11 there, 99 here\)"):
        together(other, checkpoints=tmp_path / "run")


def test_a_finished_variant_reads_no_more_images(monkeypatch):
    read, load = [], MemorySource.load

    def spy(self, indices, preprocess):
        read.append(np.asarray(indices))
        return load(self, indices, preprocess)

    monkeypatch.setattr(MemorySource, "load", spy)
    results = together(make_variants())
    lengths = [len(result.record) for result in results]
    expected = sum(
        len(v.train) * (n - 1) + len(v.validation) * n
        for v, n in zip(make_variants(), lengths, strict=True)
    )
    assert sum(map(len, read)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": np.zeros(0, int)}, "variant 1: training needs at least one image"),
        ({"validation": np.zeros(0, int)}, "variant 1: evaluation needs at least one example"),
        ({"train": np.array([60])}, "expected 0 to 59"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to"),
        ({"params": {"other": np.zeros(3)}}, "variant 1: has parameters of other shapes"),
        ({"masks": {"other": np.ones(3)}}, "variant 1: masks: .* missing blocks_0/.* unexpected"),
        ({"classes": np.ones(4, bool)}, r"variant 1: classes has shape \(4,\), expected \(3,\)"),
    ],
)
def test_bad_variants_are_refused(change, message):
    variants = make_variants()
    variants[1] = dataclasses.replace(variants[1], **change)
    with pytest.raises(InputError, match=message):
        together(variants)


def test_missing_labels_are_refused():
    source = make_source()
    unlabelled = source.with_labels(np.where(np.arange(60) >= 40, -1, source.labels))
    with pytest.raises(InputError, match="variant 0: evaluation needs labels"):
        train_variants(CONFIG, make_variants(), unlabelled, PREPROCESS, OPTIONS, teacher=TEACHER)


def test_variants_that_diverge_end_alone(sequential, tmp_path, monkeypatch):
    variants, losses, calls = make_variants(), module._ManyRuns.losses, []
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variants[1].params)
    variants[1] = dataclasses.replace(variants[1], params=broken)

    def diverging(self, state):
        calls.append(1)
        found = np.array(losses(self, state))
        if len(calls) == 2:
            found[0] = np.nan
        return found

    def stop(v, epoch, metrics):
        assert v > 1 or (v, epoch) == (0, 1)
        if epoch == 3:
            raise StopError

    # Interrupted behind the checkpoint that knows of both failures.
    monkeypatch.setattr(module._ManyRuns, "losses", diverging)
    with pytest.raises(StopError):
        together(variants, checkpoints=tmp_path / "run", on_epoch=stop)
    first, second, *others = together(variants, checkpoints=tmp_path / "run")
    assert len(calls) > 3
    assert isinstance(first, InputError) and isinstance(second, InputError)
    assert "training loss became nan" in str(first) and "in epoch 2: lower" in str(first)
    assert "validation loss is nan before training" in str(second)
    for found, expected in zip(others, sequential[2:], strict=True):
        assert_close(found, expected)


def test_variants_that_all_diverge_end_at_once():
    options = dataclasses.replace(OPTIONS, learning_rate=1e38, warmup_epochs=0.0)
    seen = []
    found = together(make_variants(), options, on_epoch=lambda *row: seen.append(row))
    assert seen == [] and all("in epoch 1: lower learning_rate" in str(one) for one in found)


def test_no_variants_and_no_epochs():
    assert together([]) == []
    found = together(make_variants(), dataclasses.replace(OPTIONS, epochs=0))
    assert [result.best_epoch for result in found] == [0] * 4


def test_regroup():
    rows = np.arange(12).reshape(12, 1)
    stream = [rows[:5], rows[5:7], rows[7:]]
    found = list(regroup(stream, [2, 0, 4, 6]))
    assert found[1] is None
    np.testing.assert_array_equal(np.concatenate([found[0], *found[2:]]), rows)
    assert [len(found[i]) for i in (0, 2, 3)] == [2, 4, 6]
