import dataclasses

import jax
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from tapvit_jax.errors import InputError
from tapvit_jax.proxy import density
from tapvit_jax.proxy.density import component_log_likelihood, log_likelihood, value_range
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.sharding import data_mesh, replicate, shard_rows

KINDS = ("diag", "tied", "spherical", "full")


def hard_gmm(kind, components, dim, seed, offset=100.0):
    """A mixture far from the origin whose variances differ by a factor of 1e4."""
    rng = np.random.default_rng(seed)
    deviations = np.where(np.arange(dim) % 3 == 0, 1e-2, 1.0)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    full = np.stack(
        [(turn * (deviations * rng.uniform(0.5, 2, dim)) ** 2) @ turn.T for _ in range(components)]
    )
    covariances = {
        "diag": (deviations * rng.uniform(0.5, 2, (components, dim))) ** 2,
        "tied": full[0],
        "spherical": rng.uniform(1e-4, 1, components),
        "full": full,
    }[kind]
    return Gmm(
        weights=rng.dirichlet(np.ones(components)),
        means=offset + rng.normal(size=(components, dim)),
        covariances=covariances,
        covariance_type=kind,
    )


def pool(rows, dim, seed=0, offset=100.0):
    rng = np.random.default_rng(seed)
    return (offset + 2 * rng.normal(size=(rows, dim))).astype(np.float32)


def reference(gmm):
    """scikit-learn's own mixture in float64 with the same float32 parameters."""
    model = GaussianMixture(gmm.components, covariance_type=gmm.covariance_type)
    weights = gmm.weights.astype(np.float64)
    model.weights_ = weights / weights.sum()
    model.means_ = gmm.means.astype(np.float64)
    covariances = gmm.covariances.astype(np.float64)
    model.covariances_ = covariances
    if gmm.covariance_type in ("diag", "spherical"):
        model.precisions_cholesky_ = 1 / np.sqrt(covariances)
    else:
        inverse = np.linalg.inv(np.linalg.cholesky(covariances))
        model.precisions_cholesky_ = np.swapaxes(inverse, -1, -2)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "components"), [(1, 1), (24, 5), (128, 3)])
def test_same_as_scikit_learn_on_badly_conditioned_data(kind, dim, components):
    gmm, features = hard_gmm(kind, components, dim, dim), pool(203, dim)
    found = log_likelihood([gmm], features)
    assert found.dtype == np.float32
    model = reference(gmm)
    np.testing.assert_allclose(
        found[0], model.score_samples(features.astype(np.float64)), rtol=1e-4, atol=1e-3
    )
    joint = component_log_likelihood([gmm], features)[0]
    expected = model._estimate_weighted_log_prob(features.astype(np.float64)).T
    np.testing.assert_allclose(joint, expected, rtol=1e-4, atol=1e-3)


def test_mixed_types_and_numbers_of_components_do_not_disturb_each_other():
    kinds = ["full", "diag", "spherical", "tied", "diag", "full"]
    gmms = [hard_gmm(k, 1 + i, 6, i) for i, k in enumerate(kinds)]
    features = pool(51, 6)
    together = log_likelihood(gmms, features)
    joint = component_log_likelihood(gmms, features)
    assert together.shape == (6, 51)
    assert joint.shape == (6, 6, 51)
    for i, gmm in enumerate(gmms):
        np.testing.assert_allclose(together[i], log_likelihood([gmm], features)[0], rtol=1e-5)
        assert np.isfinite(joint[i, : gmm.components]).all()
        assert (joint[i, gmm.components :] == -np.inf).all()
    np.testing.assert_allclose(
        np.logaddexp.reduce(joint.astype(np.float64), axis=1), together, rtol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 8, 77])
def test_same_on_one_device_and_on_all(rows):
    gmms = [hard_gmm(kind, 3, 10, i) for i, kind in enumerate(KINDS)]
    features = pool(rows, 10)
    one, every = data_mesh(jax.devices()[:1]), data_mesh()
    assert every.size == len(jax.devices())
    np.testing.assert_allclose(
        log_likelihood(gmms, features, mesh=one),
        log_likelihood(gmms, features, mesh=every),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        component_log_likelihood(gmms, features, mesh=one),
        component_log_likelihood(gmms, features, mesh=every),
        rtol=1e-5,
    )


@pytest.mark.parametrize("chunk", [1, 7, 41, 50])
def test_the_chunk_does_not_matter(chunk):
    gmms = [hard_gmm(kind, 2, 5, i) for i, kind in enumerate(KINDS)]
    features = pool(41, 5)
    np.testing.assert_allclose(
        log_likelihood(gmms, features, chunk=chunk, mesh=data_mesh(jax.devices()[:1])),
        log_likelihood(gmms, features),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e6, 1e10, 1e15])
def test_far_samples_have_the_right_finite_density(kind, distance):
    gmm = hard_gmm(kind, 3, 7, 0)
    features = np.stack([np.full(7, distance), np.full(7, -distance), np.eye(7)[0] * distance])
    features = features.astype(np.float32)
    found = log_likelihood([gmm], features)[0]
    expected = reference(gmm).score_samples(features.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_furthest_samples_are_finite_and_least_likely(kind):
    gmm = hard_gmm(kind, 3, 7, 0)
    narrow = dataclasses.replace(gmm, covariances=gmm.covariances * np.float32(1e-30))
    largest = np.finfo(np.float32).max
    features = np.stack([np.full(7, largest), np.full(7, -largest), gmm.means[0]])
    mixed = np.array([[largest, -largest] * 3 + [0]], np.float32)
    features = np.concatenate([features, mixed]).astype(np.float32)
    for mixture in (gmm, narrow):
        found = log_likelihood([mixture], features)[0]
        assert np.isfinite(found).all()
        assert found[2] > -100
        assert (found[[0, 1, 3]] < -1e36).all()
    assert np.isfinite(component_log_likelihood([gmm, narrow], features)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [1e-45, 1e-40, 1e-32, 1e-28])
def test_tiny_variances_where_the_pool_is_constant(kind, variance):
    """Nothing is spread out there, but the precision is beyond what products hold."""
    features = pool(9, 3, offset=0.0)
    features[:, 0] = 0
    variances = np.array([variance, 1, 1]) if kind != "spherical" else np.array(variance)
    if kind == "spherical":
        features[:] = 0
    full = np.diag(variances) if kind in ("tied", "full") else variances
    covariances = full if kind == "tied" else full[None]
    gmm = Gmm(np.ones(1), np.zeros((1, 3)), covariances, kind)
    expected = reference(gmm).score_samples(features.astype(np.float64))
    np.testing.assert_allclose(log_likelihood([gmm], features)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_tiny_and_zero_weights(kind, weight):
    gmm = dataclasses.replace(hard_gmm(kind, 2, 5, 1), weights=np.array([1.0, weight]))
    covariances = gmm.covariances if kind == "tied" else gmm.covariances[:1]
    alone = Gmm([1.0], gmm.means[:1], covariances, kind)
    features = np.concatenate([pool(9, 5), np.full((1, 5), 1e6, np.float32)])
    found, expected = log_likelihood([gmm, alone], features)
    assert np.isfinite(found).all()
    if weight == 0:
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        joint = component_log_likelihood([gmm], features)[0]
        assert np.isfinite(joint[0]).all()
        assert (joint[1] == -np.inf).all()
    else:
        np.testing.assert_allclose(
            found, reference(gmm).score_samples(features.astype(np.float64)), rtol=1e-4
        )


def test_another_number_of_rows_or_values_does_not_change_a_row():
    gmms = [hard_gmm(kind, 3, 6, i) for i, kind in enumerate(KINDS)]
    features = pool(64, 6)
    whole = log_likelihood(gmms, features)
    np.testing.assert_allclose(log_likelihood(gmms, features[:13]), whole[:, :13], rtol=1e-5)
    assert density.pool_pass._cache_size() > 0
    before = density.pool_pass._cache_size()
    changed = [hard_gmm(kind, 3, 6, i + 9) for i, kind in enumerate(KINDS)]
    assert not np.allclose(log_likelihood(changed, features), whole)
    assert density.pool_pass._cache_size() == before


def test_features_already_on_a_device_are_taken():
    gmm, features = hard_gmm("diag", 2, 3, 0), pool(5, 3)
    np.testing.assert_array_equal(
        log_likelihood([gmm], jax.numpy.asarray(features)), log_likelihood([gmm], features)
    )


@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 1), (5, 5000), (4096, 1), (1000, 37), (1025, 4), (3001, 64)]
)
def test_the_range_of_rows(rows, dim):
    data = pool(rows, dim, offset=0.0)
    for found in (data, np.asfortranarray(data)):
        low, high = value_range(found)
        np.testing.assert_array_equal(low, data.min(axis=0))
        np.testing.assert_array_equal(high, data.max(axis=0))
    data[rows // 2, dim // 2] = np.nan
    for end in value_range(data):
        assert np.flatnonzero(np.isnan(end)).tolist() == [dim // 2]


@pytest.mark.parametrize(
    ("kind", "count", "components", "dim"),
    [("full", 1, 10, 128), ("diag", 50, 10, 64), ("diag", 1, 2, 4), ("tied", 3, 256, 512)],
)
def test_chunks_are_bounded_by_what_is_multiplied(kind, count, components, dim):
    shape = {"full": (components, dim, dim), "diag": (components, dim), "tied": (dim, dim)}[kind]
    zeros = np.zeros((components, dim), np.float32)
    gmm = Gmm(zeros[:, 0], zeros, np.zeros(shape, np.float32), kind)
    rows = density.chunk_rows([gmm] * count)
    assert 64 <= rows <= density._MOST_ROWS == 3072
    assert rows % 16 == 0
    block = {"full": 32 * components, "diag": count * components, "tied": dim}[kind]
    assert rows == 64 or rows * block <= 2**20
    # The differences of all rows and means, where products would lose too many digits.
    assert rows == 64 or rows * components * dim <= 2**23


def test_bad_inputs():
    gmm = hard_gmm("diag", 2, 3, 0)
    features = pool(5, 3)
    holed = features.copy()
    holed[3, 1] = np.nan
    bad = dataclasses.replace(gmm, weights=np.array([0.5, 0.1]))
    for gmms, rows, message in (
        ([], features, "gmms: an empty list"),
        ([gmm, bad], features, r"gmms\[1\]: the weights sum to 0.6"),
        ([gmm, hard_gmm("diag", 2, 4, 0)], features, r"gmms\[1\]: 4 dimensions, expected the 3"),
        ([gmm], pool(5, 4), "features: 4 dimensions, expected the mixtures' 3"),
        ([gmm], holed, "1 samples hold NaN or infinity .the first is sample 3"),
        ([gmm], holed * np.inf, "5 samples hold NaN"),
        ([gmm], features.astype(np.float64) * 1e300, "5 samples hold NaN or infinity"),
        ([gmm], features[:0], r"features: shape \(0, 3\)"),
        ([gmm], features[0], r"features: shape \(3,\)"),
        ([gmm], [["a"]], "features: expected an array of real numbers"),
    ):
        for function in (log_likelihood, component_log_likelihood):
            with pytest.raises(InputError, match=message):
                function(gmms, rows)
    with pytest.raises(InputError, match="chunk is 0"):
        log_likelihood([gmm], features, chunk=0)


@pytest.mark.parametrize("rows", [0, 1, 8, 13])
def test_rows_are_padded_and_spread(rows):
    mesh = data_mesh()
    array = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    for given_array in (array, jax.numpy.asarray(array)):
        sharded, count = shard_rows(given_array, mesh)
        assert count == rows
        assert sharded.shape[0] % mesh.size == 0
        assert 0 <= sharded.shape[0] - rows < mesh.size
        np.testing.assert_array_equal(np.asarray(sharded)[:rows], array)
        assert not np.asarray(sharded)[rows:].any()
        shards = {s.data.shape[0] for s in sharded.addressable_shards}
        assert shards == {sharded.shape[0] // mesh.size}


def test_replicated_trees_are_whole_everywhere():
    mesh = data_mesh()
    tree = replicate({"a": np.arange(3), "b": (np.ones(2),)}, mesh)
    assert len(tree["a"].addressable_shards) == mesh.size
    assert all(s.data.shape == (3,) for s in tree["a"].addressable_shards)
    np.testing.assert_array_equal(tree["b"][0], np.ones(2))


def test_bad_sharding():
    with pytest.raises(InputError, match="devices: an empty list"):
        data_mesh([])
    with pytest.raises(InputError, match="array: is a scalar"):
        shard_rows(np.float32(1), data_mesh())
    other = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("model",))
    with pytest.raises(InputError, match="expected an axis 'data'"):
        shard_rows(np.ones(3), other)
