"""The Gaussian mixture that a device fits on its private features and uploads (`payload`)."""

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file
from tapvit_jax.proxy.payload import (
    TENSORS,
    CovarianceType,
    check_covariance_type,
    check_extractor,
    payload_bytes,
    read_payload,
)
from tapvit_jax.structs import check_fields

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MAX_COMPONENTS = 256
MAX_DIM = 4096

# Factored in a few milliseconds by one thread.
_FEW_DIMENSIONS = 512

_WEIGHT_TOLERANCE = 1e-3
# Rounding weights that sum to one to float32 moves their sum by less than 2^-24. Rescaling only
# beyond that makes loading idempotent: a payload read and written again keeps its bytes.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class GmmConfig:
    """How a device fits its mixture; the defaults follow the privacy notes (few, coarse, floored).

    Attributes:
      components: numbers of components to try; the lowest BIC decides.
      covariance_type: "diag", "spherical", "tied" (one for all components) or "full".
      variance_floor: relative to the mean feature variance of the private features: no variance (no
        eigenvalue, for tied and full) ends up lower.
      min_members: the least number of images hard-assigned to each component.
      restarts: starts of each fit, of which the best is kept; scikit-learn's `n_init`.
      seed: for these starts.

    Raises:
      InputError: a value out of range.

    Source: ours; scikit-learn's GaussianMixture with the lowest BIC as in TAP-ViTs.
    """

    components: tuple[int, ...] = tuple(range(1, 11))
    covariance_type: CovarianceType = "diag"
    variance_floor: float = 1e-3
    min_members: int = 10
    restarts: int = 3
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        if not self.components or not all(1 <= k <= MAX_COMPONENTS for k in self.components):
            raise InputError(
                f"components is {self.components}, expected one or more whole numbers from 1 to "
                f"{MAX_COMPONENTS}"
            )
        if not 0 < self.variance_floor <= 1:
            raise InputError(
                f"variance_floor is {self.variance_floor}, expected above 0 and at most 1"
            )
        for name in ("min_members", "restarts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, expected a whole number from 0 to 2^32 - 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Gmm:
    """A Gaussian mixture p(x) = sum_k pi_k N(x | mu_k, Sigma_k) in float32.

    The arrays are copied, made float32 and read-only. A mixture built by hand is not checked until
    `validate` is called, which everything that reads one does.

    Attributes:
      weights: pi, of shape (g,).
      means: mu, of shape (g, d).
      covariances: Sigma: diag (g, d), spherical (g,), tied (d, d) or full (g, d, d).
      covariance_type: which of these.
      extractor: fingerprint of the feature extractor, so that the cloud can refuse a mixture fitted
        in another feature space; empty when unknown.

    Raises:
      InputError: an array that does not hold real numbers.

    Source: TAP-ViTs, section 3.
    """

    weights: Float[np.ndarray, "g"]
    means: Float[np.ndarray, "g d"]
    covariances: Float[np.ndarray, "..."]
    covariance_type: CovarianceType
    extractor: str = ""

    def __post_init__(self):
        for name in TENSORS:
            try:
                with np.errstate(over="ignore"):  # infinities are for validate to name
                    value = np.array(getattr(self, name), dtype=np.float32, order="C")
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}: expected an array of real numbers ({error})") from error
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies are made anew: else their arrays could be written to, and would pass as checked.
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def components(self) -> int:
        """The number of components, g."""
        return int(self.weights.shape[0])

    @property
    def dim(self) -> int:
        """The dimension of the features, d."""
        return int(self.means.shape[1])

    @property
    def num_parameters(self) -> int:
        """The number of floats that are uploaded."""
        return int(self.weights.size + self.means.size + self.covariances.size)

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], config: GmmConfig | None = None) -> "Gmm":
        """Fit mixtures with every number of components asked for and keep the lowest BIC.

        See `fit_report` for the rules and the errors; this is its first result.
        """
        return fit_report(features, config)[0]

    @classmethod
    def load(
        cls, path: str | os.PathLike, dim: int | None = None, extractor: str | None = None
    ) -> "Gmm":
        """Read a payload (see `payload`) and check all of it.

        With `dim` or `extractor`, a mixture over other features is refused.

        Raises:
          InputError: missing, too large, not a payload, damaged, or not a proper mixture.
        """
        name = str(path)
        header, tensors = read_payload(Path(path))
        gmm = cls(
            **tensors, covariance_type=header["covariance_type"], extractor=header["extractor"]
        )
        gmm.validate(name)
        if (header["components"], header["dim"]) != gmm.means.shape:
            raise InputError(
                f"{name}: means have shape {gmm.means.shape}, expected the header's "
                f"({header['components']}, {header['dim']})"
            )
        if dim is not None and gmm.dim != dim:
            raise InputError(f"{name}: fitted on {gmm.dim}-dimensional features, expected {dim}")
        if extractor is not None and gmm.extractor != extractor:
            raise InputError(
                f"{name}: fitted on the features of extractor {gmm.extractor or '(unknown)'}, "
                f"expected {extractor or '(unknown)'}"
            )
        weights = gmm.weights.astype(np.float64)
        if abs(weights.sum() - 1) > _ROUNDING:
            gmm = dataclasses.replace(gmm, weights=weights / weights.sum())
        return gmm

    def save(self, path: str | os.PathLike, extractor: str | None = None) -> None:
        """Write the payload atomically, stamped with `extractor` when given.

        Raises:
          InputError: the mixture is not valid or too large, or `path` cannot be written.
        """
        gmm = self if extractor is None else dataclasses.replace(self, extractor=extractor)
        data = gmm.payload_bytes()
        with atomic_file(path) as partial:
            partial.write_bytes(data)

    def payload_bytes(self) -> bytes:
        """Return the payload, byte for byte what `save` writes; its length is the upload's size.

        Raises:
          InputError: the mixture is not valid, or its payload exceeds `payload.MAX_PAYLOAD_BYTES`.
        """
        self.validate("gmm")
        fields = {
            "covariance_type": self.covariance_type,
            "components": self.components,
            "dim": self.dim,
            "extractor": self.extractor,
        }
        return payload_bytes({name: getattr(self, name) for name in TENSORS}, fields)

    def validate(self, name: str) -> None:
        """Check that this is a proper mixture; `name` (a path, say) begins every message.

        Raises:
          InputError: unknown covariance type, a fingerprint that is not hex, wrong shapes, more
            than 256 components or 4096 dimensions, NaN or infinity, negative weights or weights
            that do not sum to 1 within 1e-3, covariances that are not positive (definite).
        """
        if self.__dict__.get("_proper"):
            return
        check_covariance_type(f"{name}: covariance type", self.covariance_type)
        check_extractor(name, self.extractor)
        _check_shapes(name, self)
        _check_numbers(name, self)
        # Nothing in it changes any more, and full covariances take longer to check than to use.
        object.__setattr__(self, "_proper", True)


def fit_report(
    features: Float[np.ndarray, "n d"], config: GmmConfig | None = None
) -> tuple[Gmm, list[dict[str, Any]]]:
    """Fit the mixture of lowest BIC, and return it with the table of what was tried.

    BIC(g) = -2 log L + (free parameters) log n, over `config.components`. A g above
    n // min_members is skipped; a g whose fit leaves a component with fewer than min_members
    hard-assigned images is not eligible. The table has one row for each g that was fitted:
    `components`, `bic` and `eligible`. The fit runs in float64 on centred and scaled features, with
    scikit-learn's `reg_covar` at the variance floor.

    Raises:
      InputError: features that are not a finite (n, d) array with 1 <= d <= 4096, that are all the
        same, or that are too few for the components asked.

    Source: TAP-ViTs, section 3 (mixture, BIC); the floor and the least membership are ours.
    """
    config = GmmConfig() if config is None else config
    data = _check_private_features(features)
    samples, dim = data.shape
    centre = data.mean(axis=0)
    variance = float(np.mean(data.var(axis=0)))
    # Rounding in the mean can leave constant features a little variance, hence the ranges.
    if variance == 0 or not np.ptp(data, axis=0).any():
        raise InputError(
            f"features: all {samples} samples are the same, expected features that vary"
        )
    # Centred and scaled, the sums of squares inside scikit-learn do not cancel.
    scale = math.sqrt(variance)
    scaled = (data - centre) / scale
    candidates = [k for k in sorted(set(config.components)) if k * config.min_members <= samples]
    if not candidates:
        smallest = min(config.components)
        raise InputError(
            f"features: private set smaller than the components asked: {samples} samples, expected "
            f"at least {smallest * config.min_members} ({smallest} components of at least "
            f"{config.min_members} members)"
        )
    table: list[dict[str, Any]] = []
    best: tuple[float, "GaussianMixture"] | None = None
    for components in candidates:
        model = _fit_one(scaled, components, config)
        if model is None:
            table.append({"components": components, "bic": None, "eligible": False})
            continue
        members = np.bincount(model.predict(scaled), minlength=components)
        eligible = bool(members.min() >= config.min_members)
        bic = float(model.bic(scaled)) + 2 * samples * dim * math.log(scale)
        table.append({"components": components, "bic": bic, "eligible": eligible})
        if eligible and (best is None or bic < best[0]):
            best = (bic, model)
    if best is None:
        raise InputError(
            f"features: private set smaller than the components asked: {samples} samples, and each "
            f"fit with {', '.join(map(str, candidates))} components leaves one of them with fewer "
            f"than the {config.min_members} members expected"
        )
    gmm = _unscale(best[1], centre, scale, config)
    gmm.validate("features: the fitted mixture")
    return gmm, table


def _fit_one(
    scaled: Float[np.ndarray, "n d"], components: int, config: GmmConfig
) -> "GaussianMixture | None":
    # Imported here: it takes two seconds, and only devices fit mixtures.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(
        n_components=components,
        covariance_type=config.covariance_type,
        reg_covar=config.variance_floor,
        n_init=config.restarts,
        max_iter=200,
        random_state=config.seed,
    )
    with warnings.catch_warnings():
        # Unfinished or degenerate fits are BIC's and min_members' to judge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return model.fit(scaled)
        except ValueError:
            # An ill-defined covariance: scikit-learn refuses this number of components.
            return None


def _unscale(
    model: "GaussianMixture", centre: Float[np.ndarray, "d"], scale: float, config: GmmConfig
) -> Gmm:
    # A little above the floor, so that rounding to float32 does not end up below it.
    floor = config.variance_floor * (1 + 1e-6)
    covariances = np.asarray(model.covariances_)
    if config.covariance_type in ("diag", "spherical"):
        covariances = np.maximum(covariances, floor)
    else:
        covariances = (covariances + np.swapaxes(covariances, -1, -2)) / 2
        values, vectors = np.linalg.eigh(covariances)
        if values.min() < floor:
            values = np.maximum(values, floor)
            covariances = (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
            covariances = (covariances + np.swapaxes(covariances, -1, -2)) / 2
    weights = np.asarray(model.weights_)
    return Gmm(
        weights=weights / weights.sum(),
        means=centre + scale * np.asarray(model.means_),
        covariances=scale**2 * covariances,
        covariance_type=config.covariance_type,
    )


def _check_private_features(features: Any) -> Float[np.ndarray, "n d"]:
    try:
        data = np.asarray(features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"features: expected an array of real numbers ({error})") from error
    if data.ndim != 2:
        raise InputError(f"features: shape {data.shape}, expected (samples, dimensions)")
    if data.shape[0] == 0 or not 1 <= data.shape[1] <= MAX_DIM:
        raise InputError(
            f"features: shape {data.shape}, expected 1 or more samples of 1 to {MAX_DIM} dimensions"
        )
    with np.errstate(over="ignore"):
        bad = int(np.count_nonzero(~np.isfinite(data.astype(np.float32))))
    if bad:
        raise InputError(
            f"features: {bad} values that are NaN or infinite in float32, expected finite numbers"
        )
    return data


def _covariance_shape(kind: str, components: int, dim: int) -> tuple[int, ...]:
    return {
        "diag": (components, dim),
        "spherical": (components,),
        "tied": (dim, dim),
        "full": (components, dim, dim),
    }[kind]


def _check_shapes(name: str, gmm: Gmm) -> None:
    weights, means, covariances = gmm.weights.shape, gmm.means.shape, gmm.covariances.shape
    if len(weights) != 1 or weights[0] < 1:
        raise InputError(f"{name}: weights have shape {weights}, expected (components,)")
    if len(means) != 2 or means[0] != weights[0] or means[1] < 1:
        raise InputError(
            f"{name}: means have shape {means}, expected ({weights[0]}, dimensions) for "
            f"{weights[0]} weights"
        )
    expected = _covariance_shape(gmm.covariance_type, *means)
    if covariances != expected:
        raise InputError(
            f"{name}: {gmm.covariance_type} covariances have shape {covariances}, "
            f"expected {expected}"
        )
    if means[0] > MAX_COMPONENTS or means[1] > MAX_DIM:
        raise InputError(
            f"{name}: {means[0]} components in {means[1]} dimensions, expected at most "
            f"{MAX_COMPONENTS} and {MAX_DIM}"
        )


def _check_numbers(name: str, gmm: Gmm) -> None:
    for tensor in TENSORS:
        bad = int(np.count_nonzero(~np.isfinite(getattr(gmm, tensor))))
        if bad:
            raise InputError(
                f"{name}: {tensor} hold {bad} NaN or infinite values, expected finite numbers"
            )
    if gmm.weights.min() < 0:
        raise InputError(
            f"{name}: the lowest weight is {gmm.weights.min()}, expected none below zero"
        )
    total = float(gmm.weights.sum(dtype=np.float64))
    if abs(total - 1) > _WEIGHT_TOLERANCE:
        raise InputError(
            f"{name}: the weights sum to {total:.6g}, expected 1 within {_WEIGHT_TOLERANCE}"
        )
    if gmm.covariance_type in ("diag", "spherical"):
        if gmm.covariances.min() <= 0:
            raise InputError(
                f"{name}: the lowest variance is {gmm.covariances.min()}, expected all above zero"
            )
        return
    with one_blas_thread(gmm.dim):
        _check_matrices(gmm, name)


def _check_matrices(gmm: "Gmm", name: str) -> None:
    matrices = gmm.covariances.reshape(-1, gmm.dim, gmm.dim).astype(np.float64)
    for index, matrix in enumerate(matrices):
        skew = np.abs(matrix - matrix.T).max()
        if skew > 1e-5 * np.abs(matrix).max():
            raise InputError(
                f"{name}: covariance {index} is not symmetric (it differs from its transpose by "
                f"{skew:.3g}), expected symmetric and positive definite"
            )
        try:
            np.linalg.cholesky((matrix + matrix.T) / 2)
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"{name}: covariance {index} is not positive definite, expected symmetric and "
                "positive definite"
            ) from error


def one_blas_thread(dim: int) -> AbstractContextManager[Any]:
    """Keep this process's linear algebra to one thread, for matrices of few dimensions.

    Behind a small factorization, the other threads of BLAS go on waiting on all cores for 30 ms, in
    the way of whatever JAX computes then; a large one needs them.

    Source: ours.
    """
    if dim > _FEW_DIMENSIONS:
        return contextlib.nullcontext()
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> ThreadpoolController:
    """NumPy's BLAS library and SciPy's, which is another one."""
    import scipy.linalg  # noqa: F401, loads it

    return ThreadpoolController()
