"""How often a device sees each class, from nothing but its mixture.

The dense model names the classes of public images; no labels are needed. Each class becomes a
Gaussian in the space of the features, all with one covariance. A device's shares are then the
weights under which these Gaussians explain the samples of its mixture.

Letters: n images, m samples, c classes, d dimensions of the features.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

from tapvit_jax.errors import InputError
from tapvit_jax.proxy.density import check_features
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.train.classes import check_probabilities

# Samples of a mixture that stand for it.
_SAMPLES = 4096

# The estimate hardly changes from 20 images a class on.
_IMAGES_PER_CLASS = 64
# As if one image of the whole pool belonged to every class: one that the model never names is like
# the pool.
_POOL_IMAGES = 1.0
# Of the covariance between dimensions, for fewer images than these describe.
_SHRINKAGE = 0.1
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class ClassGaussians:
    """The classes in the space of the features: N(mu_c, Sigma), as `fit_classes` finds them.

    Attributes:
      means: mu_c.
      precision: the inverse of Sigma.
    """

    means: Float[np.ndarray, "c d"]
    precision: Float[np.ndarray, "d d"]

    def log_densities(self, points: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m c"]:
        """log N(x | mu_c, Sigma), but for what is the same for all classes."""
        # Around the classes, so that large features all alike cost no digits.
        centre = self.means.mean(axis=0)
        means = self.means - centre
        turned = self.precision @ means.T
        return (points - centre) @ turned - 0.5 * np.einsum("cd,dc->c", means, turned)


def rows_for_classes(rows: int, classes: int, seed: int = 0) -> Int[np.ndarray, "n"]:
    """Which of a pool's rows are enough for `fit_classes`, in random order. Source: ours."""
    order = np.random.default_rng([seed, rows]).permutation(rows)
    return order[: _IMAGES_PER_CLASS * classes]


def fit_classes(
    features: Float[np.ndarray, "n d"], probabilities: Float[np.ndarray, "n c"]
) -> ClassGaussians:
    """Gaussians of the classes, every image counted for each class as much as the model says.

        mu_c = sum_i p_ic x_i / sum_i p_ic,   Sigma = sum_ic p_ic (x_i - mu_c) (x_i - mu_c)^T / n

    with the off-diagonal part of Sigma shrunk by a tenth, and one image like the whole pool more in
    every class.

    Args:
      features: of public images of all classes.
      probabilities: the dense model's predictions on them.

    Raises:
      InputError: features that are not finite, rows that are no probabilities, or another number
        of them.

    Source: linear discriminant analysis with soft labels (ours).
    """
    x = check_features(features).astype(np.float64)
    p = check_probabilities(probabilities)
    if len(p) != len(x):
        raise InputError(f"{len(x)} rows of features with {len(p)} of probabilities")
    centre = x.mean(axis=0)
    # Centred, the sums of squares do not cancel.
    x = x - centre
    mass = p.sum(axis=0)
    means = (p.T @ x) / (mass + _POOL_IMAGES)[:, None]
    products = means.T @ (p.T @ x)
    scatter = x.T @ x - products - products.T + (means * mass[:, None]).T @ means
    covariance = scatter / len(x)
    variances = np.diag(np.diag(covariance))
    covariance = covariance + _SHRINKAGE * (variances - covariance)
    floor = _FLOOR * np.trace(covariance) / len(covariance) + np.finfo(np.float32).tiny
    precision = np.linalg.inv(covariance + floor * np.eye(len(covariance)))
    return ClassGaussians(means + centre, (precision + precision.T) / 2)


def class_shares(
    classes: ClassGaussians, points: Float[np.ndarray, "m d"], *, steps: int = 3
) -> Float[np.ndarray, "c"]:
    """The classes' shares in a sample of features.

        q_c <- mean over x of q_c N(x | c) / sum_j q_j N(x | j),   from q_c = 1 / classes

    Every step raises the likelihood of the sample. A few are better than all: Gaussians are not
    what the classes are, and the most likely shares soon leave out classes that are there.

    Args:
      classes: see `fit_classes`.
      points: features of images, or samples of a mixture.
      steps: of expectation maximisation.

    Raises:
      InputError: points that are not finite or of other dimensions, or no step.

    Source: label shift by expectation maximisation (Saerens et al., 2002), on features, stopped
    early (ours).
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
    found, (count, dim) = check_features(points), classes.means.shape
    if found.shape[1] != dim:
        raise InputError(f"points have {found.shape[1]} dimensions, expected the classes' {dim}")
    log_p = classes.log_densities(found.astype(np.float64))
    shares = np.full(count, 1.0 / count)
    for _ in range(steps):
        with np.errstate(divide="ignore"):  # a share that is 0 stays so
            shares = softmax(log_p + np.log(shares), axis=1).mean(axis=0)
    return shares


def mixture_shares(gmm: Gmm, classes: ClassGaussians, *, seed: int = 0) -> Float[np.ndarray, "c"]:
    """The classes' shares on the device that a mixture is from: `class_shares` of its samples.

    Raises:
      InputError: an improper mixture, or one in other dimensions than the classes.

    Source: ours.
    """
    gmm.validate("gmm")
    return class_shares(classes, sample_mixture(gmm, _SAMPLES, seed))


def sample_mixture(gmm: Gmm, count: int, seed: int = 0) -> Float[np.ndarray, "m d"]:
    """Samples of a mixture of any covariance type."""
    rng = np.random.default_rng(seed)
    weights = gmm.weights.astype(np.float64)
    chosen = rng.choice(gmm.components, count, p=weights / weights.sum())
    noise = rng.standard_normal((count, gmm.dim))
    covariances = gmm.covariances.astype(np.float64)
    if gmm.covariance_type in ("diag", "spherical"):
        deviations = np.sqrt(covariances).reshape(gmm.components, -1)
        return gmm.means[chosen] + deviations[chosen] * noise
    factors = np.linalg.cholesky(np.broadcast_to(covariances, (gmm.components, gmm.dim, gmm.dim)))
    found = gmm.means[chosen].astype(np.float64)
    for k, factor in enumerate(factors):
        found[chosen == k] += noise[chosen == k] @ factor.T
    return found
