"""Extractors: what their features are, that they survive the disk, and what is refused."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash
from tapvit_jax.models import backbone, convnet
from tapvit_jax.proxy import features
from tapvit_jax.proxy.features import (
    Extractor,
    ExtractorConfig,
    build_extractor,
    embedding_network,
)
from tests.conftest import realistic

PREPROCESS = Preprocess(8, (0.0,) * 3, (1.0,) * 3)
COUNT = 11
EMBEDDING = ExtractorConfig(kind="embedding", dim=3, widths=(4, 6), embed_dim=5)
BACKBONE = ExtractorConfig(kind="backbone", dim=4, depth=2)
POOLED = ExtractorConfig(kind="pooled", dim=4)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((COUNT, 8, 8, 3)).astype(np.float32)
    return MemorySource(images, np.zeros(COUNT, int), ["a", "b"])


@pytest.fixture(scope="module")
def pool():
    return np.arange(COUNT)


@pytest.fixture(scope="module")
def network():
    config = embedding_network(EMBEDDING, PREPROCESS, 2)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), convnet.param_shapes(config))
    return config, realistic(ones)


@pytest.fixture(scope="module")
def extractors(tiny_model, source, pool, network):
    config, params = network
    return {
        "embedding": build_extractor(
            EMBEDDING, source, pool, PREPROCESS, network=config, params=params
        ),
        "backbone": build_extractor(BACKBONE, source, pool, PREPROCESS, model=tiny_model),
        "pooled": build_extractor(POOLED, source, pool, PREPROCESS, model=tiny_model),
    }


@pytest.fixture(scope="module")
def raw(tiny_model, source, network):
    """The networks' outputs before the PCA."""
    config, params = network

    def early(x):
        x = backbone.embed(tiny_model.config, tiny_model.params, x)
        for i in range(BACKBONE.depth):
            x = backbone.apply_block(
                tiny_model.config.block_spec(i), tiny_model.params[f"blocks_{i}"], x
            )
        return x.mean(axis=1)

    def last(x):
        x = backbone.apply_blocks(tiny_model.config, tiny_model.params, x)
        scale, bias = (tiny_model.params["norm"][name] for name in ("scale", "bias"))
        token = x[:, 0] - x[:, 0].mean(axis=1, keepdims=True)
        return token / jnp.sqrt((token**2).mean(axis=1, keepdims=True) + 1e-6) * scale + bias

    embedding = jax.jit(convnet.embedding, static_argnums=0)
    return {
        "embedding": np.asarray(embedding(config, params, source.images)),
        "backbone": np.asarray(jax.jit(early)(source.images)),
        "pooled": np.asarray(jax.jit(last)(source.images)),
    }


KINDS = pytest.mark.parametrize("kind", ["embedding", "backbone", "pooled"])


@KINDS
def test_features_are_the_principal_components(extractors, raw, source, pool, kind):
    extractor = extractors[kind]
    found = extractor.features(source, pool, 4)
    centred = np.float64(raw[kind]) - np.float64(raw[kind]).mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[: extractor.dim].T
    variances = values[: extractor.dim] ** 2 / (COUNT - 1)
    expected /= np.sqrt(variances.mean())
    signs = np.sign((found * expected).sum(axis=0))
    assert found.shape == (COUNT, extractor.dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected * signs, atol=1e-4)


@pytest.mark.parametrize("whiten", [False, True])
def test_scales(source, pool, network, whiten):
    config, params = network
    options = dataclasses.replace(EMBEDDING, whiten=whiten)
    extractor = build_extractor(options, source, pool, PREPROCESS, network=config, params=params)
    covariance = np.cov(extractor.features(source, pool).T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    assert np.diag(covariance).mean() == pytest.approx(1, abs=1e-4)
    assert np.allclose(np.diag(covariance), 1, atol=1e-4) == whiten


@KINDS
def test_the_same_pool_gives_the_same_extractor(
    extractors, source, pool, network, tiny_model, kind
):
    config, params = network
    options, parts = {
        "embedding": (EMBEDDING, {"network": config, "params": params}),
        "backbone": (BACKBONE, {"model": tiny_model}),
        "pooled": (POOLED, {"model": tiny_model}),
    }[kind]
    again = build_extractor(options, source, pool, PREPROCESS, **parts)
    assert again.fingerprint == extractors[kind].fingerprint
    other = build_extractor(options, source, pool[:-1], PREPROCESS, **parts)
    assert other.fingerprint != again.fingerprint


def test_large_pools_are_fitted_by_some_of_their_images(source, pool, network, monkeypatch):
    monkeypatch.setattr(features, "_FIT_ROWS", 8)
    read = []

    def load(indices, preprocess):
        read.append(indices)
        return MemorySource.load(source, indices, preprocess)

    monkeypatch.setattr(source, "load", load)
    parts = {"network": network[0], "params": network[1]}
    found = [build_extractor(EMBEDDING, source, pool, PREPROCESS, **parts) for _ in range(2)]
    first, again = np.reshape(np.concatenate(read), (2, 8))
    assert (np.diff(first) > 0).all()
    np.testing.assert_array_equal(first, again)
    assert found[0].fingerprint == found[1].fingerprint


def test_the_backbone_keeps_no_more_than_it_uses(extractors):
    extractor = extractors["backbone"]
    assert len(extractor.network.blocks) == 2
    assert extractor.params.keys() == {
        "patch_embed",
        "pos_embed",
        "cls_token",
        "blocks_0",
        "blocks_1",
    }
    assert "head" not in extractors["embedding"].params


@pytest.mark.parametrize("batch_size", [1, 4, COUNT, 30])
def test_features_stand_in_the_order_of_the_indices(extractors, source, batch_size):
    extractor = extractors["embedding"]
    indices = np.array([7, 0, 3, 3, 10, 1])
    counted = []
    found = extractor.features(source, indices, batch_size, counted.append)
    expected = np.asarray(extractor(source.images))[indices]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    together = batch_size * min(len(jax.devices()), -(-len(indices) // batch_size))
    assert sum(counted) == len(indices)
    assert len(counted) == -(-len(indices) // together)


@KINDS
def test_features_are_the_same_bits_on_any_devices(extractors, source, pool, kind, monkeypatch):
    extractor = extractors[kind]
    every = extractor.features(source, pool, 2)
    devices = jax.local_devices()
    for count in (1, 3):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: devices[:count])
        np.testing.assert_array_equal(extractor.features(source, pool, 2), every)


def test_how_images_are_read_is_passed_on_and_told(extractors, source, pool, network, monkeypatch):
    asked, shares = [], []

    def read(*args, workers):
        asked.append((args[-1] // jax.local_device_count(), workers))
        return batches(*args)

    monkeypatch.setattr(features, "batches", read)
    extractors["embedding"].features(source, np.tile(pool, 8), 2, workers=1)
    parts = {"network": network[0], "params": network[1]}
    options = {"batch_size": 3, "workers": 2, "on_share": shares.append}
    build_extractor(EMBEDDING, source, np.tile(pool, 8), PREPROCESS, **parts, **options)
    assert asked == [(2, 1), (3, 2)]
    assert len(shares) > 1 and sum(shares) == pytest.approx(1)


def test_no_images_have_no_features(extractors, source):
    assert extractors["embedding"].features(source, np.zeros(0, int)).shape == (0, 3)


@KINDS
def test_round_trip(tmp_path, extractors, source, pool, kind):
    extractor = extractors[kind]
    extractor.save(tmp_path / "extractor")
    found = Extractor.load(tmp_path / "extractor")
    assert found.fingerprint == extractor.fingerprint
    assert (found.kind, found.network, found.preprocess) == (
        extractor.kind,
        extractor.network,
        extractor.preprocess,
    )
    np.testing.assert_array_equal(
        found.features(source, pool, 4), extractor.features(source, pool, 4)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["extractor"]


def test_the_fingerprint_changes_with_everything(extractors):
    extractor = extractors["embedding"]
    params = jax.tree.map(np.array, extractor.params)
    params["embed"]["bias"][0] = np.nextafter(params["embed"]["bias"][0], np.float32(np.inf))
    changes = [
        {"params": params},
        {"mean": np.nextafter(extractor.mean, np.float32(np.inf))},
        {"projection": extractor.projection * np.float32(1.5)},
        {"projection": extractor.projection[:, :2]},
        {"preprocess": dataclasses.replace(PREPROCESS, crop_pct=0.9)},
        {"network": dataclasses.replace(extractor.network, stem_stride=2)},
        {"kind": "backbone"},
    ]
    prints = [dataclasses.replace(extractor, **change).fingerprint for change in changes]
    prints += [extractor.fingerprint, extractors["backbone"].fingerprint]
    assert len(set(prints)) == len(changes) + 2
    assert dataclasses.replace(extractor).fingerprint == extractor.fingerprint
    on_device = dataclasses.replace(extractor, mean=jnp.asarray(extractor.mean))
    assert on_device.fingerprint == extractor.fingerprint


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (32, 1), (33, 2), (96, 2), (97, 4), (224, 4)])
def test_large_images_are_shrunk_at_once(side, stride):
    preprocess = Preprocess(side, (0.5,), (0.5,), channels=1)
    network = embedding_network(EMBEDDING, preprocess, 7)
    assert (network.stem_stride, network.in_channels, network.num_classes) == (stride, 1, 7)


def test_dims_that_the_network_does_not_have_are_refused(source, pool, network):
    config, params = network
    options = dataclasses.replace(EMBEDDING, dim=6)
    with pytest.raises(InputError, match="keeps 6 dimensions, expected 1 to 5 "):
        build_extractor(options, source, pool, PREPROCESS, network=config, params=params)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_dims_that_the_pool_does_not_have_are_refused(source, pool, network, count):
    config, params = network
    with pytest.raises(InputError, match=f"keeps 3 dimensions.*{count} pool images"):
        build_extractor(EMBEDDING, source, pool[:count], PREPROCESS, network=config, params=params)


def test_features_that_are_not_finite_are_refused(source, pool, tiny_model, network):
    def broken(params):
        return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)

    model = tiny_model.replace(params=broken(tiny_model.params))
    for options in (BACKBONE, POOLED):
        with pytest.raises(InputError, match="tiny: features hold NaN or infinity"):
            build_extractor(options, source, pool, PREPROCESS, model=model)
    parts = {"network": network[0], "params": broken(network[1])}
    with pytest.raises(InputError, match="network: features hold NaN or infinity"):
        build_extractor(EMBEDDING, source, pool, PREPROCESS, **parts)


def test_missing_parts_are_refused(source, pool, tiny_model, network):
    with pytest.raises(InputError, match="kind 'backbone' needs a model"):
        build_extractor(BACKBONE, source, pool, PREPROCESS)
    with pytest.raises(InputError, match="needs a trained network"):
        build_extractor(EMBEDDING, source, pool, PREPROCESS, network=network[0])
    for depth in (4, 7):
        options = dataclasses.replace(BACKBONE, depth=depth)
        with pytest.raises(InputError, match=f"depth is {depth}, expected 1 to 3 blocks"):
            build_extractor(options, source, pool, PREPROCESS, model=tiny_model)


@pytest.fixture
def directory(tmp_path, extractors):
    extractors["embedding"].save(tmp_path / "extractor")
    return tmp_path / "extractor"


def change_spec(directory, **changes):
    path = directory / features.SPEC_FILE
    spec = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in spec.items() if value is not ...}))


def refused(directory, message):
    with pytest.raises(InputError, match=message) as caught:
        Extractor.load(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("file", [features.SPEC_FILE, features.PARAMS_FILE])
def test_a_missing_file(directory, file):
    (directory / file).unlink()
    refused(directory, f"{file}: no such file")


@pytest.mark.parametrize("kind", ["embedding", "backbone", "pooled"])
def test_images_that_are_not_prepared_are_refused(extractors, kind):
    with pytest.raises(InputError, match="dtype uint8, expected floats, prepared"):
        extractors[kind](np.ones((2, 8, 8, 3), np.uint8))


def test_an_embedding_needs_labels():
    with pytest.raises(
        InputError, match="'embedding' trains on the pool's labels, and it has none"
    ):
        embedding_network(EMBEDDING, PREPROCESS, 0)


def test_what_is_no_extractor(directory, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.json").write_text("{}")
    refused(tmp_path / "dense", ": is a model, expected an extractor's directory")
    refused(directory / features.PARAMS_FILE, ": is a file, expected an extractor's directory")


def test_truncated_or_altered_params(directory):
    path = directory / features.PARAMS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    refused(directory, "checksum differs")
    change_spec(directory, params_sha256=file_hash(path))
    refused(directory, "truncated")
    change_spec(directory, params_sha256=...)
    refused(directory, "checksum differs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("pca/mean"), "missing pca/mean"),
        (lambda a: a.pop("pca/projection"), "missing pca/projection"),
        (lambda a: a.pop("network/embed/bias"), "missing network/embed/bias"),
        (lambda a: a.update({"pca/more": np.zeros(2)}), "unexpected pca/more"),
        (lambda a: a.update({"more": np.zeros(2)}), "unexpected more"),
        (lambda a: a.update({"network/head/bias": np.zeros(2)}), "unexpected network/head/bias"),
        (lambda a: a.update({"pca/mean": np.zeros(4, np.float32)}), "pca/mean has shape"),
        (lambda a: a.update({"pca/mean": np.zeros(5)}), "pca/mean has dtype float64"),
        (lambda a: a.update({"pca/projection": np.zeros(5, np.float32)}), "pca/projection"),
        (lambda a: a.update({"pca/projection": np.zeros((4, 3), np.float32)}), "pca/projection"),
        (lambda a: a.update({"pca/projection": np.zeros((5, 0), np.float32)}), "pca/projection"),
        (lambda a: a.update({"pca/projection": np.zeros((5, 6), np.float32)}), "pca/projection"),
        (lambda a: a.update({"pca/projection": np.zeros((5, 3), np.int32)}), "dtype int32"),
    ],
)
def test_arrays_that_do_not_fit(directory, change, message):
    path = directory / features.PARAMS_FILE
    arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    change_spec(directory, params_sha256=file_hash(path))
    refused(directory, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tapvit-model"}, "is not a tapvit-extractor file"),
        ({"version": 2}, "has version 2, expected 1"),
        ({"kind": "magic"}, "kind is 'magic'"),
        ({"kind": "backbone"}, "network"),
        ({"network": ...}, "network is None"),
        ({"preprocess": ...}, "preprocess is None"),
        ({"network.widths": [4]}, "missing network/convs|unexpected network/convs"),
        ({"network.widths": [4, -6]}, "widths"),
        ({"network.widths": []}, "widths"),
        ({"network.embed_dim": -5}, "embed_dim is -5"),
        ({"network.num_classes": 0}, "num_classes is 0"),
        ({"network.stem_stride": 3}, "stem_stride is 3"),
        ({"preprocess.image_size": 16}, "images of 16 pixels and 3 channels"),
        (
            {"preprocess.channels": 1, "preprocess.mean": [0], "preprocess.std": [1]},
            "8 pixels and 1 ",
        ),
    ],
)
def test_a_tampered_spec(directory, changes, message):
    spec = json.loads((directory / features.SPEC_FILE).read_text())
    for name, value in changes.items():
        field, _, inner = name.partition(".")
        spec[field] = spec[field] | {inner: value} if inner else value
    change_spec(directory, **spec)
    refused(directory, message)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path, directory):
    path, marker = directory / features.PARAMS_FILE, tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    change_spec(directory, params_sha256=file_hash(path))
    refused(directory, r"not a \.safetensors file")
    assert not marker.exists()
    pickle.loads(path.read_bytes()).close()
    assert marker.exists()
