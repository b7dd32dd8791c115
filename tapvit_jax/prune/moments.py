"""Second moments of features and targets, streamed in float32, and ridge regression from them.

Letters: r rows, f features, t targets.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tapvit_jax import distributed

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, np.inf)
"""Ridge penalties that are tried, as multiples of the mean eigenvalue; infinity changes nothing."""

# Without held-out rows to choose by.
_DEFAULT_PENALTY = 1e-2
_TINY = 1e-30

# On accelerators products of float32 are coarser by default than what is solved from them allows.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Moments(NamedTuple):
    """Weighted sums over rows of features x and targets y, centred.

    Attributes:
      weight: sum of the rows' weights.
      mean_x: weighted mean of the features.
      mean_y: weighted mean of the targets.
      xx: sum of w (x - mean)(x - mean)^T.
      xy: sum of w (x - mean)(y - mean)^T.
    """

    weight: Float[Array, ""]
    mean_x: Float[Array, "f"]
    mean_y: Float[Array, "t"]
    xx: Float[Array, "f f"]
    xy: Float[Array, "f t"]

    def select(self, kept: Int[np.ndarray, "k"]) -> "Moments":
        """The moments of some of the features."""
        rows = self.xx[kept][:, kept]
        return self._replace(mean_x=self.mean_x[kept], xx=rows, xy=self.xy[kept])

    def targets(self, columns: slice) -> "Moments":
        """The moments with some of the targets."""
        return self._replace(mean_y=self.mean_y[columns], xy=self.xy[:, columns])

    def project(self, basis: Float[np.ndarray, "f k"]) -> "Moments":
        """The moments of linear combinations of the features."""
        xx = basis.T @ self.xx @ basis
        return self._replace(mean_x=self.mean_x @ basis, xx=xx, xy=basis.T @ self.xy)

    def with_linear_target(self, weights: Float[np.ndarray, "f t"]) -> "Moments":
        """The same features, with x @ weights for targets."""
        return self._replace(mean_y=self.mean_x @ weights, xy=self.xx @ weights)


def row_moments(
    x: Float[Array, "r f"], y: Float[Array, "r t"], weights: Float[Array, "r"]
) -> Moments:
    """Moments of some rows. Pure and traceable; statistics are float32 whatever the rows are."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    weight = weights.sum()
    shares = weights / jnp.maximum(weight, _TINY)
    mean_x, mean_y = _product(shares, x), _product(shares, y)
    x, y = x - mean_x, y - mean_y
    weighted = (x * weights[:, None]).T
    return Moments(weight, mean_x, mean_y, _product(weighted, x), _product(weighted, y))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both, without loss to cancellation. Serves JAX and NumPy arrays."""
    weight = a.weight + b.weight
    share = b.weight / (weight + _TINY)
    dx, dy = b.mean_x - a.mean_x, b.mean_y - a.mean_y
    scale = a.weight * share
    return Moments(
        weight,
        a.mean_x + share * dx,
        a.mean_y + share * dy,
        a.xx + b.xx + scale * dx[:, None] * dx,
        a.xy + b.xy + scale * dx[:, None] * dy,
    )


def merge_all(parts: Sequence[Moments]) -> Moments:
    """Moments of the rows of all parts."""
    return functools.reduce(merge, parts)


def on_host(moments: Moments) -> Moments:
    """Float64 moments of all devices (the leading axis) and processes, the same on each."""
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(moments))
    whole = merge_all([Moments(*leaves) for leaves in zip(*found, strict=True)])
    if distributed.process_count() == 1:
        return whole
    outer = whole.weight * whole.mean_x[:, None]
    sums = Moments(
        whole.weight,
        whole.weight * whole.mean_x,
        whole.weight * whole.mean_y,
        whole.xx + outer * whole.mean_x,
        whole.xy + outer * whole.mean_y,
    )
    sums = distributed.sum_over_processes(sums)
    weight = np.maximum(sums.weight, _TINY)
    mean_x, mean_y = sums.mean_x / weight, sums.mean_y / weight
    outer = sums.mean_x[:, None]
    return Moments(sums.weight, mean_x, mean_y, sums.xx - outer * mean_x, sums.xy - outer * mean_y)


class Ridge:
    """Ridge regression on features whose moments come in one part or, to choose by, in two.

        minimise sum w |x A + b - y|^2 + penalty s |A - centre|^2,   s = mean eigenvalue of xx

    The penalty is the one of `PENALTIES` with the least squared error on the other part, both ways.
    Dead and duplicate features, or fewer rows than features, leave A where the centre is. Source:
    ours.
    """

    def __init__(self, folds: Sequence[Moments]):
        halves = _seen(folds)
        self._bases, self._curvatures = [], []
        if len(halves) == 2:
            self._bases = [_eigen(fold.xx) for fold in halves]
            for (_, vectors), other in zip(self._bases, reversed(halves), strict=True):
                self._curvatures.append(vectors.T @ other.xx @ vectors)
        self._basis = _eigen(merge_all(folds).xx)

    def solve(
        self, folds: Sequence[Moments], centre: Float[np.ndarray, "f t"]
    ) -> tuple[Float[np.ndarray, "f t"], Float[np.ndarray, "t"]]:
        """A and b for the targets of `folds`, whose features are those of this object."""
        penalty = _DEFAULT_PENALTY
        if self._bases:
            halves = _seen(folds)
            parts = zip(self._bases, self._curvatures, halves, reversed(halves), strict=True)
            errors = sum(_held_out_errors(*part, centre) for part in parts)
            penalty = PENALTIES[int(np.argmin(errors))]
        total = merge_all(folds)
        weights = centre + _shrunk(self._basis, total.xy - total.xx @ centre, penalty)
        return weights, total.mean_y - total.mean_x @ weights


def _seen(folds: Sequence[Moments]) -> list[Moments]:
    return [fold for fold in folds if fold.weight > 0]


def _eigen(xx: Float[np.ndarray, "f f"]) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(xx)
    return np.maximum(values, 0.0), vectors


def _shrunk(
    basis: tuple[np.ndarray, np.ndarray], xy: Float[np.ndarray, "f t"], penalty: float
) -> Float[np.ndarray, "f t"]:
    values, vectors = basis
    return vectors @ (_divisors(values, penalty)[:, None] * (vectors.T @ xy))


def _divisors(values: Float[np.ndarray, "f"], penalty: float) -> Float[np.ndarray, "f"]:
    """What a penalty makes of the eigenvalues' inverses."""
    scale = values.mean() if values.size else 0.0
    if np.isinf(penalty) or scale <= 0:
        return np.zeros_like(values)
    return 1.0 / (values + penalty * scale)


def _held_out_errors(
    basis: tuple[np.ndarray, np.ndarray],
    curvature: Float[np.ndarray, "f f"],
    fitted: Moments,
    other: Moments,
    centre: Float[np.ndarray, "f t"],
) -> Float[np.ndarray, "p"]:
    """Squared error on the other part for every penalty, up to a constant.

    In the eigenbasis of what is fitted a penalty only scales the rows of the solution, by d: all
    products of matrices serve all penalties.

        |x V D a - r|^2 summed = d'(C * a a')d - 2 d'(a * r)1,   C curvature, a unpenalised
    """
    values, vectors = basis
    own = vectors.T @ (fitted.xy - fitted.xx @ centre)
    residual = vectors.T @ (other.xy - other.xx @ centre)
    quadratic, linear = curvature * (own @ own.T), (own * residual).sum(axis=1)
    step = other.mean_x - fitted.mean_x
    miss = other.mean_y - fitted.mean_y - step @ centre
    step = step @ vectors
    errors = []
    for penalty in PENALTIES:
        shrunk = _divisors(values, penalty)
        off = np.square(miss - (step * shrunk) @ own).sum()
        errors.append(shrunk @ quadratic @ shrunk - 2 * shrunk @ linear + other.weight * off)
    return np.array(errors)
