"""Likely classes, and labels, soft labels and images weighted by classes."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.train.classes import (
    class_logits,
    class_weights,
    label_weights,
    likely_classes,
    prior_weights,
    teacher_logits,
)
from tapvit_jax.train.evaluate import Teacher, predict


def softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_likely_classes_are_the_fewest_that_hold_the_share(count, seed, share):
    rng = np.random.default_rng(seed)
    p = softmax(3 * rng.standard_normal((5, count)))
    mask, mean = likely_classes(p, share), p.mean(axis=0)
    assert mean[mask].sum() >= share - 1e-6
    assert mean[mask].sum() - mean[mask].min() < share
    assert mean[mask].min() >= mean[~mask].max(initial=0.0)


def test_likely_classes_by_hand():
    p = np.array([[0.9, 0.1, 0.0, 0.0], [0.1, 0.1, 0.8, 0.0]])
    assert likely_classes(p, 0.5).tolist() == [True, False, False, False]
    assert likely_classes(p, 0.9).tolist() == [True, False, True, False]
    assert likely_classes(p, 0.91).tolist() == [True, True, True, False]
    assert likely_classes(p, 1.0).tolist() == [True, True, True, False]
    assert likely_classes(np.full((1, 3), 1 / 3), 0.3).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("p", "share", "message"),
    [
        (np.zeros((0, 3)), 0.9, r"shape \(0, 3\)"),
        (np.ones(3) / 3, 0.9, r"shape \(3,\)"),
        (np.ones((2, 3)), 0.9, "sum to 1"),
        (np.full((2, 3), np.nan), 0.9, "sum to 1"),
        (np.array([[-0.5, 1.5]]), 0.9, "sum to 1"),
        (np.ones((2, 1)), 0.0, "share is 0.0"),
        (np.ones((2, 1)), 1.1, "share is 1.1"),
    ],
)
def test_bad_predictions_are_refused(p, share, message):
    with pytest.raises(InputError, match=message):
        likely_classes(p, share)


@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 5000))
def test_prior_weights_correct_the_posterior(count, seed, images):
    rng = np.random.default_rng(seed)
    shares, logits = rng.dirichlet(np.ones(count)), rng.standard_normal((4, count))
    prior = (images * shares + 1) / (images + count)
    # Bayes' rule, with the uniform prior of the dense model divided out.
    expected = softmax(logits) * prior
    expected /= expected.sum(axis=1, keepdims=True)
    found = softmax(logits + np.log(prior_weights(shares, images)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_prior_weights_by_hand():
    np.testing.assert_allclose(prior_weights(np.array([1.0, 0.0]), 8), [1.8, 0.2])
    np.testing.assert_allclose(prior_weights(np.ones(5) / 5, 7), np.ones(5))
    np.testing.assert_array_equal(prior_weights(np.array([1.0, 0.0]), 0), [1.0, 1.0])


@pytest.mark.parametrize("shares", [[0.5, 0.6], [-0.5, 1.5], [np.nan, 1.0], [[1.0]], []])
def test_shares_that_are_no_distribution_are_refused(shares):
    with pytest.raises(InputError, match="sum to 1"):
        prior_weights(np.array(shares), 3)


@pytest.mark.parametrize("images", [-1, math.nan, math.inf])
def test_shares_of_no_number_of_images_are_refused(images):
    with pytest.raises(InputError, match=r"images is .*, expected a finite number, 0 or more"):
        prior_weights(np.array([0.5, 0.5]), images)


@given(
    st.lists(st.booleans(), min_size=6, max_size=6).filter(any),
    st.integers(0, 10**6),
    st.floats(0.5, 8.0),
)
def test_a_mask_is_the_softmax_over_the_classes_chosen(mask, seed, temperature):
    logits = np.float32(20 * np.random.default_rng(seed).standard_normal((4, 6)))
    weights = class_weights(np.array(mask), None, 6).classes
    found = np.asarray(jax.nn.softmax(class_logits(logits, weights, temperature)))
    expected = softmax(np.float64(logits[:, mask]) / temperature)
    np.testing.assert_allclose(found[:, mask], expected, atol=1e-5)
    assert not found[:, np.logical_not(mask)].any()


def test_a_weight_of_two_counts_a_class_twice():
    logits = np.random.default_rng(0).standard_normal((4, 3))
    found = jax.nn.softmax(class_logits(np.float32(logits), np.float32([1, 2, 0]), 2.0))
    twice = softmax(logits[:, [0, 1, 1]] / 2)
    np.testing.assert_allclose(found[:, 0], twice[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], twice[:, 1] + twice[:, 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (np.ones(4, bool), r"shape \(4,\), expected \(3,\)"),
        (np.zeros(3, bool), "one of them above 0"),
        (np.array([1.0, -1.0, 1.0]), "0 or more"),
        (np.array([1.0, np.inf, 1.0]), "0 or more"),
        (np.array([1.0, np.nan, 1.0]), "0 or more"),
    ],
)
def test_bad_classes_are_refused(classes, message):
    with pytest.raises(InputError, match=message):
        class_weights(classes, None, 3)
    with pytest.raises(InputError, match=message):
        class_weights(None, classes, 3)


@given(st.integers(0, 10**6))
def test_labels_are_learned_as_those_of_images_with_other_classes(seed):
    rng = np.random.default_rng(seed)
    likelihoods, prior = rng.dirichlet(np.ones(6), 5), rng.uniform(0.1, 3.0, 5)
    labels = rng.integers(0, 5, 40)
    # The smoothing is one image of each class.
    shares = (np.bincount(labels, minlength=5) + 1) / 45
    logits = np.log(likelihoods.T * prior)
    weights = class_weights(None, prior, 5, labels)
    posterior = likelihoods.T * shares
    posterior /= posterior.sum(axis=1, keepdims=True)
    found = jax.nn.softmax(class_logits(np.float32(logits), weights.labels))
    np.testing.assert_allclose(found, posterior, rtol=1e-4, atol=1e-6)
    assert (weights.validation == 1).all()
    np.testing.assert_allclose(weights.labels, label_weights(prior, labels), rtol=1e-6)
    np.testing.assert_allclose(
        label_weights(prior, np.append(labels, [7, -1])), weights.labels, 1e-6
    )


def test_validation_counts_classes_as_often_as_the_device_sees_them():
    labels, prior = np.array([0] * 6 + [1] * 2), np.array([0.5, 1.5])
    found = class_weights(None, prior, 2, None, labels)
    assert (found.labels == 1).all()
    # Shares of 7 and 3 tenths with one more of each, for 1 and 3 quarters.
    np.testing.assert_allclose(found.validation[1] / found.validation[0], 7 / 3 * 3, rtol=5e-3)
    assert found.validation[labels].sum() == pytest.approx(8, abs=8 * 2**-11)
    # Sums are exact in any order.
    np.testing.assert_array_equal(found.validation * 2**10 % 1, 0)
    rare = class_weights(None, np.array([1e-9, 2.0]), 2, None, labels)
    assert (rare.validation > 0).all()
    plain = class_weights(np.array([True, False]), None, 2, labels, labels)
    assert (plain.labels == 1).all() and (plain.validation == 1).all()


def test_a_prior_of_nothing_is_refused_where_labels_count():
    prior = np.array([0.0, 1.0])
    assert class_weights(None, prior, 2).prior.tolist() == [0, 1]
    with pytest.raises(InputError, match="prior holds a 0"):
        class_weights(None, prior, 2, np.array([0, 1]))


@given(st.integers(0, 10**6), st.floats(0.5, 8.0), st.booleans())
def test_who_has_the_prior_agrees_with_its_teacher_at_any_temperature(seed, temperature, masked):
    rng = np.random.default_rng(seed)
    logits, prior = rng.standard_normal((4, 5)), rng.uniform(0.1, 3.0, 5)
    weights = class_weights(np.arange(5) % 2 if masked else None, prior, 5)
    found = teacher_logits(np.float32(logits), weights, temperature)
    own = class_logits(np.float32(logits + np.log(prior)), weights.classes, temperature)
    np.testing.assert_allclose(jax.nn.softmax(found), jax.nn.softmax(own), atol=1e-5)
    plain = teacher_logits(np.float32(logits), None, temperature)
    np.testing.assert_allclose(plain, logits / temperature, rtol=1e-5)


def test_predictions_need_no_labels():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((7, 2, 2, 1)).astype(np.float32)
    kernel = rng.standard_normal((4, 3)).astype(np.float32)
    source = MemorySource(images, np.full(7, -1), ["a", "b", "c"])

    def linear(config, params, images):
        return images.reshape(len(images), -1) @ params

    network, preprocess = Teacher(None, kernel, linear), Preprocess(2, (0.0,), (1.0,), channels=1)
    indices = np.array([6, 0, 3, 3, 1])
    found = predict(network, source, indices, preprocess, 2)
    expected = softmax(np.float64(images[indices].reshape(5, 4)) @ kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert likely_classes(found).shape == (3,)
    with pytest.raises(InputError, match="at least one image"):
        predict(network, source, indices[:0], preprocess, 2)


def test_predictions_are_waited_for_while_the_next_are_computed(monkeypatch):
    events = []

    class Pending:
        def __init__(self, images):
            self.rows = len(images)
            events.append("sent")

        def __array__(self, dtype=None, copy=None):
            events.append("fetched")
            return np.full((self.rows, 3), 1 / 3, np.float32)

    monkeypatch.setattr(
        "tapvit_jax.train.evaluate._probabilities", lambda *given: Pending(given[-1])
    )
    source = MemorySource(np.zeros((6, 2, 2, 1), np.float32), np.zeros(6, int), ["a"])
    preprocess = Preprocess(2, (0.0,), (1.0,), channels=1)
    assert predict(Teacher(None, None), source, np.arange(6), preprocess, 2).shape == (6, 3)
    assert events == ["sent", "sent", "fetched", "sent", "fetched", "fetched"]
