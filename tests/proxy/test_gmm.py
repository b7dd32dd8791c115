import copy
import dataclasses
import hashlib
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from tapvit_jax.errors import InputError
from tapvit_jax.proxy import gmm as gmm_module
from tapvit_jax.proxy import payload
from tapvit_jax.proxy.gmm import Gmm, GmmConfig, fit_report
from tapvit_jax.proxy.payload import MAX_PAYLOAD_BYTES
from tapvit_jax.structs import from_plain, to_plain

KINDS = ("diag", "tied", "spherical", "full")


def random_gmm(kind, components=3, dim=4, seed=0, extractor=""):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(components, dim, dim)) / np.sqrt(dim)
    full = roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(dim)
    covariances = {
        "diag": rng.uniform(0.1, 2, (components, dim)),
        "tied": full[0],
        "spherical": rng.uniform(0.1, 2, components),
        "full": full,
    }[kind]
    return Gmm(
        weights=rng.dirichlet(np.ones(components)),
        means=rng.normal(size=(components, dim)),
        covariances=covariances,
        covariance_type=kind,
        extractor=extractor,
    )


def blobs(centres, each=60, scale=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.asarray(centres, dtype=np.float64)
    rows = [c + scale * rng.normal(size=(each, centres.shape[1])) for c in centres]
    return np.concatenate(rows).astype(np.float32)


def write_payload(path, *, header=(), drop=(), tensors=(), metadata=None):
    """Write the payload of a sound 2-component, 3-dimensional mixture, with things replaced."""
    sound = random_gmm("diag", 2, 3)
    arrays = {n: np.array(getattr(sound, n)) for n in ("weights", "means", "covariances")}
    arrays.update(dict(tensors))
    arrays = {name: value for name, value in arrays.items() if value is not None}
    digest = hashlib.sha256()
    for name in ("weights", "means", "covariances"):
        if name in arrays:
            digest.update(arrays[name].tobytes())
    fields = {
        "version": 1,
        "covariance_type": "diag",
        "components": int(arrays["means"].shape[0]) if "means" in arrays else 2,
        "dim": int(arrays["means"].shape[-1]) if "means" in arrays else 3,
        "extractor": "ab12",
        "sha256": digest.hexdigest(),
    }
    fields.update(dict(header))
    for name in drop:
        del fields[name]
    if metadata is None:
        metadata = {"tapvit_gmm": json.dumps(fields)}
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_payload_round_trip_is_bit_identical(tmp_path, kind):
    gmm = random_gmm(kind, extractor="00ff")
    gmm.save(tmp_path / "a.gmm")
    loaded = Gmm.load(tmp_path / "a.gmm", dim=4, extractor="00ff")
    for name in ("weights", "means", "covariances"):
        assert getattr(loaded, name).dtype == np.float32
        assert getattr(loaded, name).tobytes() == getattr(gmm, name).tobytes()
    assert (loaded.covariance_type, loaded.extractor) == (kind, "00ff")
    loaded.save(tmp_path / "b.gmm")
    data = (tmp_path / "a.gmm").read_bytes()
    assert data == (tmp_path / "b.gmm").read_bytes() == gmm.payload_bytes()
    assert gmm.num_parameters * 4 < len(data) < gmm.num_parameters * 4 + 1024


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    components=st.integers(1, 9),
    dim=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_any_mixture_survives_its_payload(tmp_path_factory, kind, components, dim, seed):
    path = tmp_path_factory.mktemp("payload") / "x.gmm"
    gmm = random_gmm(kind, components, dim, seed)
    gmm.save(path, extractor="0123456789abcdef")
    loaded = Gmm.load(path)
    assert loaded.extractor == "0123456789abcdef"
    assert dataclasses.replace(loaded, extractor="").payload_bytes() == gmm.payload_bytes()


def test_payload_holds_what_the_docstring_says():
    gmm = random_gmm("diag", 3, 4, extractor="0a")
    data = gmm.payload_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert list(metadata) == ["tapvit_gmm"]
    body = gmm.weights.tobytes() + gmm.means.tobytes() + gmm.covariances.tobytes()
    assert json.loads(metadata["tapvit_gmm"]) == {
        "version": 1,
        "covariance_type": "diag",
        "components": 3,
        "dim": 4,
        "extractor": "0a",
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    assert gmm.num_parameters == 3 + 12 + 12


def test_the_handmade_payload_is_sound(tmp_path):
    gmm = Gmm.load(write_payload(tmp_path / "x.gmm"), dim=3, extractor="ab12")
    assert (gmm.components, gmm.dim) == (2, 3)


NAN = np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
ONES = np.ones((2, 3), np.float32)
BAD_PAYLOADS = {
    "version": ({"header": {"version": 2}}, "payload version 2, expected 1"),
    "version true": ({"header": {"version": True}}, "payload version True, expected 1"),
    "no version": ({"drop": ["version"]}, "payload version None, expected 1"),
    "kind": ({"header": {"covariance_type": "banded"}}, "'banded', expected one of diag, tied"),
    "kind list": ({"header": {"covariance_type": ["diag"]}}, "expected one of diag, tied"),
    "no checksum": ({"drop": ["sha256"]}, "header has the fields .*, expected components"),
    "extra field": ({"header": {"note": "x"}}, "header has the fields .*'note'"),
    "extractor": ({"header": {"extractor": "../x"}}, "expected a fingerprint"),
    "components": ({"header": {"components": "2"}}, "header's components is '2'"),
    "components differ": ({"header": {"components": 3}}, r"expected the header's \(3, 3\)"),
    "missing tensor": ({"tensors": {"weights": None}}, "holds the tensors .*expected weights"),
    "extra tensor": ({"tensors": {"evil": ONES}}, "holds the tensors .*'evil'"),
    "float64": ({"tensors": {"means": ONES.astype(np.float64)}}, "means have type F64"),
    "int": ({"tensors": {"weights": np.ones(2, np.int32)}}, "weights have type I32"),
    "weights shape": ({"tensors": {"weights": ONES}}, "weights have shape"),
    "empty": (
        {
            "tensors": {
                "weights": np.ones(0, np.float32),
                "means": np.ones((0, 3), np.float32),
                "covariances": np.ones((0, 3), np.float32),
            }
        },
        "weights have shape",
    ),
    "means shape": ({"tensors": {"means": np.ones((3, 3), np.float32)}}, "means have shape"),
    "covariances shape": ({"header": {"covariance_type": "full"}}, r"expected \(2, 3, 3\)"),
    "too many": (
        {
            "tensors": {
                "weights": np.full(257, 1 / 257, np.float32),
                "means": np.ones((257, 1), np.float32),
                "covariances": np.ones((257, 1), np.float32),
            }
        },
        "257 components in 1 dimensions, expected at most 256 and 4096",
    ),
    "too wide": (
        {
            "tensors": {
                "means": np.ones((2, 4097), np.float32),
                "covariances": np.ones((2, 4097), np.float32),
            }
        },
        "2 components in 4097 dimensions",
    ),
    "checksum": ({"header": {"sha256": "0" * 64}}, "damaged: .*expected '0000"),
    "nan": ({"tensors": {"means": NAN}}, "means hold 1 NaN or infinite"),
    "inf": ({"tensors": {"covariances": ONES * np.inf}}, "covariances hold 6 NaN or infinite"),
    "negative weight": (
        {"tensors": {"weights": np.array([1.5, -0.5], np.float32)}},
        "lowest weight is -0.5",
    ),
    "weight sum": (
        {"tensors": {"weights": np.array([0.5, 0.49], np.float32)}},
        "weights sum to 0.99",
    ),
    "variance": ({"tensors": {"covariances": ONES * 0}}, "lowest variance is 0.0"),
    "asymmetric": (
        {
            "header": {"covariance_type": "tied"},
            "tensors": {
                "covariances": np.eye(3, dtype=np.float32) + np.eye(3, k=1, dtype=np.float32)
            },
        },
        "covariance 0 is not symmetric",
    ),
    "indefinite": (
        {
            "header": {"covariance_type": "full"},
            "tensors": {
                "covariances": np.stack([np.eye(3), np.diag([1.0, 1, -1])]).astype(np.float32)
            },
        },
        "covariance 1 is not positive definite",
    ),
    "no metadata": ({"metadata": {}}, "without the metadata key 'tapvit_gmm'"),
    "other metadata": ({"metadata": {"format": "pt"}}, "without the metadata key"),
    "not JSON": ({"metadata": {"tapvit_gmm": "{"}}, "header is not valid JSON"),
    "not an object": ({"metadata": {"tapvit_gmm": "[1]"}}, "header is a list"),
    "long header": ({"metadata": {"tapvit_gmm": "[" * 5000}}, "header has 5000 characters"),
    "nested header": ({"metadata": {"tapvit_gmm": "[" * 4000}}, "header is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_PAYLOADS)
def test_bad_payloads_are_refused_by_name(tmp_path, case):
    changes, message = BAD_PAYLOADS[case]
    path = write_payload(tmp_path / "bad.gmm", **changes)
    with pytest.raises(InputError, match=message) as caught:
        Gmm.load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_mixtures_of_another_feature_space_are_refused(tmp_path):
    path = write_payload(tmp_path / "x.gmm")
    with pytest.raises(InputError, match="fitted on 3-dimensional features, expected 128"):
        Gmm.load(path, dim=128)
    with pytest.raises(InputError, match="extractor ab12, expected cd"):
        Gmm.load(path, extractor="cd")
    unknown = write_payload(tmp_path / "y.gmm", header={"extractor": ""})
    with pytest.raises(InputError, match=r"extractor \(unknown\), expected cd"):
        Gmm.load(unknown, extractor="cd")


def test_weights_that_nearly_sum_to_one_are_rescaled(tmp_path):
    weights = np.array([0.3, 0.7005], np.float32)
    gmm = Gmm.load(write_payload(tmp_path / "x.gmm", tensors={"weights": weights}))
    expected = (weights.astype(np.float64) / weights.sum(dtype=np.float64)).astype(np.float32)
    np.testing.assert_array_equal(gmm.weights, expected)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_never_executed(tmp_path, protocol):
    marker, path = tmp_path / "marker", tmp_path / "device.gmm"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
    with pytest.raises(InputError, match="looks like a pickle, refused, and never executed"):
        Gmm.load(path)
    assert not marker.exists()
    # The bomb is a real one.
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_archives_that_may_hold_pickles_are_refused(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "device.gmm"
    np.save(buffer := io.BytesIO(), np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"is a \.npy file, refused"):
        Gmm.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb(marker)))
    with pytest.raises(InputError, match="is a zip archive"):
        Gmm.load(path)
    assert not marker.exists()


def test_every_truncation_is_refused(tmp_path):
    data = random_gmm("diag", 2, 2).payload_bytes()
    path = tmp_path / "cut.gmm"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"truncated or not a GMM payload"):
            Gmm.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="truncated or not a GMM payload"):
        Gmm.load(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_garbage_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.gmm"
    path.write_bytes(data)
    with pytest.raises(InputError):
        Gmm.load(path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_mixture(tmp_path_factory, position, bit):
    gmm = random_gmm("diag", 2, 2)
    data = bytearray(gmm.payload_bytes())
    data[position % len(data)] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "x.gmm"
    path.write_bytes(data)
    try:
        loaded = Gmm.load(path)
    except InputError:
        return
    for name in ("weights", "means", "covariances"):
        assert getattr(loaded, name).tobytes() == getattr(gmm, name).tobytes()


def test_missing_and_huge_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Gmm.load(tmp_path / "none.gmm")
    with pytest.raises(InputError, match="no such file"):
        Gmm.load(tmp_path)
    huge = tmp_path / "huge.gmm"
    with huge.open("wb") as file:
        file.truncate(MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(InputError, match=f"{MAX_PAYLOAD_BYTES + 1} bytes, expected at most"):
        Gmm.load(huge)


def test_a_payload_too_large_to_load_is_not_written(tmp_path, monkeypatch):
    gmm = random_gmm("full", 4, 16)
    monkeypatch.setattr(payload, "MAX_PAYLOAD_BYTES", 4000)
    with pytest.raises(InputError, match="expected at most 4000"):
        gmm.save(tmp_path / "x.gmm")
    assert list(tmp_path.iterdir()) == []


def test_handmade_mixtures_are_checked():
    sound = random_gmm("diag")
    sound.validate("hand")
    for change, message in (
        ({"weights": [0.5, 0.5, 0.5]}, "hand: the weights sum to 1.5"),
        ({"covariance_type": "x"}, "hand: covariance type is 'x'"),
        ({"extractor": "XYZ"}, "hand: extractor is 'XYZ'"),
        ({"means": np.full((3, 4), 1e300)}, "hand: means hold 12 NaN or infinite"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(sound, **change).validate("hand")
    with pytest.raises(InputError, match="means: expected an array of real numbers"):
        dataclasses.replace(sound, means=[["a"]])
    with pytest.raises(ValueError, match="read-only"):
        sound.means[0] = 0
    for again in (copy.deepcopy(sound), pickle.loads(pickle.dumps(sound))):
        with pytest.raises(ValueError, match="read-only"):
            again.means[0] = 0
        np.testing.assert_array_equal(again.covariances, sound.covariances)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recovers_the_blobs(kind):
    centres = np.array([[0, 0, 0], [6, 0, 0], [0, 6, 0], [0, 0, 6]], float)
    config = GmmConfig(components=(1, 2, 3, 4, 5, 6), covariance_type=kind, seed=3)
    gmm, table = fit_report(blobs(centres), config)
    assert gmm.components == 4
    assert [row["components"] for row in table] == [1, 2, 3, 4, 5, 6]
    assert min((r for r in table if r["eligible"]), key=lambda r: r["bic"])["components"] == 4
    distances = np.linalg.norm(gmm.means[:, None] - centres, axis=-1)
    assert sorted(distances.argmin(axis=1)) == [0, 1, 2, 3]
    assert distances.min(axis=1).max() < 0.2
    np.testing.assert_allclose(gmm.weights, 0.25, atol=0.01)
    diagonal = gmm.covariances
    if kind in ("tied", "full"):
        diagonal = np.diagonal(diagonal, axis1=-2, axis2=-1)
    np.testing.assert_allclose(diagonal, 0.09, rtol=0.6)
    again = Gmm.fit(blobs(centres), config)
    assert again.payload_bytes() == gmm.payload_bytes()


def test_bic_is_that_of_the_unscaled_features():
    rng = np.random.default_rng(0)
    data = 7 + 5 * rng.normal(size=(200, 2))
    _, table = fit_report(data, GmmConfig(components=(1,), variance_floor=1e-9))
    variance = data.var(axis=0)
    log_likelihood = -0.5 * 200 * np.sum(np.log(2 * np.pi * variance) + 1)
    np.testing.assert_allclose(table[0]["bic"], -2 * log_likelihood + 4 * np.log(200), rtol=1e-7)


def test_fit_far_from_the_origin_does_not_cancel():
    near = blobs([[0, 0], [8, 0]], scale=1.0)
    config = GmmConfig(components=(2,))
    far, here = Gmm.fit(near + np.float32(4096), config), Gmm.fit(near, config)
    np.testing.assert_allclose(far.means - 4096, here.means, atol=2e-3)
    np.testing.assert_allclose(far.covariances, here.covariances, rtol=2e-3)


def test_a_component_without_enough_members_is_not_eligible():
    data = np.concatenate([blobs([[0, 0], [20, 0]], each=50), blobs([[0, 40]], each=4, seed=1)])
    gmm, table = fit_report(data, GmmConfig(components=(2, 3), min_members=10))
    assert [row["eligible"] for row in table] == [True, False]
    assert table[1]["bic"] < table[0]["bic"]
    assert gmm.components == 2
    assert Gmm.fit(data, GmmConfig(components=(2, 3), min_members=4)).components == 3


def test_too_few_samples_for_the_components():
    data = blobs([[0, 0], [9, 9]], each=12)
    gmm, table = fit_report(data, GmmConfig())
    assert [row["components"] for row in table] == [1, 2]
    assert gmm.components == 2
    with pytest.raises(InputError, match=r"24 samples, expected at least 50 \(5 components"):
        Gmm.fit(data, GmmConfig(components=(5,)))
    with pytest.raises(InputError, match="9 samples, expected at least 10"):
        Gmm.fit(data[:9])
    lopsided = np.concatenate([blobs([[0, 0]], each=38, scale=0.01), blobs([[99, 0]], each=2)])
    with pytest.raises(InputError, match="2 components leaves one of them with fewer than the 10"):
        Gmm.fit(lopsided, GmmConfig(components=(2,)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_floor_holds(kind):
    data = blobs([[0, 0, 0], [9, 0, 0]], scale=0.001)
    data[:, 2] = 5
    config = GmmConfig(components=(2,), covariance_type=kind, variance_floor=1e-2)
    gmm = Gmm.fit(data, config)
    floor = 1e-2 * data.astype(np.float64).var(axis=0).mean()
    lowest = gmm.covariances.min()
    if kind in ("tied", "full"):
        lowest = np.linalg.eigvalsh(gmm.covariances.astype(np.float64)).min()
    assert floor <= lowest < 1.01 * floor


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((20, 3)), "all 20 samples are the same"),
        (np.full((20, 3), 0.1), "all 20 samples are the same"),
        (np.ones(20), r"shape \(20,\), expected"),
        (np.ones((20, 0)), r"shape \(20, 0\)"),
        (np.ones((0, 3)), r"shape \(0, 3\)"),
        (np.full((20, 3), np.nan), "60 values that are NaN"),
        (np.full((20, 3), 1e300), "60 values that are NaN or infinite in float32"),
        ([["a", "b"]], "expected an array of real numbers"),
        (1e25 * np.random.default_rng(0).normal(size=(40, 2)), "covariances hold"),
    ],
)
def test_bad_private_features(features, message):
    with pytest.raises(InputError, match=message):
        Gmm.fit(features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": ()}, "components is"),
        ({"components": (0,)}, "components is"),
        ({"components": (257,)}, "from 1 to 256"),
        ({"covariance_type": "x"}, "expected one of 'diag'"),
        ({"variance_floor": 0.0}, "variance_floor is 0.0"),
        ({"variance_floor": float("nan")}, "variance_floor is nan"),
        ({"min_members": 0}, "min_members is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(InputError, match=message):
        GmmConfig(**changes)


def test_small_factorizations_take_one_thread():
    def threads():
        return [found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"]

    import scipy.linalg  # noqa: F401, whose library is another than NumPy's

    before = threads()
    if max(before, default=1) == 1:
        pytest.skip("BLAS has one thread here")
    with gmm_module.one_blas_thread(64):
        assert set(threads()) == {1}
    assert threads() == before
    with gmm_module.one_blas_thread(4096):
        assert threads() == before


def test_libraries_that_are_loaded_later_take_one_thread_too():
    program = """
from threadpoolctl import threadpool_info
from tapvit_jax.proxy.gmm import one_blas_thread

with one_blas_thread(64):
    pass
import scipy.linalg

with one_blas_thread(64):
    found = [i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"]
assert set(found) <= {1}, found
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_config_survives_json():
    config = GmmConfig(components=(2, 4), covariance_type="tied")
    assert from_plain(GmmConfig, json.loads(json.dumps(to_plain(config)))) == config
