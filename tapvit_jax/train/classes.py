"""The classes that a device is likely to see, and logits and images weighted by them."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from tapvit_jax.errors import InputError

# Added to the logits of excluded classes: their share of a softmax is exactly 0, and 0 times their
# log-probability is not NaN.
_EXCLUDED = -1e30
# Steps of the weights of validation images.
_VALIDATION_UNIT = 2**10


def likely_classes(
    probabilities: Float[np.ndarray, "n c"], share: float = 0.95
) -> Bool[np.ndarray, "c"]:
    """The fewest classes that hold a share of the teacher's mean prediction.

    q_c = mean over images of p(c | image); classes are taken by falling q until they sum to
    `share`, equal ones by their number.

    Args:
      probabilities: the teacher's predictions on the device's metric or fine-tuning set.
      share: of the predicted mass to keep; 1 keeps every class of any mass.

    Returns:
      True for the classes to distil.

    Raises:
      InputError: no images, rows that are no probabilities, or a share outside (0, 1].

    Source: ours.
    """
    p = check_probabilities(probabilities)
    if not 0 < share <= 1:
        raise InputError(f"share is {share}, expected more than 0, at most 1")
    mean = p.mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    before = np.append(0.0, np.cumsum(mean[order])[:-1])
    mask = np.zeros(len(mean), bool)
    # What rounding leaves of the sum must not count as missing.
    mask[order] = (before < share * mean.sum() * (1 - 1e-9)) & (mean[order] > 0)
    return mask


def check_probabilities(probabilities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Predictions in float64.

    Raises:
      InputError: no images, or rows that are no probabilities.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or 0 in p.shape:
        raise InputError(f"probabilities have shape {p.shape}, expected (images, classes)")
    if not ((p >= 0).all() and np.allclose(p.sum(axis=1), 1.0, atol=1e-3)):
        raise InputError("probabilities are no distributions, expected rows that sum to 1")
    return p


def prior_weights(shares: Float[np.ndarray, "c"], images: int) -> Float[np.ndarray, "c"]:
    """How much likelier each class is on a device than it was to the dense model.

        w_c = prior_c / (1 / classes),   prior_c = (images q_c + 1) / (images + classes)

    Logits z + log w have the posterior under that prior, where the model's own held all classes for
    equally likely. As many images as there are classes, one of each, are added to those seen.

    Args:
      shares: q, from the device's mixture (see `proxy.shares`), or the dense model's mean
        prediction on the device's metric dataset.
      images: how many of the device's they stand for; those that the mean is over.

    Raises:
      InputError: shares that are no distribution, or a negative or infinite number of images.

    Source: label shift (Saerens et al., 2002); the smoothing is ours.
    """
    q = np.asarray(shares, np.float64)
    if q.ndim != 1 or not ((q >= 0).all() and abs(q.sum() - 1.0) <= 1e-3):
        raise InputError("shares are no distribution over classes, expected values that sum to 1")
    if not 0 <= images < math.inf:
        raise InputError(f"images is {images}, expected a finite number, 0 or more")
    return len(q) * (images * q + 1.0) / (images + len(q))


class ClassWeights(NamedTuple):
    """Weights of the classes where a network is trained and compared.

    Attributes:
      classes: in what the network and its teacher predict alike.
      prior: in what the teacher predicts, at temperature 1 whatever the soft labels' is: a network
        that has the prior in its own logits then agrees with its teacher at any temperature.
      labels: in what the network predicts where true labels are its target, see `label_weights`.
      validation: how much an image of each class counts where the epoch is chosen by labels.
    """

    classes: Float[Array, "c"]
    prior: Float[Array, "c"]
    labels: Float[Array, "c"]
    validation: Float[Array, "c"]


def label_weights(
    prior: Float[np.ndarray, "c"], labels: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "c"]:
    """How much likelier each class is among some labelled images than on the device.

        w_c = (C (n_c + 1) / (n + C)) / prior_c

    A network with the device's prior in its logits z has the posterior of the images' own classes
    at z + log w. Learning their labels there leaves the prior in z as it is; at z itself it would
    learn the public images' prior in its place.

    Args:
      prior: see `prior_weights`, whose smoothing this has as well; all above 0.
      labels: of images, n of them of the C classes; others are passed over.

    Source: logit adjustment (Menon et al., 2007.07314), towards the device's prior: ours.
    """
    known = labels[(labels >= 0) & (labels < len(prior))]
    counts = np.bincount(known, minlength=len(prior))
    return len(prior) * (counts + 1.0) / (counts.sum() + len(prior)) / prior


def class_weights(
    classes: Shaped[np.ndarray, "c"] | None,
    prior: Float[np.ndarray, "c"] | None,
    count: int,
    train_labels: Int[np.ndarray, "n"] | None = None,
    validation_labels: Int[np.ndarray, "m"] | None = None,
) -> ClassWeights:
    """Weights of `count` classes, from a mask or weights; None is one for each.

    Args:
      classes: see `ClassWeights`.
      prior: see `ClassWeights`; without one, labels stand for themselves.
      count: how many classes there are.
      train_labels: of the images that are trained on, where they are used.
      validation_labels: of the images that choose the epoch, where they do.

    Raises:
      InputError: another number of classes, negative or infinite weights, or none above 0; a prior
        of 0 where labels are used.
    """
    found = [np.ones(count, np.float32)] * 4
    for i, (name, given) in enumerate({"classes": classes, "prior": prior}.items()):
        if given is None:
            continue
        found[i] = weights = np.asarray(given, np.float32)
        if weights.shape != (count,):
            raise InputError(f"{name} has shape {weights.shape}, expected ({count},)")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise InputError(f"{name} holds no weights, expected 0 or more, one of them above 0")
    weights = ClassWeights(*found)
    if prior is None:
        return weights
    if not (weights.prior.all() or (train_labels is None and validation_labels is None)):
        raise InputError("prior holds a 0, expected more where labels are read")
    if train_labels is not None:
        likelier = label_weights(np.float64(prior), train_labels)
        weights = weights._replace(labels=np.float32(likelier))
    if validation_labels is not None:
        rarer = 1.0 / label_weights(np.float64(prior), validation_labels)
        rarer *= _VALIDATION_UNIT / rarer[np.clip(validation_labels, 0, count - 1)].mean()
        # Whole multiples of a power of two: their sums are exact, in whatever order they are made.
        rarer = np.maximum(np.round(rarer), 1.0) / _VALIDATION_UNIT
        weights = weights._replace(validation=np.float32(rarer))
    return weights


def teacher_logits(
    logits: Float[Array, "b c"], weights: ClassWeights | None, temperature: float = 1.0
) -> Float[Array, "b c"]:
    """`class_logits` of a teacher, whose predictions take the prior into account."""
    if weights is None:
        return class_logits(logits, None, temperature)
    return class_logits(class_logits(logits, weights.prior), weights.classes, temperature)


def class_logits(
    logits: Float[Array, "b c"], classes: Float[Array, "c"] | None, temperature: float = 1.0
) -> Float[Array, "b c"]:
    """Logits z / T + log w, in float32: their softmax is w_c exp(z_c / T) over its sum.

    With weights of 0 and 1 that is the softmax over the chosen classes alone; None is 1 for all.
    """
    logits = logits.astype(jnp.float32) / temperature
    if classes is None:
        return logits
    # The inner choice keeps the log of 0 out of the program.
    log_w = jnp.log(jnp.where(classes > 0, classes, 1.0))
    return logits + jnp.where(classes > 0, log_w, _EXCLUDED)
