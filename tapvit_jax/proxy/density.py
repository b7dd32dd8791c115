"""Log-densities of the public pool under the mixtures of all devices, in one jitted pass.

For component k with covariance Sigma_k = L_k L_k^T,

    log pi_k + log N(x | mu_k, Sigma_k)
        = log pi_k - d/2 log 2 pi - sum_i log (L_k)_ii - 1/2 || L_k^-1 (x - mu_k) ||^2

The constants and the inverse factors are computed on the host in float64. Where the spread of the
pool allows it, all distances come from matrix products: L_k^-1 (x - c) - L_k^-1 (mu_k - c) for full
and tied covariances, [y^2, y] [1 / s^2, -2 m / s^2] with y = x - c, m = mu - c for diagonal ones, c
being a common centre. These lose digits to cancellation as (|x - c| + |mu - c|) / sigma grows, and
1 / s^2 may overflow; from a bound of either on, a mixture is evaluated from the differences
x - mu_k themselves. Pool rows are spread over the mesh axis "data"; each device walks over its rows
in chunks, so that memory stays bounded.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from scipy.linalg import lapack

from tapvit_jax.errors import InputError
from tapvit_jax.proxy.gmm import Gmm, one_blas_thread
from tapvit_jax.sharding import AXIS, data_mesh, replicate, shard_rows

# The square of this is finite in float32 and so is everything made of it: a sample further than
# this many standard deviations away gets a log-density of about -5e37 instead of -inf or NaN.
_FURTHEST = 1e19
# Differences are kept where both they and their reciprocals are normal float32 numbers: compilers
# turn divisions into products with the reciprocal, and flush subnormal numbers to zero.
_LARGEST, _SMALLEST = 1e37, 1e-30
# Floats of one chunk's largest intermediate array: 4 MiB stay in the processor's caches.
_CHUNK_FLOATS = 2**20
# Rows of a chunk are a multiple of this: each output line then ends with a line of the cache.
_ROUND = 16
# And of the differences of its rows and all means, where they are needed: 32 MiB.
_DIFFERENCE_FLOATS = 2**23
# Most rows of a chunk, however few mixtures there are: more take longer, each of them.
_MOST_ROWS = 3072
# Largest sum_j (|x_j - c_j| + |mu_j - c_j|)^2 (Sigma^-1)_jj for which products are exact enough:
# the expanded square errs by about 2^-24 of it (1e-3), the whitened difference z by 2^-24 of its
# root, hence its square by 1e-4 |z|.
_SPREAD = {"diag": 2.0**14, "tied": 2.0**20, "full": 2.0**20}
# Largest 1 / s^2 for products, which are finite in float32 up to there; a y^2 that is flushed to
# zero then counts for nothing. L^-1 of full and tied covariances hardly gets higher.
_MOST_PRECISE = 1e30
# Floats that NumPy compares at a time, and of the rows that it looks at for both ends.
_RANGE_FLOATS = 2**13
_RANGE_BLOCK = 2**16
# Rows of a triangular factor that are multiplied at a time: what lies right of them is zero.
_BLOCK = 32
_HIGHEST = jax.lax.Precision.HIGHEST

# What only mixtures that are evaluated from differences need.
_FOR_DIFFERENCES = ("means", "precision", "direct")

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
    data = _float_rows(features, dim)
    if not np.isfinite(data).all():
        raise _not_finite(data)
    return data


def _float_rows(features: Any, dim: int | None) -> Float[np.ndarray, "p d"]:
    """`check_features`, values apart."""
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
    return data


def _not_finite(data: Float[np.ndarray, "p d"]) -> InputError:
    rows = np.flatnonzero(~np.isfinite(data).all(axis=1))
    return InputError(
        f"features: {rows.size} samples hold NaN or infinity (the first is sample {rows[0]}), "
        "expected finite float32 numbers"
    )


def _evaluate(
    gmms: Sequence[Gmm], features: Any, mesh: Mesh | None, chunk: int | None, joint: bool
) -> Float[np.ndarray, "..."]:
    check_gmms(gmms)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}, expected 1 or more")
    data = _float_rows(features, gmms[0].dim)
    low, high = value_range(data)
    # NaN and infinity show in the ends, without a look at every value.
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise _not_finite(data)
    mesh = data_mesh() if mesh is None else mesh
    groups, order = group(gmms, low, high)
    sharded, rows = shard_rows(data, mesh)
    share = sharded.shape[0] // mesh.shape[AXIS]
    if chunk is None:
        # As few chunks as their rows allow, all of one length: the last would begin anew otherwise.
        chunks = -(-share // chunk_rows(gmms))
        chunk = -(-share // (chunks * _ROUND)) * _ROUND
    chunk = min(chunk, share)
    placed, places = replicate((groups, order), mesh)
    values = pool_pass(
        placed, places, sharded, mesh=mesh, chunk=chunk, joint=joint, mixed=any_direct(groups)
    )
    return np.asarray(values)[..., :rows]


def value_range(
    rows: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]]:
    """Lowest and highest value of each dimension; NaN where there is one.

    Rows that lie behind one another are compared many at a time, which NumPy does three times as
    fast as one by one, and parts of the pool that stay in a core's cache for both ends.

    Source: ours.
    """
    count, dim = rows.shape
    wide = min(max(_RANGE_FLOATS // dim, 1), count)
    even = count - count % wide
    folded = rows[:even].reshape(-1, wide * dim)
    step = max(_RANGE_BLOCK // (wide * dim), 1)
    low, high = folded[0].copy(), folded[0].copy()
    for start in range(0, len(folded), step):
        part = folded[start : start + step]
        np.minimum(low, part.min(axis=0), out=low)
        np.maximum(high, part.max(axis=0), out=high)
    together = np.concatenate([rows[even:], low.reshape(wide, dim), high.reshape(wide, dim)])
    return together.min(axis=0), together.max(axis=0)


def check_gmms(gmms: Sequence[Gmm]) -> None:
    """Refuse anything but one or more proper mixtures over the same dimensions.

    Raises:
      InputError: no mixture, an improper one, or different dimensions.

    Source: ours.
    """
    if len(gmms) == 0:
        raise InputError("gmms: an empty list, expected at least one mixture")
    for index, gmm in enumerate(gmms):
        gmm.validate(f"gmms[{index}]")
        if gmm.dim != gmms[0].dim:
            raise InputError(
                f"gmms[{index}]: {gmm.dim} dimensions, expected the {gmms[0].dim} of gmms[0]"
            )


def chunk_rows(gmms: Sequence[Gmm]) -> int:
    """Rows that a device should handle at a time: decided by the mixtures alone."""
    kinds = [_kind(gmm) for gmm in gmms]
    # Products of one mixture's block of rows, or of all diagonal mixtures.
    together = {"diag": kinds.count("diag"), "full": min(_BLOCK, gmms[0].dim), "tied": 1}
    widths = [together[kind] * gmm.components for kind, gmm in zip(kinds, gmms, strict=True)]
    rows = _CHUNK_FLOATS // max(*widths, gmms[0].dim)
    most = _DIFFERENCE_FLOATS // (max(gmm.components for gmm in gmms) * gmms[0].dim)
    return min(max(min(rows, most) // _ROUND * _ROUND, 64), _MOST_ROWS)


def group(
    gmms: Sequence[Gmm], low: Float[np.ndarray, "d"], high: Float[np.ndarray, "d"]
) -> tuple[dict[str, Parameters], Int[np.ndarray, "v"]]:
    """Stack the mixtures by kernel for a pool within [low, high].

    Mixture i ends up at `order[i]`, the second result.

    Source: ours.
    """
    centre = np.concatenate([gmm.means for gmm in gmms]).mean(axis=0, dtype=np.float64)
    centre = centre.astype(np.float32).astype(np.float64)
    reach = np.maximum(np.float64(high) - centre, centre - np.float64(low))
    kinds = [_kind(gmm) for gmm in gmms]
    groups = {}
    order = np.zeros(len(gmms), np.int32)
    position = 0
    for kind in _KERNELS:
        members = [i for i, found in enumerate(kinds) if found == kind]
        if not members:
            continue
        components = max(gmms[i].components for i in members)
        same = [gmms[i] for i in members]
        if kind == "diag":
            groups[kind] = _diagonal_factors(same, components, centre, reach)
        else:
            parts = [_factors(gmm, components, centre, reach) for gmm in same]
            groups[kind] = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        order[members] = np.arange(position, position + len(members))
        position += len(members)
    differences = any_direct(groups)
    for kind, parameters in groups.items():
        inverse = parameters.pop("inverse", None)
        if not differences:
            for name in _FOR_DIFFERENCES:
                parameters.pop(name, None)
        elif inverse is not None:
            parameters |= _difference_factors(inverse)
        groups[kind] = _to_float32(parameters)
    return groups, order


def _kind(gmm: Gmm) -> str:
    return "diag" if gmm.covariance_type == "spherical" else gmm.covariance_type


def _spread(
    means: Float[np.ndarray, "*v g d"],
    precisions: Float[np.ndarray, "*#v #g d"],
    centre: Float[np.ndarray, "d"],
    reach: Float[np.ndarray, "d"],
) -> Float[np.ndarray, "*v"]:
    """How far from each other, in deviations, a pool and a mixture's means may lie at most."""
    return ((reach + np.abs(means - centre)) ** 2 * precisions).sum(axis=-1).max(axis=-1)


def _inverse_factor(gmm: Gmm) -> tuple[Float[np.ndarray, "*g d d"], Float[np.ndarray, "*g"]]:
    """L^-1 and log det Sigma, for full and tied covariances."""
    covariances = gmm.covariances.astype(np.float64)
    symmetric = (covariances + np.swapaxes(covariances, -1, -2)) / 2
    inverses = np.empty_like(symmetric)
    # LAPACK's own routines know a triangle's form, and take half the time of NumPy's. They read
    # columns: as the upper factor of the transpose, nothing is copied into another order.
    with one_blas_thread(gmm.dim):
        for index in np.ndindex(symmetric.shape[:-2]):
            upper, failed = lapack.dpotrf(symmetric[index].T, lower=0)
            inverse, singular = lapack.dtrtri(upper, lower=0)
            if failed or singular:
                raise np.linalg.LinAlgError("an unchecked covariance is not positive definite")
            inverses[index] = inverse.T
    diagonal = np.diagonal(inverses, axis1=-2, axis2=-1)
    return inverses, -2 * np.log(diagonal).sum(axis=-1)


def _difference_factors(inverse: Float[np.ndarray, "v *g d d"]) -> dict[str, np.ndarray]:
    """L^-T with entries of at most one, and the scale apart, so that products cannot overflow."""
    scale = np.abs(inverse).max(axis=(-2, -1))
    return {
        "scale": scale,
        # Of components that a mixture does not have, the factor is zero.
        "factor": np.swapaxes(inverse / np.where(scale > 0, scale, 1)[..., None, None], -1, -2),
    }


def _diagonal_factors(
    gmms: Sequence[Gmm],
    components: int,
    centre: Float[np.ndarray, "d"],
    reach: Float[np.ndarray, "d"],
) -> dict[str, np.ndarray]:
    """What `_factors` makes of each diagonal or spherical mixture, of all at once."""
    count, dim = len(gmms), len(centre)
    there = np.zeros((count, components), bool)
    weights, means = np.zeros(there.shape), np.zeros((*there.shape, dim))
    covariances = np.ones(means.shape)
    for i, gmm in enumerate(gmms):
        found = gmm.components
        there[i, :found], weights[i, :found], means[i, :found] = True, gmm.weights, gmm.means
        spherical = gmm.covariance_type == "spherical"
        covariances[i, :found] = gmm.covariances[:, None] if spherical else gmm.covariances
    offsets = np.where(there[..., None], means - centre, 0.0)
    # Of components that a mixture does not have, nothing is to count: not even towards its spread.
    precisions = np.where(there[..., None], 1 / covariances, 0.0)
    exact = _spread(means, precisions, centre, reach) <= _SPREAD["diag"]
    return {
        "centre": np.broadcast_to(centre, (count, dim)),
        "means": means,
        "precision": np.sqrt(precisions),
        # -1/2 of the square, expanded; its constant part apart.
        "expanded": np.concatenate([-0.5 * precisions, offsets * precisions], axis=-1),
        "added": -0.5 * (offsets**2 * precisions).sum(axis=-1),
        "direct": ~(exact & (precisions.max(axis=(-2, -1)) <= _MOST_PRECISE)),
        "constant": _constants(weights, np.log(covariances).sum(axis=-1), dim),
    }


def _factors(
    gmm: Gmm, components: int, centre: Float[np.ndarray, "d"], reach: Float[np.ndarray, "d"]
) -> dict[str, np.ndarray]:
    """What both kernels of a full or tied mixture need, padded to `components` of weight zero.

    `direct` says which of the two is to be used: a value and not another program, so that other
    mixtures and pools do not compile anew.
    """
    found, dim = gmm.means.shape
    offsets = gmm.means - centre
    shared, own = {"centre": centre}, {"means": gmm.means}
    inverse, log_det = _inverse_factor(gmm)
    log_det = np.broadcast_to(log_det, (found,))
    parts = shared if gmm.covariance_type == "tied" else own
    parts["inverse"] = inverse
    own["offset"] = (inverse @ offsets[..., None])[..., 0]
    step = dim if parts is shared else _BLOCK
    for start in range(0, dim, step):
        stop = min(start + step, dim)
        parts[f"rows_{start:06}"] = inverse[..., start:stop, :stop]
    spread = _spread(gmm.means, (inverse**2).sum(axis=-2), centre, reach)
    shared["direct"] = not spread <= _SPREAD[_kind(gmm)]
    constant = _constants(gmm.weights.astype(np.float64), log_det, dim)
    extra = components - found
    padded = {k: np.pad(v, [(0, extra)] + [(0, 0)] * (v.ndim - 1)) for k, v in own.items()}
    padded["constant"] = np.pad(constant, (0, extra), constant_values=-np.inf)
    return shared | padded


def _constants(
    weights: Float[np.ndarray, "*v g"], log_det: Float[np.ndarray, "*v g"], dim: int
) -> Float[np.ndarray, "*v g"]:
    """What does not depend on the sample; -inf for components of weight zero."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights / weights.sum(axis=-1, keepdims=True))
    return log_weights - 0.5 * (dim * math.log(2 * math.pi) + log_det)


def _to_float32(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):  # only where the differences are used
        return {key: np.asarray(value, np.float32) for key, value in parts.items()}


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
    whitened = jnp.einsum(equation, unit, parameters["factor"], precision=_HIGHEST)
    length = jnp.sqrt(jnp.sum(whitened**2, axis=-1))
    scale = jnp.reshape(parameters["scale"], (-1, 1))
    distance = jnp.minimum(size * (scale * length), _FURTHEST)
    return parameters["constant"][:, None] - 0.5 * distance**2


def _diagonal_products(parameters: Parameters, rows: Float[Array, "c d"]) -> Float[Array, "n g c"]:
    centred = rows - parameters["centre"][0]
    squares = jnp.concatenate([centred**2, centred], axis=1)
    factor = parameters["expanded"]
    products = _product(factor.reshape(-1, factor.shape[-1]), squares)
    constant = parameters["constant"] + parameters["added"]
    return products.reshape(*factor.shape[:2], -1) + constant[..., None]


def _matrix_products(parameters: Parameters, rows: Float[Array, "c d"]) -> Float[Array, "g c"]:
    centred = rows - parameters["centre"]
    offset = parameters["offset"]
    components = offset.shape[0]
    squares = jnp.zeros((rows.shape[0], components), rows.dtype)
    start = 0
    for name in sorted(name for name in parameters if name.startswith("rows_")):
        factor = parameters[name]
        size, stop = factor.shape[-2:]
        # Samples first: the sum over a block then runs along memory.
        whitened = _product(centred[:, :stop], factor.reshape(-1, stop))
        whitened = whitened.reshape(rows.shape[0], -1, size)
        squares += jnp.square(whitened - offset[:, start:stop]).sum(axis=-1)
        start = stop
    return parameters["constant"][:, None] - 0.5 * squares.T


def _product(factor: Float[Array, "n d"], rows: Float[Array, "c d"]) -> Float[Array, "n c"]:
    return jnp.einsum("nd,cd->nc", factor, rows, precision=_HIGHEST)


_KERNELS = {
    "diag": _diagonal_kernel,
    "tied": functools.partial(_matrix_kernel, "gcd,de->gce"),
    "full": functools.partial(_matrix_kernel, "gcd,gde->gce"),
}


def any_direct(groups: dict[str, Parameters]) -> bool:
    """Whether some mixture of `group` is to be evaluated from differences."""
    return any(np.any(parameters.get("direct", False)) for parameters in groups.values())


@functools.partial(jax.jit, static_argnames=("mesh", "chunk", "joint", "mixed"))
def pool_pass(
    groups: dict[str, Parameters],
    order: Array,
    features: Float[Array, "p d"],
    *,
    mesh: Mesh,
    chunk: int,
    joint: bool,
    mixed: bool,
) -> Float[Array, "..."]:
    """Values of all mixtures for all rows, `chunk` at a time on every device of the mesh.

    `mixed` says that some mixture may need differences (`any_direct`): the choice at run time costs
    more than the products themselves, so that the usual case goes without.
    """

    def on_device(
        groups: dict[str, Parameters], order: Array, rows: Float[Array, "r d"]
    ) -> Float[Array, "..."]:
        count = rows.shape[0]

        def one(index: Int[Array, ""], values: Float[Array, "..."]) -> Float[Array, "..."]:
            # The last chunk begins early enough to be full: padding would copy all rows.
            start = jnp.minimum(index * chunk, count - chunk)
            part = jax.lax.dynamic_slice_in_dim(rows, start, chunk)
            found = _chunk_values(groups, order, joint, mixed, part)
            # Written where it belongs, while it is in the caches.
            return jax.lax.dynamic_update_slice_in_dim(values, found, start, axis=-1)

        shape = jax.eval_shape(lambda r: _chunk_values(groups, order, joint, mixed, r), rows).shape
        return jax.lax.fori_loop(0, -(-count // chunk), one, jnp.zeros_like(rows, shape=shape))

    leading = (None, None) if joint else (None,)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(*leading, AXIS),
    )(groups, order, features)


def _chunk_values(
    groups: dict[str, Parameters],
    order: Array,
    joint: bool,
    mixed: bool,
    rows: Float[Array, "c d"],
) -> Float[Array, "..."]:
    most = max(parameters["constant"].shape[1] for parameters in groups.values())

    parts = []
    for kind, kernel in _KERNELS.items():
        if kind not in groups:
            continue
        stacked = groups[kind]
        # The diagonal mixtures have one product in common.
        products = _diagonal_products(stacked, rows) if kind == "diag" else None

        def one(item: tuple[Parameters, Array | None], kernel: Any = kernel) -> Float[Array, "g c"]:
            parameters, product = item
            if product is None:
                quick = functools.partial(_matrix_products, parameters, rows)
            else:
                quick = functools.partial(jnp.asarray, product)
            if not mixed:
                return quick()
            slow = functools.partial(kernel, parameters, rows)
            return jax.lax.cond(parameters["direct"] > 0, slow, quick)

        values = products
        if mixed or products is None:
            items = (stacked, products)
            if len(stacked["constant"]) == 1:
                # A loop over one mixture would copy its factors for every chunk.
                values = one(jax.tree.map(lambda leaf: leaf[0], items))[None]
            else:
                values = jax.lax.map(one, items)
        if joint:
            missing = most - values.shape[1]
            values = jnp.pad(values, [(0, 0), (0, missing), (0, 0)], constant_values=-jnp.inf)
        else:
            values = _log_sum_exp(values)
        parts.append(values)
    # Mixtures of one kind are in order.
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)[order]


def _log_sum_exp(values: Float[Array, "n g c"]) -> Float[Array, "n c"]:
    # A mixture has a component of positive weight, whose value is finite: so is the highest.
    highest = jnp.max(values, axis=1)
    total = jnp.sum(jnp.exp(values - highest[:, None]), axis=1)
    return highest + jnp.log(total)
