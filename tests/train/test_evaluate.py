"""Every example counts exactly once."""

import jax
import numpy as np
import pytest

from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.sharding import data_mesh
from tapvit_jax.train import evaluate as module
from tapvit_jax.train.evaluate import Teacher, evaluate, evaluate_indices, predict

COUNT = 7
PREPROCESS = Preprocess(2, (0.0,), (1.0,), channels=1)


def linear(config, params, images):
    return images.reshape(len(images), -1) @ params["kernel"]


@pytest.fixture
def params():
    return {"kernel": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}


@pytest.fixture
def source():
    rng = np.random.default_rng(1)
    images = rng.standard_normal((COUNT, 2, 2, 1)).astype(np.float32)
    return MemorySource(images, rng.integers(0, 3, COUNT), ["a", "b", "c"])


@pytest.mark.parametrize("batch_size", range(1, COUNT + 3))
def test_every_example_counts_once(params, source, batch_size):
    indices = np.array([3, 0, 1, 1, 6, 5, 2, 4])
    logits = np.float64(source.images[indices].reshape(len(indices), -1) @ params["kernel"])
    labels = source.labels[indices]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = evaluate(None, params, batches(source, indices, PREPROCESS, batch_size), linear)
    assert found.count == len(indices)
    assert found.top1 == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert found.loss == pytest.approx(-log_p[np.arange(len(indices)), labels].mean(), rel=1e-5)
    assert 0 < found.top1 < 1


@pytest.mark.parametrize("told", [True, False], ids=["mesh", "accelerators"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_every_example_counts_once_on_any_number_of_devices(
    params, source, monkeypatch, told, batch_size
):
    indices = np.array([3, 0, 1, 1, 6, 5, 2, 4, 2])

    def found(mesh=None):
        given = source, indices, PREPROCESS, batch_size
        metrics = evaluate_indices(None, params, *given, linear, mesh=mesh)
        return metrics, predict(Teacher(None, params, linear), *given, mesh=mesh)

    (expected, rows), used = found(), []
    spread = module.shard_rows
    monkeypatch.setattr(module, "shard_rows", lambda a, m: used.append(m.size) or spread(a, m))
    if not told:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    metrics, shared_rows = found(data_mesh(jax.devices()[:3]) if told else None)
    assert set(used) == {3 if told else len(jax.devices())}
    assert (metrics.count, metrics.top1) == (len(indices), expected.top1)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_allclose(shared_rows, rows, rtol=1e-5)


def test_shares_of_the_work_are_told_while_few_batches_wait(params, source):
    read, told, waiting = [], [], []

    def reading():
        for batch in batches(source, np.arange(COUNT), PREPROCESS, 2):
            read.append(batch)
            yield batch

    def tell(count):
        told.append(count)
        waiting.append(len(read) - len(told))

    evaluate(None, params, reading(), linear, on_batch=tell)
    assert told == [2, 2, 2, 1]
    assert waiting == [1, 1, 1, 0]
    given, shares = (source, np.array([3, 3, 0, 1, 2]), PREPROCESS, 3), []
    evaluate_indices(None, params, *given, linear, on_share=shares.append)
    predict(Teacher(None, params, linear), *given, on_share=shares.append)
    np.testing.assert_allclose(shares, [0.6, 0.4, 0.6, 0.4])


def test_an_example_without_label_is_refused(params, source):
    labels = np.where(np.arange(COUNT) == 5, -1, source.labels)
    unlabelled = source.with_labels(labels)
    with pytest.raises(InputError, match="evaluation needs labels"):
        evaluate(None, params, batches(unlabelled, np.arange(COUNT), PREPROCESS, 4), linear)
    known = np.array([0, 1, 2, 3, 4, 6])
    assert evaluate(None, params, batches(unlabelled, known, PREPROCESS, 4), linear).count == 6


def test_a_label_beyond_the_classes_is_refused(params, source):
    labels = np.where(np.arange(COUNT) == 5, 3, source.labels)
    foreign = MemorySource(source.images, labels, ["a", "b", "c", "d"])
    with pytest.raises(InputError, match="1 of 7 labels are beyond the network's classes"):
        evaluate(None, params, batches(foreign, np.arange(COUNT), PREPROCESS, 4), linear)


def test_padding_may_lack_labels(params, source):
    batch = {
        "image": source.images[:3],
        "label": np.array([source.labels[0], -1, source.labels[2]]),
        "mask": np.float32([1, 0, 1]),
    }
    assert evaluate(None, params, [batch], linear).count == 2


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_evaluate_is_refused(params, source, rows):
    empty = {
        "image": source.images[:2],
        "label": source.labels[:2],
        "mask": np.zeros(2, np.float32),
    }
    with pytest.raises(InputError, match="at least one example"):
        evaluate(None, params, [empty][:rows], linear)
