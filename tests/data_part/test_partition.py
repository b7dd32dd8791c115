import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapvit_jax import structs
from tapvit_jax.data.partition import (
    PartitionConfig,
    partition,
)
from tapvit_jax.errors import InputError

KINDS = ("disjoint", "overlap", "shards", "dirichlet", "iid")
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 40))
SPLITS = np.where(np.arange(400) % 4 == 0, "val", "train")


def config(kind, **changes):
    fields = {"kind": kind, "classes_per_device": 4 if kind == "overlap" else None}
    return PartitionConfig(**(fields | changes))


def private(device):
    return np.concatenate([device.private_train, device.private_test])


def everything(result):
    return np.concatenate(list(result.parts().values()))


def counts(labels, part, classes=10):
    return np.bincount(labels[part], minlength=classes)


@given(st.data())
def test_parts_are_disjoint_stratified_and_cover_everything(data):
    draw = data.draw
    kind = draw(st.sampled_from(KINDS))
    num_classes = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 40), min_size=num_classes, max_size=num_classes))
    # Class numbers with gaps: a source need not have images of all its classes.
    labels = np.repeat(3 * np.arange(num_classes), sizes)
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    fraction = st.floats(0.05, 0.95)
    cfg = PartitionConfig(
        kind=kind,
        num_devices=draw(st.integers(1, 6)),
        classes_per_device=draw(
            st.integers(1, num_classes) if kind == "overlap" else st.none() | st.integers(1, 4)
        ),
        shards_per_device=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([0.001, 0.1, 1.0, 1e6])),
        public_fraction=draw(st.floats(0.05, 0.7)),
        validation_fraction=draw(st.floats(0.05, 0.25)),
        private_test_fraction=draw(fraction),
        private_split=draw(st.sampled_from([None, "val"])),
    )
    splits = np.where(np.arange(len(labels)) % 3 == 0, "val", "train")
    seed = draw(st.integers(0, 2**40))
    try:
        result = partition(labels, cfg, seed, splits)
    except InputError as error:
        assert "images" in str(error) or "classes" in str(error)
        return
    assert len(set(everything(result))) == len(everything(result))
    for part in result.parts().values():
        assert (np.diff(part) > 0).all()
    assert len(result.devices) == cfg.num_devices
    assert len(result.public_pool) and len(result.public_validation)
    for device in result.devices:
        assert len(device.private_train) and len(device.private_test)
        present = set(labels[private(device)].tolist())
        assert present <= set(device.classes)
        if kind not in ("disjoint", "overlap"):
            assert present == set(device.classes)
        cut = cfg.private_test_fraction * counts(labels, private(device), 24)
        assert (np.abs(counts(labels, device.private_test, 24) - cut) <= 1 + 1e-9).all()
    placed = everything(result)
    left_out = np.setdiff1d(np.arange(len(labels)), placed)
    owned = {c for device in result.devices for c in device.classes}
    assert not owned & set(labels[left_out].tolist())
    public = np.concatenate([result.public_pool, result.public_validation])
    devices = np.concatenate([private(d) for d in result.devices])
    if cfg.private_split is None:
        for part, share in (
            (result.public_pool, cfg.public_fraction),
            (public, cfg.public_fraction + cfg.validation_fraction),
        ):
            wanted = share * counts(labels, np.arange(len(labels)), 24)
            assert (np.abs(counts(labels, part, 24) - wanted) <= 1 + 1e-6).all()
    else:
        assert set(splits[devices]) == {"val"}
        assert set(splits[public]) == {"train"}
        np.testing.assert_array_equal(np.sort(public), np.flatnonzero(splits == "train"))
    again = partition(labels, cfg, seed, splits)
    for name, part in again.parts().items():
        np.testing.assert_array_equal(part, result.parts()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_matters(kind):
    first, second = (partition(LABELS, config(kind), seed) for seed in (1, 2))
    assert first.public_pool.tolist() != second.public_pool.tolist()
    assert first.devices[0].private_test.tolist() != second.devices[0].private_test.tolist()


def test_disjoint_owns_every_class_once():
    result = partition(LABELS, config("disjoint"), 0)
    assert [d.classes for d in result.devices] == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    for device in result.devices:
        assert set(LABELS[private(device)]) == set(device.classes)


def test_disjoint_with_fewer_classes_leaves_some_out():
    result = partition(LABELS, config("disjoint", classes_per_device=2), 0)
    assert [d.classes for d in result.devices] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    left_out = np.setdiff1d(np.arange(400), everything(result))
    assert len(left_out) == 32
    assert set(LABELS[left_out]) == {8, 9}


def test_overlap_shares_each_image_out_once():
    result = partition(LABELS, config("overlap"), 0)
    assert [d.classes for d in result.devices] == [
        (0, 1, 2, 3),
        (2, 3, 4, 5),
        (5, 6, 7, 8),
        (0, 7, 8, 9),
    ]
    shares = np.stack([counts(LABELS, private(d)) for d in result.devices])
    np.testing.assert_array_equal(shares.sum(axis=0), 16)
    np.testing.assert_array_equal(shares[:, 0], [8, 0, 0, 8])
    np.testing.assert_array_equal(shares[:, 1], [16, 0, 0, 0])


def test_overlap_allows_more_devices_than_classes():
    result = partition(LABELS, config("overlap", num_devices=20, classes_per_device=1), 0)
    assert [d.classes for d in result.devices] == [(d // 2,) for d in range(20)]


def test_shards_limit_the_classes():
    for seed in range(10):
        result = partition(LABELS, config("shards", num_devices=5), seed)
        # Ten shards of twenty are the ten classes.
        assert all(len(d.classes) == 2 for d in result.devices)
        assert sorted(c for d in result.devices for c in d.classes) == list(range(10))


def test_alpha_controls_the_skew():
    def skew(alpha):
        shares = [
            counts(LABELS, private(d))
            for seed in range(10)
            for d in partition(LABELS, config("dirichlet", alpha=alpha), seed).devices
        ]
        return np.std(shares)

    assert skew(0.1) > 1.5 * skew(1.0) > 3 * skew(1000.0)


@pytest.mark.parametrize("kind", KINDS)
def test_private_split(kind):
    result = partition(LABELS, config(kind, private_split="val"), 0, SPLITS)
    np.testing.assert_array_equal(np.sort(everything(result)), np.arange(400))
    public = np.concatenate([result.public_pool, result.public_validation])
    assert set(SPLITS[public]) == {"train"}
    assert len(result.public_validation) == 30
    for device in result.devices:
        assert set(SPLITS[private(device)]) == {"val"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "random"}, "kind is 'random', expected one of 'disjoint'"),
        ({"num_devices": 0}, "num_devices is 0"),
        ({"num_devices": 10**12}, "num_devices is 1000000000000, expected 1 to 65536"),
        ({"num_devices": 2.0}, "num_devices is 2.0"),
        ({"num_devices": True}, "num_devices is True"),
        ({"shards_per_device": 0}, "shards_per_device is 0"),
        ({"classes_per_device": 0}, "classes_per_device is 0"),
        ({"kind": "overlap"}, "needs classes_per_device"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": 1e7}, "alpha is 10000000.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"public_fraction": 0.0}, "public_fraction is 0.0"),
        ({"public_fraction": 1.0}, "public_fraction is 1.0"),
        ({"private_test_fraction": 1}, "private_test_fraction is 1"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"public_fraction": 0.95}, "add up to 1.05"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(InputError, match=message):
        PartitionConfig(**change)


def test_config_survives_json():
    cfg = config("overlap", private_split="val")
    assert structs.from_plain(PartitionConfig, structs.to_plain(cfg)) == cfg


@pytest.mark.parametrize(
    ("labels", "cfg", "message"),
    [
        ([], {}, "needs labels for every image"),
        ([[0, 1]], {}, r"labels of shape \(1, 2\)"),
        ([0.5, 1.0], {}, "type float64"),
        ([0, 1, -1, 0], {}, "found 1 without"),
        ([0] * 8, {"kind": "iid"}, "device 0 gets 1 private images"),
        (LABELS, {"num_devices": 11}, "11 devices cannot own disjoint sets of 10 classes"),
        (LABELS, {"classes_per_device": 3}, "need 12 classes, found 10"),
        (LABELS, {"kind": "overlap", "classes_per_device": 11}, "is 11, found 10 classes"),
        (LABELS, {"kind": "shards", "shards_per_device": 60}, "cannot be cut into 240 shards"),
        ([0] * 40, {"kind": "dirichlet", "alpha": 0.001}, "alpha 0.001 leaves some of 4 devices"),
        ([0] * 8, {"kind": "dirichlet"}, "3 private images are too few for 4 devices"),
        (LABELS, {"private_split": "val"}, "private_split is 'val', the source's splits are: none"),
    ],
)
def test_partition_refuses(labels, cfg, message):
    with pytest.raises(InputError, match=message):
        partition(np.array(labels), PartitionConfig(**cfg), 0)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (SPLITS[:5], "one for each of 400"),
        (["train"] * 400, "private_split is 'val', the source's splits are: train"),
        (["val"] * 400, "0 images for the public pool"),
    ],
)
def test_wrong_splits(splits, message):
    with pytest.raises(InputError, match=message):
        partition(LABELS, PartitionConfig(private_split="val"), 0, splits)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_wrong_seed(seed):
    with pytest.raises(InputError, match="seed is"):
        partition(LABELS, PartitionConfig(), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_source_always_works(kind):
    for seed in range(20):
        result = partition(LABELS, config(kind), seed)
        assert len(result.public_pool) == 200
        np.testing.assert_array_equal(counts(LABELS, result.public_validation), 4)
        np.testing.assert_array_equal(np.sort(everything(result)), np.arange(400))


def test_iid_gives_everyone_as_much():
    for devices in (3, 4):
        sizes = [
            len(private(d))
            for d in partition(LABELS, config("iid", num_devices=devices), 0).devices
        ]
        assert sum(sizes) == 160 and max(sizes) - min(sizes) <= 1
