import pickle

import numpy as np
import pytest

from tapvit_jax.data.base import find_corrupt
from tapvit_jax.data.cifar import CifarSource
from tapvit_jax.data.sources import Preprocess, open_source
from tapvit_jax.errors import InputError

PLAIN = Preprocess(32, mean=(0, 0, 0), std=(1, 1, 1))
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]


def records(labels, seed=0):
    """Labels before pixels, a row each."""
    labels = np.asarray(labels, np.uint8).reshape(len(labels), -1)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return np.concatenate([labels, pixels], axis=1)


def cifar100(root):
    train, test = records([[3, 99], [19, 0], [0, 7]], 0), records([[1, 5]], 1)
    (root / "train.bin").write_bytes(train.tobytes())
    (root / "test.bin").write_bytes(test.tobytes())
    (root / "fine_label_names.txt").write_text("".join(f"fine{i}\n" for i in range(100)))
    return np.concatenate([train, test])


def cifar10(root):
    rows = [records([i, 9 - i], i) for i in range(6)]
    for file, part in zip([*TRAIN, "test_batch.bin"], rows, strict=True):
        (root / file).write_bytes(part.tobytes())
    # As published, an empty line at the end.
    (root / "batches.meta.txt").write_text("".join(f"class{i}\n" for i in range(10)) + "\n")
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("write", "header", "train", "names"),
    [(cifar100, 2, 3, [f"fine{i}" for i in range(100)]), (cifar10, 1, 10, None)],
)
def test_labels_splits_and_pixels(tmp_path, write, header, train, names):
    rows = write(tmp_path)
    source = open_source(str(tmp_path))
    assert source.class_names == tuple(names or [f"class{i}" for i in range(10)])
    np.testing.assert_array_equal(source.labels, rows[:, header - 1])
    assert source.labels.dtype == np.int32
    assert source.splits.tolist() == ["train"] * train + ["val"] * (len(rows) - train)
    found = source.load(np.arange(len(rows))[::-1], PLAIN)[::-1]
    for image, row in zip(found, rows, strict=True):
        # One plane a channel, each row by row.
        for y, x, c in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 1)):
            assert image[y, x, c] == np.float32(row[header + 1024 * c + 32 * y + x]) / 255
    assert find_corrupt(source, range(len(rows)), PLAIN) == []


def test_names_of_images_and_order_of_classes(tmp_path):
    cifar10(tmp_path)
    names = tuple(f"class{i}" for i in range(10))[::-1]
    source = CifarSource(tmp_path, names)
    assert source.class_names == names
    assert source.labels.tolist() == (9 - CifarSource(tmp_path).labels).tolist()
    assert source.describe(3) == f"{tmp_path}/data_batch_2.bin[1]"
    assert source.describe(11) == f"{tmp_path}/test_batch.bin[1]"
    assert source.fingerprint() != CifarSource(tmp_path).fingerprint()
    assert source.images_fingerprint() == CifarSource(tmp_path).images_fingerprint()
    with pytest.raises(InputError, match="labels out of range: class9"):
        CifarSource(tmp_path, names[1:])


def test_pixels_are_not_pickled(tmp_path):
    cifar100(tmp_path)
    source = CifarSource(tmp_path)
    written = pickle.dumps(source)
    assert len(written) < 3072
    other = pickle.loads(written)
    np.testing.assert_array_equal(other.load([3, 1], PLAIN), source.load([3, 1], PLAIN))
    assert other.fingerprint() == source.fingerprint()
    relabelled = source.with_labels([0, 0, 0, 0])
    np.testing.assert_array_equal(relabelled.load([2], PLAIN), source.load([2], PLAIN))


def test_changed_pixels_change_the_fingerprint(tmp_path):
    cifar100(tmp_path)
    before = CifarSource(tmp_path).fingerprint()
    images = CifarSource(tmp_path).images_fingerprint()
    (tmp_path / "test.bin").write_bytes(records([[1, 5]], 2).tobytes())
    assert CifarSource(tmp_path).fingerprint() != before
    assert CifarSource(tmp_path).images_fingerprint() != images


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.bin", b"x" * 3075, "test.bin: 3075 bytes, expected a multiple of 3074"),
        ("test.bin", b"", "test.bin: 0 bytes, expected a multiple of 3074"),
        ("test.bin", None, "test.bin: no such file"),
        ("train.bin", None, "train.bin: no such file"),
        (
            "train.bin",
            records([[0, 1], [0, 100]]).tobytes(),
            "train.bin: record 1: label 100 is out of range, expected 0 to 99",
        ),
        (
            "test.bin",
            records([[20, 1]]).tobytes(),
            "test.bin: record 0: label 20 is out of range, expected 0 to 19",
        ),
        ("fine_label_names.txt", None, "fine_label_names.txt: no such file"),
        ("fine_label_names.txt", b"a\nb\n", "2 names, expected 100 distinct ones"),
        ("fine_label_names.txt", b"a\n" * 100, "100 names, expected 100 distinct ones"),
        ("fine_label_names.txt", b"\xff", "is not a text file that can be read"),
    ],
)
def test_bad_files_are_named(tmp_path, file, content, message):
    cifar100(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_source(str(tmp_path))
    assert str(error.value).startswith(str(tmp_path / file))


@pytest.mark.parametrize(
    ("files", "name"),
    [(["train", "test", "meta"], "cifar-100"), (["data_batch_1", "batches.meta"], "cifar-10")],
)
def test_the_pickled_layout_is_not_opened(tmp_path, files, name):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    for file in files:
        (tmp_path / file).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=f"pickled layout.*expected.*{name}-binary.tar.gz"):
        open_source(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_other_folders_are_no_cifar(tmp_path):
    with pytest.raises(InputError, match="not in a CIFAR layout"):
        CifarSource(tmp_path)
    with pytest.raises(InputError, match="holds no images"):
        open_source(str(tmp_path))
