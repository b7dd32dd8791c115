import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tapvit_jax import structs
from tapvit_jax.data import sources
from tapvit_jax.data import tfds as tfds_module
from tapvit_jax.data.base import find_corrupt
from tapvit_jax.data.sources import (
    DigitsSource,
    FolderSource,
    Preprocess,
    TfdsSource,
    open_source,
)
from tapvit_jax.errors import InputError
from tests.data_part.image_files import RGB

GREY = Preprocess(8, channels=1, mean=(0.0,), std=(1.0,))


# Preprocess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": True}, "image_size is True"),
        ({"image_size": 8.0}, "image_size is 8.0"),
        ({"channels": 2}, "channels is 2"),
        ({"mean": (0.5,)}, "mean and std have 1 and 3 entries, expected 3"),
        ({"mean": (0.0, float("nan"), 0.0)}, r"mean\[1\] is nan, expected a number"),
        ({"mean": (0.0, float("inf"), 0.0)}, "mean is .* expected finite"),
        ({"std": (1.0, 0.0, 1.0)}, "std is"),
        ({"std": (1.0, 1.0)}, "mean and std have 3 and 2 entries"),
        ({"crop_pct": 0}, "crop_pct is 0"),
        ({"crop_pct": 1.1}, "crop_pct is 1.1"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
    ],
)
def test_preprocess_refuses(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(RGB, **change)


def test_preprocess_survives_json():
    preprocess = dataclasses.replace(RGB, crop_pct=0.875, interpolation="bilinear")
    plain = json.loads(json.dumps(structs.to_plain(preprocess)))
    assert structs.from_plain(Preprocess, plain) == preprocess
    with pytest.raises(InputError, match="did you mean crop_pct"):
        structs.from_plain(Preprocess, plain | {"crop_pc": 1.0})


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (21, 64)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_preprocess_is_resize_then_crop_then_normalise(size, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    preprocess = Preprocess(
        14, mean=RGB.mean, std=RGB.std, crop_pct=0.875, interpolation=interpolation
    )
    scale = 16
    resized = (scale, int(scale * size[1] / size[0]))
    if size[0] > size[1]:
        resized = (int(scale * size[0] / size[1]), scale)
    filter = Image.Resampling[interpolation.upper()]
    whole = np.asarray(Image.fromarray(noise).resize(resized, filter), np.float64) / 255
    top, left = round((resized[1] - 14) / 2), round((resized[0] - 14) / 2)
    expected = (whole[top : top + 14, left : left + 14] - RGB.mean) / RGB.std
    found = preprocess.array(Image.fromarray(noise))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shorter_side_of_the_right_size_is_left_alone():
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    plain = Preprocess(6, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_array_equal(
        plain.array(Image.fromarray(noise)), noise[:, 2:8].astype(np.float32) / np.float32(255)
    )


def test_every_mode_becomes_the_asked_for_channels():
    plain = Preprocess(4, mean=(0, 0, 0), std=(1, 1, 1))
    grey = Preprocess(4, channels=1, mean=(0,), std=(1,))
    palette = Image.new("RGB", (4, 4), (200, 100, 0)).quantize(4)
    palette.info["transparency"] = b"\x00\x80"
    deep = Image.fromarray(np.full((4, 4), 200 * 257, np.uint16))
    colour = np.float32([200, 100, 0]) / 255
    same = np.float32([200, 200, 200]) / 255
    for image, value in [
        (Image.new("RGBA", (4, 4), (200, 100, 0, 9)), colour),
        (palette, colour),
        (Image.new("L", (4, 4), 200), same),
        (Image.new("LA", (4, 4), (200, 7)), same),
        (deep, same),
        (Image.fromarray(np.full((4, 4), 200 * 257, np.int32)), same),
        (Image.fromarray(np.full((4, 4), 200 / 255, np.float32)), same),
        (Image.new("1", (4, 4), 1), np.ones(3)),
    ]:
        array = plain.array(image)
        np.testing.assert_allclose(array, np.broadcast_to(value, (4, 4, 3)), atol=1e-6)
        assert grey.array(image).shape == (4, 4, 1)
    np.testing.assert_allclose(grey.array(deep), 200 / 255, atol=1e-6)


# Digits


def test_digits_are_exact():
    source = DigitsSource()
    assert len(source) == 1797
    assert source.class_names == tuple("0123456789")
    assert source.labels.dtype == np.int32
    assert set(source.splits) == {"train"}
    digits = load_digits()
    np.testing.assert_array_equal(source.labels, digits.target)
    np.testing.assert_array_equal(source.load(range(1797), GREY)[..., 0], digits.images / 16)
    assert source.describe(17) == "digits[17]"


def test_digits_are_resized_without_rounding_to_bytes():
    source = DigitsSource()
    large = dataclasses.replace(GREY, image_size=16, interpolation="bilinear")
    pixels = Image.fromarray((load_digits().images[3] / 16).astype(np.float32))
    expected = np.asarray(pixels.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(source.load([3], large)[0, ..., 0], expected)
    three = Preprocess(8, mean=(0.5,) * 3, std=(0.5,) * 3)
    array = source.load([3], three)
    np.testing.assert_array_equal(array[..., 2], source.load([3], GREY)[..., 0] * 2 - 1)


def test_digits_follow_the_models_classes():
    swapped = ("1", "0", *"23456789", "ten")
    source = DigitsSource(swapped)
    assert source.class_names == swapped
    np.testing.assert_array_equal(source.labels[:3], [1, 0, 2])
    assert source.fingerprint() != DigitsSource().fingerprint()
    assert source.images_fingerprint() == DigitsSource().images_fingerprint()
    with pytest.raises(InputError, match="digits: labels out of range: 8, 9 are not"):
        DigitsSource(tuple("01234567"))


@pytest.mark.parametrize("indices", [[0, 1797], [-1], [0.5], [[1]], ["a"], 3])
def test_bad_indices(indices):
    with pytest.raises(InputError, match="digits: image ind"):
        DigitsSource().load(indices, GREY)


def test_no_indices():
    assert DigitsSource().load([], GREY).shape == (0, 8, 8, 1)


# TensorFlow Datasets


def write_tfds(root, splits, names=("cat", "dog"), file_format="array_record", image=None):
    """A dataset as TFDS itself would have prepared it, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "mini" / "1.0.0"
    folder.mkdir(parents=True)
    image = image or tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(names=list(names))
    tfds.features.FeaturesDict({"image": image, "label": label}).save_config(str(folder))
    infos = []
    for split, labels in splits.items():
        writer = ArrayRecordWriter(
            str(folder / f"mini-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for i, label in enumerate(labels):
            stream = io.BytesIO()
            Image.new("RGB", (8, 6), (10 * i, 0, 0)).save(stream, "PNG")
            example = tf_example_pb2.Example()
            content = stream.getvalue() if label >= 0 else b"damaged"
            example.features.feature["image"].bytes_list.value.append(content)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
        infos.append(
            {
                "name": split,
                "shardLengths": [str(len(labels))],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": "mini", "version": "1.0.0", "fileFormat": file_format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds(tmp_path):
    write_tfds(tmp_path, {"train": [0, 1, 1], "test": [1, 1, 0, 0], "extra": [0]})
    source = TfdsSource("mini", data_dir=tmp_path)
    assert source.class_names == ("cat", "dog")
    train, val = (np.flatnonzero(source.splits == s) for s in ("train", "val"))
    assert source.labels[train].tolist() == [0, 1, 1]
    assert source.labels[val].tolist() == [1, 1, 0, 0]
    assert source.describe(4) == "tfds:mini[4]"
    array = source.load([val[1], train[2], val[3]], Preprocess(6, mean=(0,) * 3, std=(1,) * 3))
    np.testing.assert_allclose(array[:, 0, 0, 0], np.array([10, 20, 30]) / 255, atol=1e-6)
    assert array.shape == (3, 6, 6, 3)
    chosen = TfdsSource("mini", tmp_path, ("dog", "cat"), {"val": "extra", "train": "train"})
    assert chosen.labels.tolist() == [1, 1, 0, 0]
    assert chosen.splits.tolist() == ["val"] + ["train"] * 3
    assert chosen.fingerprint() != source.fingerprint()
    other = TfdsSource("mini", tmp_path, ("dog", "cat"))
    assert other.fingerprint() != source.fingerprint()
    assert other.images_fingerprint() == source.images_fingerprint() != chosen.images_fingerprint()
    assert TfdsSource("mini", data_dir=tmp_path).fingerprint() == source.fingerprint()


def test_tfds_prepared_anew_is_another_source(tmp_path):
    found = []
    for name, change in (
        ("same", ("", "")),
        ("images", ('"numBytes": "1"', '"numBytes": "2"')),
        ("version", ("1.0.0", "1.0.1")),
    ):
        folder = write_tfds(tmp_path / name, {"train": [0, 1]})
        found.append(TfdsSource("mini", data_dir=tmp_path / name).fingerprint())
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace(*change))
        folder.rename(folder.with_name(folder.name.replace(*change)))
        found.append(TfdsSource("mini", data_dir=tmp_path / name).fingerprint())
    assert len(set(found[::2])) == 1 and len(set(found[1::2])) == 3


def test_tfds_through_open_source(tmp_path, monkeypatch):
    write_tfds(tmp_path, {"train": [0, 1]})
    opened = []

    def here(name, class_names=None):
        opened.append(name)
        return TfdsSource(name, data_dir=tmp_path, class_names=class_names)

    monkeypatch.setattr(sources, "TfdsSource", here)
    assert len(open_source("tfds:mini", ("dog", "cat"))) == 2
    assert opened == ["mini"]


def test_tfds_unlabelled_and_damaged(tmp_path):
    write_tfds(tmp_path, {"train": [0, -1]})
    source = TfdsSource("mini", data_dir=tmp_path)
    assert source.labels.tolist() == [0, -1]
    ((i, message),) = find_corrupt(source, [0, 1], RGB)
    assert i == 1 and message.startswith("tfds:mini[1]: image is corrupt")


def test_tfds_labels_of_large_splits_are_read_once(tmp_path, monkeypatch):
    write_tfds(tmp_path, {"train": [0, 1, -1]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    TfdsSource("mini", tmp_path)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tfds_module, "_CACHED_FROM", 3)
    assert TfdsSource("mini", tmp_path).labels.tolist() == [0, 1, -1]
    (cache,) = (tmp_path / "cache").rglob("*.npy")
    np.save(cache, np.array([1, 1, 1]))
    assert TfdsSource("mini", tmp_path).labels.tolist() == [1, 1, 1]
    for damage in (b"", b"damaged", pickle.dumps([1, 1, 1])):
        cache.write_bytes(damage)
        assert TfdsSource("mini", tmp_path).labels.tolist() == [0, 1, -1]
    np.save(cache, np.array([1, 1]))
    assert TfdsSource("mini", tmp_path).labels.tolist() == [0, 1, -1]
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("in the way")
    assert TfdsSource("mini", tmp_path).labels.tolist() == [0, 1, -1]


@pytest.mark.parametrize("label", [2, -2])
def test_tfds_refuses_labels_that_no_class_has(tmp_path, label):
    write_tfds(tmp_path, {"train": [0, label]})
    with pytest.raises(InputError, match=f"tfds:mini: label {label} is out of range, .* 0 to 1"):
        TfdsSource("mini", tmp_path)


def test_tfds_is_pickled_without_its_images(tmp_path):
    write_tfds(tmp_path, {"train": [0, 1, 1], "val": [0]})
    source = TfdsSource("mini", tmp_path)
    source.load([0, 1], RGB)
    written = pickle.dumps(source)
    assert len(written) < 20_000
    other = pickle.loads(written)
    np.testing.assert_array_equal(other.load([3, 1], RGB), source.load([3, 1], RGB))


def test_tfds_refuses(tmp_path):
    with pytest.raises(InputError, match="tfds:minus: Dataset minus not found"):
        TfdsSource("minus", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"is not prepared in .*tfds build mnist"):
        TfdsSource("mnist", data_dir=tmp_path)
    folder = write_tfds(tmp_path, {"train": [0, 1], "odd": [0]})
    for splits in ({"val": "test"}, {}, {"test": "train"}):
        with pytest.raises(InputError, match="to name some of train, odd"):
            TfdsSource("mini", tmp_path, splits=splits)
    with pytest.raises(InputError, match="labels out of range: dog"):
        TfdsSource("mini", tmp_path, ["cat"])
    next(folder.glob("*train*")).write_bytes(b"x" * 10)
    with pytest.raises(InputError, match="tfds:mini: cannot be read"):
        TfdsSource("mini", tmp_path)


def test_tfds_refuses_other_formats_and_features(tmp_path):
    import tensorflow_datasets as tfds

    write_tfds(tmp_path / "a", {"train": [0]}, file_format="tfrecord")
    with pytest.raises(InputError, match=r"(?s)cannot be read.*file_format=array_record"):
        TfdsSource("mini", data_dir=tmp_path / "a")
    write_tfds(tmp_path / "b", {"train": [0]}, image=tfds.features.Text())
    with pytest.raises(InputError, match="feature 'image' is no Image"):
        TfdsSource("mini", data_dir=tmp_path / "b")


# Opening


def test_open_source(classes):
    assert open_source("digits").name == "digits"
    source = open_source(str(classes), ("cat", "bee", "ant"))
    assert isinstance(source, FolderSource)
    assert source.labels.tolist() == [2, 1, 1, 0, 0]
    assert open_source(classes).fingerprint() == FolderSource(classes).fingerprint()


@pytest.mark.parametrize("spec", ["no/such/folder", "nothing.txt"])
def test_open_source_refuses(spec):
    with pytest.raises(InputError, match=f"{spec}: no such folder"):
        open_source(spec)
