"""Choosing each device's images from the public pool, with nothing but its mixture.

Every method returns one ordered list per device. The metric dataset is the beginning of the list
and the fine-tuning set is all of it, so the former always lies inside the latter.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tapvit_jax.errors import InputError
from tapvit_jax.proxy.density import check_features, check_gmms, component_log_likelihood
from tapvit_jax.proxy.gmm import Gmm, GmmConfig
from tapvit_jax.proxy.pool import (
    Best,
    Range,
    open_pool,
    pick_rows,
    pool_name,
    pool_range,
    scores,
    skip_noise,
)
from tapvit_jax.sharding import data_mesh
from tapvit_jax.structs import check_fields, from_plain

Method = Literal["top", "quota", "importance"]

# Enough rows to fit the pool's density, and to estimate a distance, in seconds.
_POOL_FIT_ROWS = 20_000
_DISTANCE_ROWS = 2048
# Reciprocals of larger ones are no normal float32 numbers: densities would be NaN.
_LARGEST_VARIANCE = 1e37


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How many images a device gets, and by which method; the counts are the published ones.

    Attributes:
      method: "top", "quota" or "importance", see `select`.
      metric_count: images that score units and layers, the first of those chosen.
      finetune_count: images chosen in all, for fine-tuning; not fewer than `metric_count`.
      seed: for the noise of "importance", and the rows that the pool's density is fitted on.
      task_share: for "importance": the share of the pool taken to be of the device's kind. It
        bounds the weights by 1 / task_share; 0 is the plain ratio p_device / p_pool.

    Raises:
      InputError: a value out of range.

    Source: the counts and `top` are TAP-ViTs'; the other methods are ours.
    """

    method: Method = "importance"
    metric_count: int = 640
    finetune_count: int = 6400
    seed: int = 0
    task_share: float = 0.1

    def __post_init__(self):
        check_fields(self)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, expected a whole number from 0 to 2^32 - 1")
        if not 0 <= self.task_share < 1:
            raise InputError(f"task_share is {self.task_share}, expected from 0 to below 1")
        for name in ("metric_count", "finetune_count"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.finetune_count < self.metric_count:
            raise InputError(
                f"finetune_count is {self.finetune_count}, expected at least the metric_count, "
                f"{self.metric_count}"
            )


def select(
    gmms: Sequence[Gmm],
    features: Float[Array, "p d"] | Float[np.ndarray, "p d"] | str | os.PathLike,
    count: int,
    *,
    method: Method = "top",
    seed: int = 0,
    finetune_count: int | None = None,
    pool_gmm: Gmm | None = None,
    task_share: float = 0.1,
    mesh: Mesh | None = None,
) -> Int[np.ndarray, "v m"]:
    """Choose for each of v devices an ordered list of m distinct images of the pool.

    `features` may also be a memory-mapped array or the path of a `.npy` file: the pool is read in
    pieces, by each process its share, and the lists are the same for any number of devices and
    processes. m is `finetune_count`, or `count` without it; the first `count` are the metric
    dataset.

    - `top`: the highest log p_v(x), ties by the lower index (as published).
    - `quota`: component k gets a share of the places proportional to pi_vk (largest remainder), and
      fills it with the highest log pi_vk N(x | k) among the images for which it is the most likely
      component, then, when those run out, with the best unused images of the others. The quotas
      hold for the metric dataset and for the whole list.
    - `importance`: sampling without replacement with weights p_v / ((1 - a) p_pool + a p_v), as the
      highest log weights after adding Gumbel noise. a is `task_share`; with 0 the weights are the
      plain p_v / p_pool, which in many dimensions vary so wildly that hardly any chance is left and
      the first images all come from one corner of the device's region. p_pool is `pool_gmm`, or a
      diagonal mixture fitted on (at most 20,000 rows of) the pool. The noise depends only on the
      seed and the device's position in `gmms`.

    Raises:
      InputError: a count below one or above the pool's size, `finetune_count` below `count`, an
        unknown method, a bad seed or task_share, features that hold NaN or infinity or, for
        `importance`, are too large or small for variances in float32, or mixtures of other
        dimensions.

    Source: TAP-ViTs, section 3 (`top`); Efraimidis and Spirakis 2006 (sampling by random keys);
    Hesterberg 1995 (weights bounded by a defensive mixture); `quota` is ours.
    """
    SelectConfig(method, seed=seed, task_share=task_share)  # checks them
    check_gmms(gmms)
    pool = _open(features, gmms[0].dim)
    total = count if finetune_count is None else finetune_count
    _check_counts(count, total, pool)
    bounds = pool_range(pool)
    mesh = data_mesh() if mesh is None else mesh
    if method == "quota":
        return _quotas(gmms, pool, bounds, count, total, mesh)
    best = Best(len(gmms), total)
    if method == "top":
        for start, values in scores(gmms, pool, bounds, mesh):
            for position, keys in enumerate(values):
                best.add(position, keys, start)
        return np.stack(best.finish())
    density = [_pool_density(pool_gmm, pool, seed)]
    # None where all images are the same (one image, say), as far as was looked at: they are all
    # equally likely.
    against = density if density[0] is not None else []
    noise = [np.random.default_rng((seed, position)) for position in range(len(gmms))]
    drawn = 0
    for start, values in scores([*gmms, *against], pool, bounds, mesh):
        values = values.astype(np.float64)
        common = (values[-1] if against else 0.0) + math.log1p(-task_share)
        for position, (keys, generator) in enumerate(zip(values, noise, strict=False)):
            skip_noise(generator, start - drawn)
            own = keys + math.log(task_share) if task_share > 0 else -np.inf
            ratio = keys - np.logaddexp(common, own)
            best.add(position, ratio + generator.gumbel(size=keys.size), start)
        drawn = start + values.shape[1]
    return np.stack(best.finish())


def selection_report(
    indices: Int[np.ndarray, "n"],
    labels: Int[np.ndarray, "p"],
    num_classes: int,
    gmm: Gmm,
    features: Float[Array, "p d"] | Float[np.ndarray, "p d"] | str | os.PathLike,
    held_out: Float[Array, "h d"] | Float[np.ndarray, "h d"] | None = None,
) -> dict[str, Any]:
    """Describe one device's choice with plain values that JSON can hold.

    `features` as in `select`; of a file only the rows that count are read.

    - `count`, and `class_histogram`: how many chosen images each class has.
    - `effective_components`: exp of the entropy of the mean responsibilities of the chosen images.
    - `energy_distance`: 2 E|X - Y| - E|X - X'| - E|Y - Y'| between the chosen and the held-out
      private features, and `pool_energy_distance`: the same for the whole pool, for comparison.
      Unbiased, hence possibly a little below zero; over at most 2,048 random rows of each set;
      None without `held_out` or with fewer than two rows. For simulations only: a real device does
      not send its features.

    Raises:
      InputError: indices that repeat or lie outside the pool, labels that do not fit the pool or
        the classes, features of another dimension or not finite.

    Source: ours; energy distance from Szekely and Rizzo 2013.
    """
    pool = _open(features, gmm.dim)
    indices = _check_indices(indices, pool.shape[0])
    classes = _check_labels(labels, num_classes, pool.shape[0])
    chosen = pick_rows(pool, indices)
    report: dict[str, Any] = {
        "count": int(indices.size),
        "class_histogram": np.bincount(classes[indices], minlength=num_classes).tolist(),
        "effective_components": _effective_components(gmm, chosen),
        "energy_distance": None,
        "pool_energy_distance": None,
    }
    if held_out is not None:
        private = _check_held_out(held_out, gmm.dim)
        report["energy_distance"] = _energy_distance(chosen, private)
        some = pick_rows(pool, _sample(pool.shape[0], 0))
        report["pool_energy_distance"] = _energy_distance(some, private)
    return report


def _open(features: Any, dim: int) -> Float[np.ndarray, "p d"]:
    pool = open_pool(features)
    if pool.shape[1] != dim:
        raise InputError(
            f"{pool_name(pool)}: {pool.shape[1]} dimensions, expected the mixtures' {dim}"
        )
    return pool


def _pool_density(pool_gmm: Gmm | None, pool: Float[np.ndarray, "p d"], seed: int) -> Gmm | None:
    if pool_gmm is not None:
        return pool_gmm
    rows = np.arange(pool.shape[0])
    if rows.size > _POOL_FIT_ROWS:
        rows = np.random.default_rng(seed).choice(rows.size, _POOL_FIT_ROWS, replace=False)
    picked = pick_rows(pool, rows)
    if (picked == picked[0]).all():
        return None
    config = GmmConfig(components=(1, 2, 4, 8, 16, 32), min_members=1, restarts=1, seed=seed)
    try:
        fitted = Gmm.fit(picked, config)
        if fitted.covariances.max() > _LARGEST_VARIANCE:
            raise InputError(f"a variance of {fitted.covariances.max():.1e}")
    except InputError as error:
        # All that is left to fail: variances that float32 does not hold.
        raise InputError(
            f"{pool_name(pool)}: values up to {np.abs(picked).max():.1e} in size, expected ones of "
            "which float32 holds the variances, as method importance needs (top and quota do not)"
        ) from error
    return fitted


def _quotas(
    gmms: Sequence[Gmm],
    pool: Float[np.ndarray, "p d"],
    bounds: Range,
    count: int,
    total: int,
    mesh: Mesh,
) -> Int[np.ndarray, "v m"]:
    # No place is ever filled from beyond the best `total` rows of a component, all or its own.
    places = [(v, k) for v, gmm in enumerate(gmms) for k in range(gmm.components)]
    every, owned = Best(len(places), total), Best(len(places), total)
    for start, values in scores(gmms, pool, bounds, mesh, joint=True):
        owners = values.argmax(axis=1)
        for position, (v, k) in enumerate(places):
            every.add(position, values[v, k], start)
            owned.add(position, np.where(owners[v] == k, values[v, k], -np.inf), start)
    # A component may own few rows, and one of weight zero has none at all.
    every_rows, owned_rows = every.finish(whole=False), owned.finish(whole=False)
    chosen, position = [], 0
    for gmm in gmms:
        part = slice(position, position + gmm.components)
        chosen.append(_quota(gmm.weights, owned_rows[part], every_rows[part], count, total))
        position = part.stop
    return np.stack(chosen)


def _quota(
    weights: Float[np.ndarray, "g"],
    owned: list[Int[np.ndarray, "..."]],
    every: list[Int[np.ndarray, "..."]],
    count: int,
    total: int,
) -> Int[np.ndarray, "m"]:
    """Fill both quotas from every component's own and all rows, each the best first."""
    small = _shares(weights, count, np.zeros(len(weights), np.int64))
    large = _shares(weights, total, small)
    used = np.zeros(0, np.int64)
    for quotas in (small, large - small):
        if quotas.sum() > 0:
            used = np.concatenate([used, _fill(quotas, owned, every, used)])
    if used.size < total:
        raise RuntimeError(f"{used.size} rows have finite densities, expected {total} or more")
    return used


def _shares(
    weights: Float[np.ndarray, "g"], total: int, least: Int[np.ndarray, "g"]
) -> Int[np.ndarray, "g"]:
    """Split `total` by largest remainder, giving nobody less than `least` (whose sum is no more).

    Largest remainder may take a place away from somebody when there are more to share; the metric
    dataset must nevertheless stay inside the larger set.
    """
    exact = weights.astype(np.float64) / weights.sum(dtype=np.float64) * total
    shares = np.floor(exact).astype(np.int64)
    ranking = np.lexsort((-weights, shares - exact))
    shares[ranking[: total - shares.sum()]] += 1
    shares = np.maximum(shares, least)
    for _ in range(shares.sum() - total):
        spare = np.where(shares > least, shares - exact, -np.inf)
        shares[np.argmax(spare)] -= 1
    return shares


def _fill(
    quotas: Int[np.ndarray, "g"],
    owned: list[Int[np.ndarray, "..."]],
    every: list[Int[np.ndarray, "..."]],
    used: Int[np.ndarray, "u"],
) -> Int[np.ndarray, "m"]:
    """Fill the quotas with rows that are not in `used`, and interleave the components."""
    # All take their own images first, so that nobody's spill takes what another still needs.
    taken = [_unused(rows, used)[:quota] for rows, quota in zip(owned, quotas, strict=True)]
    used = np.concatenate([used, *taken])
    for component, quota in enumerate(quotas):
        missing = quota - taken[component].size
        if missing > 0:
            more = _unused(every[component], used)[:missing]
            used = np.concatenate([used, more])
            taken[component] = np.concatenate([taken[component], more])
    # Any beginning of the list then holds the components in about the right proportions.
    places = np.concatenate([(np.arange(t.size) + 0.5) / max(t.size, 1) for t in taken])
    return np.concatenate(taken)[np.argsort(places, kind="stable")]


def _unused(rows: Int[np.ndarray, "n"], used: Int[np.ndarray, "u"]) -> Int[np.ndarray, "m"]:
    return rows[~np.isin(rows, used)]


def _effective_components(gmm: Gmm, chosen: Float[np.ndarray, "n d"]) -> float:
    values = component_log_likelihood([gmm], chosen)[0].astype(np.float64)
    shares = np.exp(values - values.max(axis=0))
    mean = (shares / shares.sum(axis=0)).mean(axis=1)
    mean = mean[mean > 0]
    return math.exp(-float(np.sum(mean * np.log(mean))))


def _energy_distance(
    first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]
) -> float | None:
    if min(len(first), len(second)) < 2:
        return None
    # Imported here: it takes two seconds, and only reports need it.
    from sklearn.metrics.pairwise import euclidean_distances

    # In float64 and centred, the quick expanded distances do not cancel.
    first, second = (
        rows[_sample(len(rows), stream)].astype(np.float64)
        for stream, rows in enumerate((first, second))
    )
    centre = second.mean(axis=0)
    first, second = first - centre, second - centre
    across = euclidean_distances(first, second).mean()
    inside = [
        euclidean_distances(rows).sum() / (len(rows) * (len(rows) - 1)) for rows in (first, second)
    ]
    return float(2 * across - sum(inside))


def _sample(count: int, stream: int) -> Int[np.ndarray, "m"]:
    """Random rows of so many, or all where they are few."""
    if count <= _DISTANCE_ROWS:
        return np.arange(count)
    return np.random.default_rng((0, stream)).choice(count, _DISTANCE_ROWS, replace=False)


def _check_counts(count: Any, total: Any, pool: Float[np.ndarray, "p d"]) -> None:
    for name, value in (("count", count), ("finetune_count", total)):
        if not 1 <= from_plain(int, value, name) <= pool.shape[0]:
            raise InputError(
                f"{name} is {value}, expected from 1 to {pool.shape[0]}, the number of images in "
                f"the pool ({pool_name(pool)})"
            )
    if total < count:
        raise InputError(f"finetune_count is {total}, expected at least the count, {count}")


def _check_indices(indices: Any, pool: int) -> Int[np.ndarray, "n"]:
    array = np.asarray(indices)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"indices: {array.dtype} of shape {array.shape}, expected one or more whole numbers"
        )
    if array.min() < 0 or array.max() >= pool:
        raise InputError(
            f"indices: from {array.min()} to {array.max()}, expected from 0 to {pool - 1}"
        )
    distinct = np.unique(array).size
    if distinct != array.size:
        raise InputError(f"indices: {array.size - distinct} repeat, expected distinct ones")
    return array


def _check_labels(labels: Any, num_classes: int, pool: int) -> Int[np.ndarray, "p"]:
    array = np.asarray(labels)
    if array.shape != (pool,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"labels: {array.dtype} of shape {array.shape}, expected {pool} whole numbers"
        )
    if array.min() < 0 or array.max() >= num_classes:
        raise InputError(
            f"labels: from {array.min()} to {array.max()}, expected from 0 to {num_classes - 1}"
        )
    return array


def _check_held_out(held_out: Any, dim: int) -> Float[np.ndarray, "h d"]:
    try:
        return check_features(held_out, dim)
    except InputError as error:
        raise InputError(f"held_out: {error}") from error
