"""Log-densities of the public pool under the mixtures of all devices, in one jitted pass.

For component k with covariance Sigma_k = L_k L_k^T,

    log pi_k + log N(x | mu_k, Sigma_k)
        = log pi_k - d/2 log 2 pi - sum_i log (L_k)_ii - 1/2 || L_k^-1 (x - mu_k) ||^2

The constants and the inverse factors are computed on the host in float64. On the devices the mean
is subtracted before anything is squared: the expanded quadratic would cancel in float32 for
features far from the origin. Pool rows are spread over the mesh axis "data"; each device walks over
its rows in chunks and over the mixtures one by one, so that memory stays bounded by one chunk times
the components of one mixture.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.sharding import AXIS, data_mesh, replicate, shard_rows

# The square of this is finite in float32 and so is everything made of it: a sample further than
# this many standard deviations away gets a log-density of about -5e37 instead of -inf or NaN.
_FURTHEST = 1e19
# Differences are kept where both they and their reciprocals are normal float32 numbers: compilers
# turn divisions into products with the reciprocal, and flush subnormal numbers to zero.
_LARGEST, _SMALLEST = 1e37, 1e-30
# Floats of one chunk's largest intermediate array, (rows, components, dimensions): 32 MiB.
_CHUNK_FLOATS = 2**23

Parameters = dict[str, Float[Array, "..."]]


def log_likelihood(
    gmms: Sequence[Gmm],
    features: Float[Array, "p d"] | Float[np.ndarray, "p d"],
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "v p"]:
    """Compute log p_v(x) = logsumexp_k (log pi_vk + log N(x | mu_vk, Sigma_vk)) of every sample.

    `gmms` holds v mixtures over the same d features, of any covariance types and any numbers of
    components. `chunk` is the number of rows a device handles at a time (default: by memory). The
    values are float32 and always finite; those below about -5e37 are cut off there.

    Raises:
      InputError: no mixture, an improper mixture, mixtures or features of different dimensions,
        features that are empty or hold NaN or infinity.

    Source: TAP-ViTs, section 3; the computation is ours.
    """
    return _evaluate(gmms, features, mesh, chunk, joint=False)


def component_log_likelihood(
    gmms: Sequence[Gmm],
    features: Float[Array, "p d"] | Float[np.ndarray, "p d"],
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> Float[np.ndarray, "v g p"]:
    """Compute log pi_vk + log N(x | mu_vk, Sigma_vk) for every component of every mixture.

    g is the largest number of components; the rows of components that a mixture does not have, or
    whose weight is zero, are -inf, and all other values are finite. Arguments and errors as in
    `log_likelihood`.

    Source: TAP-ViTs, section 3; the computation is ours.
    """
    return _evaluate(gmms, features, mesh, chunk, joint=True)


def check_features(features: Any, dim: int | None = None) -> Float[np.ndarray, "p d"]:
    """Return the pool's features as a float32 array (p, d), checked.

    Raises:
      InputError: not a (p, d) array of finite numbers with p >= 1, or d differs from `dim`.

    Source: ours.
    """
    try:
        with np.errstate(over="ignore"):  # what overflows is infinite, and named below
            data = np.asarray(features, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"features: expected an array of real numbers ({error})") from error
    if data.ndim != 2 or data.shape[0] == 0 or data.shape[1] == 0:
        raise InputError(
            f"features: shape {data.shape}, expected (samples, dimensions), at least one of each"
        )
    if dim is not None and data.shape[1] != dim:
        raise InputError(f"features: {data.shape[1]} dimensions, expected the mixtures' {dim}")
    finite = np.isfinite(data)
    if not finite.all():
        rows = np.flatnonzero(~finite.all(axis=1))
        raise InputError(
            f"features: {rows.size} samples hold NaN or infinity (the first is sample {rows[0]}), "
            "expected finite float32 numbers"
        )
    return data


def _evaluate(
    gmms: Sequence[Gmm], features: Any, mesh: Mesh | None, chunk: int | None, joint: bool
) -> Float[np.ndarray, "..."]:
    if len(gmms) == 0:
        raise InputError("gmms: an empty list, expected at least one mixture")
    for index, gmm in enumerate(gmms):
        gmm.validate(f"gmms[{index}]")
        if gmm.dim != gmms[0].dim:
            raise InputError(
                f"gmms[{index}]: {gmm.dim} dimensions, expected the {gmms[0].dim} of gmms[0]"
            )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}, expected 1 or more")
    data = check_features(features, gmms[0].dim)
    mesh = data_mesh() if mesh is None else mesh
    groups, order = _group(gmms)
    components = max(gmm.components for gmm in gmms)
    if chunk is None:
        chunk = max(1, _CHUNK_FLOATS // (components * gmms[0].dim))
    sharded, rows = shard_rows(data, mesh)
    chunk = min(chunk, sharded.shape[0] // mesh.shape[AXIS])
    placed, places = replicate((groups, order), mesh)
    values = _pool_pass(placed, places, sharded, mesh=mesh, chunk=chunk, joint=joint)
    return np.asarray(values)[..., :rows]


def _group(gmms: Sequence[Gmm]) -> tuple[dict[str, Parameters], np.ndarray]:
    """Stack the mixtures by kind of factor; `order[i]` is where mixture i ends up."""
    kinds = [_kind(gmm) for gmm in gmms]
    groups = {}
    order = np.zeros(len(gmms), np.int32)
    position = 0
    for kind in _KERNELS:
        members = [i for i, found in enumerate(kinds) if found == kind]
        if not members:
            continue
        components = max(gmms[i].components for i in members)
        parts = [_factors(gmms[i], components) for i in members]
        groups[kind] = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        order[members] = np.arange(position, position + len(members))
        position += len(members)
    return groups, order


def _kind(gmm: Gmm) -> str:
    return "diag" if gmm.covariance_type == "spherical" else gmm.covariance_type


def _factors(gmm: Gmm, components: int) -> dict[str, np.ndarray]:
    """Turn one mixture into what the kernels need, padded to `components` of weight zero."""
    found, dim = gmm.means.shape
    extra = components - found
    covariances = gmm.covariances.astype(np.float64)
    result = {}
    if gmm.covariance_type in ("diag", "spherical"):
        if gmm.covariance_type == "spherical":
            covariances = np.repeat(covariances[:, None], dim, axis=1)
        log_det = np.log(covariances).sum(axis=1)
        result["precision"] = np.pad(1 / np.sqrt(covariances), [(0, extra), (0, 0)])
    else:
        symmetric = (covariances + np.swapaxes(covariances, -1, -2)) / 2
        lower = np.linalg.cholesky(symmetric)
        inverse = np.linalg.solve(lower, np.broadcast_to(np.eye(dim), lower.shape))
        diagonal = np.diagonal(lower, axis1=-2, axis2=-1)
        log_det = np.broadcast_to(2 * np.log(diagonal).sum(axis=-1), (found,))
        # Entries of at most one, and the scale apart, so that products cannot overflow.
        scale = np.abs(inverse).max(axis=(-2, -1))
        factor = np.swapaxes(inverse / scale[..., None, None], -1, -2)
        if gmm.covariance_type == "full":
            factor = np.pad(factor, [(0, extra), (0, 0), (0, 0)])
            scale = np.pad(scale, (0, extra))
        result.update(factor=factor, scale=np.asarray(scale))
    weights = gmm.weights.astype(np.float64)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights / weights.sum())
    constant = log_weights - 0.5 * (dim * math.log(2 * math.pi) + log_det)
    result["constant"] = np.pad(constant, (0, extra), constant_values=-np.inf)
    result["means"] = np.pad(gmm.means, [(0, extra), (0, 0)])
    return {key: value.astype(np.float32) for key, value in result.items()}


def _diagonal_kernel(parameters: Parameters, rows: Float[Array, "c d"]) -> Float[Array, "g c"]:
    limit = _FURTHEST / math.sqrt(rows.shape[1])
    differences = rows[None] - parameters["means"][:, None]
    whitened = jnp.clip(
        jnp.clip(differences, -_LARGEST, _LARGEST) * parameters["precision"][:, None],
        -limit,
        limit,
    )
    return parameters["constant"][:, None] - 0.5 * jnp.sum(whitened**2, axis=-1)


def _matrix_kernel(
    equation: str, parameters: Parameters, rows: Float[Array, "c d"]
) -> Float[Array, "g c"]:
    differences = jnp.clip(rows[None] - parameters["means"][:, None], -_LARGEST, _LARGEST)
    # Each difference is brought to unit size before the product, in which large ones would
    # overflow with both signs and leave NaN.
    size = jnp.maximum(jnp.max(jnp.abs(differences), axis=-1), _SMALLEST)
    unit = differences / size[..., None]
    whitened = jnp.einsum(equation, unit, parameters["factor"], precision=jax.lax.Precision.HIGHEST)
    length = jnp.sqrt(jnp.sum(whitened**2, axis=-1))
    scale = jnp.reshape(parameters["scale"], (-1, 1))
    distance = jnp.minimum(size * (scale * length), _FURTHEST)
    return parameters["constant"][:, None] - 0.5 * distance**2


_KERNELS = {
    "diag": _diagonal_kernel,
    "tied": functools.partial(_matrix_kernel, "gcd,de->gce"),
    "full": functools.partial(_matrix_kernel, "gcd,gde->gce"),
}


@functools.partial(jax.jit, static_argnames=("mesh", "chunk", "joint"))
def _pool_pass(
    groups: dict[str, Parameters],
    order: Array,
    features: Float[Array, "p d"],
    *,
    mesh: Mesh,
    chunk: int,
    joint: bool,
) -> Float[Array, "..."]:
    def on_device(
        groups: dict[str, Parameters], order: Array, rows: Float[Array, "r d"]
    ) -> Float[Array, "..."]:
        count, dim = rows.shape
        chunks = jnp.pad(rows, [(0, -count % chunk), (0, 0)]).reshape(-1, chunk, dim)
        values = jax.lax.map(functools.partial(_chunk_values, groups, order, joint), chunks)
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*values.shape[:-2], -1)[..., :count]

    leading = (None, None) if joint else (None,)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(*leading, AXIS),
    )(groups, order, features)


def _chunk_values(
    groups: dict[str, Parameters], order: Array, joint: bool, rows: Float[Array, "c d"]
) -> Float[Array, "..."]:
    most = max(parameters["constant"].shape[1] for parameters in groups.values())
    parts = []
    for kind, kernel in _KERNELS.items():
        if kind not in groups:
            continue

        def one(parameters: Parameters, kernel: Any = kernel) -> Float[Array, "..."]:
            values = kernel(parameters, rows)
            if not joint:
                return jax.nn.logsumexp(values, axis=0)
            missing = most - values.shape[0]
            return jnp.pad(values, [(0, missing), (0, 0)], constant_values=-jnp.inf)

        parts.append(jax.lax.map(one, groups[kind]))
    return jnp.concatenate(parts)[order]
