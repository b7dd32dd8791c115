import collections
import contextlib
import dataclasses
import errno
import os
import pickle
import re
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tapvit_jax.data import folders, preprocess
from tapvit_jax.data.base import align_classes, find_corrupt
from tapvit_jax.data.sources import (
    DigitsSource,
    FolderSource,
    Preprocess,
    TinyImageNetSource,
    open_source,
)
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, file_hash
from tests.data_part.image_files import RGB, save

NAMES = ("ant", "bee", "cat")


def names_below(source):
    return [p.relative_to(source.root).as_posix() for p in source.paths]


def tiny(root, val=True):
    """Two classes in Tiny-ImageNet's layout; wnids.txt is not sorted."""
    (root / "wnids.txt").write_text("n2\nn1\n")
    (root / "words.txt").write_text("n0\tother\nn1\tfish, goldfish\nn2\tdog, hound\n")
    save(root / "train" / "n1" / "images" / "n1_0.JPEG", 10)
    save(root / "train" / "n2" / "images" / "n2_0.JPEG", 20)
    save(root / "train" / "n2" / "images" / "n2_1.JPEG", 30)
    if val:
        save(root / "val" / "images" / "val_0.JPEG", 40)
        save(root / "val" / "images" / "val_1.JPEG", 50)
        lines = "val_1.JPEG\tn2\t0\t0\t1\t1\nval_0.JPEG\tn1\t0\t0\t1\t1\n"
        (root / "val" / "val_annotations.txt").write_text(lines)
    return root


# Folders


def test_class_folders(classes):
    source = FolderSource(classes)
    assert source.class_names == NAMES
    assert names_below(source) == [
        "ant/deep/er/1.JPEG",
        "bee/1.png",
        "bee/2.png",
        "cat/x.bmp",
        "cat/y.webp",
    ]
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    assert set(source.splits) == {"train"}
    assert source.describe(1) == str(classes / "bee" / "1.png")
    array = source.load([2, 1, 2], RGB)
    assert array.shape == (3, 6, 6, 3)
    np.testing.assert_allclose(array[:, 0, 0, 0], (np.array([20, 10, 20]) / 255 - 0.5) / 0.2, 1e-5)


def test_load_keeps_the_order_of_many_images(tmp_path):
    for i in range(60):
        save(tmp_path / "c" / f"{i:02}.png", 4 * i)
    order = np.random.default_rng(0).permutation(60)
    array = FolderSource(tmp_path).load(order, Preprocess(6, mean=(0, 0, 0), std=(1, 1, 1)))
    np.testing.assert_allclose(array[:, 3, 3, 0], 4 * order / 255, atol=1e-6)


def test_folders_follow_the_models_classes(classes):
    source = FolderSource(classes, ("cat", "dog", "bee", "ant"))
    assert source.labels.tolist() == [3, 2, 2, 0, 0]
    with pytest.raises(
        InputError, match=r"labels out of range: folders ant, bee are .* model \(cat, dog\)"
    ):
        FolderSource(classes, ("cat", "dog"))
    with pytest.raises(InputError, match=r"the 11 classes of the model \(0, 1, .*, 9, \.\.\.\)"):
        FolderSource(classes, tuple(map(str, range(11))))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_the_same_in_either_form_of_unicode(tmp_path, form):
    """File systems and archives of macOS decompose accents."""
    names = ("dog", "élan")
    save(tmp_path / "train" / unicodedata.normalize("NFD", "élan") / "1.png")
    save(tmp_path / "val" / "élan" / "2.png")
    save(tmp_path / "val" / "dog" / "3.png")
    given = tuple(unicodedata.normalize(form, name) for name in names)
    source = FolderSource(tmp_path, given)
    assert (source.class_names, source.labels.tolist()) == (given, [1, 0, 1])
    assert FolderSource(tmp_path).class_names == names
    text = unicodedata.normalize("NFD", "val/dog/3.png,élan\n")
    (tmp_path / "labels.csv").write_text(text)
    assert FolderSource(tmp_path, given, tmp_path / "labels.csv").labels.tolist() == [1]
    with pytest.raises(InputError, match="several classes of the model"):
        FolderSource(tmp_path, (*given, unicodedata.normalize("NFD", "élan")))
    _, order = align_classes([(unicodedata.normalize("NFD", "élan"),)], given, "")
    assert order.tolist() == [1]


def test_classes_are_in_timms_order(tmp_path):
    names = ("0", "1", "02", "2", "10", "11", "B1", "b2", "b10", "c")
    for name in names:
        save(tmp_path / name / "1.png")
    source = FolderSource(tmp_path)
    assert source.class_names == names
    labels = dict(zip(names_below(source), source.labels.tolist(), strict=True))
    assert labels["10/1.png"] == 4
    (tmp_path / "labels.csv").write_text("c/1.png,n10\n0/1.png,n9\n")
    assert FolderSource(tmp_path, None, tmp_path / "labels.csv").class_names == ("n9", "n10")


def test_names_that_several_classes_have_are_no_labels(tmp_path):
    names = ("crane", "dog", "crane")
    save(tmp_path / "dog" / "1.png")
    (tmp_path / "labels.csv").write_text("dog/1.png,dog\n")
    assert FolderSource(tmp_path, names).labels.tolist() == [1]
    assert FolderSource(tmp_path, names, tmp_path / "labels.csv").labels.tolist() == [1]
    save(tmp_path / "crane" / "1.png")
    with pytest.raises(InputError, match="several classes of the model are called crane,"):
        FolderSource(tmp_path, names)
    (tmp_path / "labels.csv").write_text("crane/1.png,crane\n")
    with pytest.raises(InputError, match=r"labels\.csv: several classes .* are called crane,"):
        FolderSource(tmp_path, names, tmp_path / "labels.csv")
    digits = (*"0123456789", "crane", "crane")
    assert DigitsSource(digits).class_names == digits
    with pytest.raises(InputError, match=r"digits: several classes .* are called 3,"):
        DigitsSource((*"0123456789", "3"))


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_train_and_val_folders(tmp_path, held_out):
    save(tmp_path / "train" / "b" / "1.png")
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / held_out / "b" / "2.png")
    save(tmp_path / held_out / "c" / "3.png")
    source = FolderSource(tmp_path)
    assert source.class_names == ("a", "b", "c")
    rows = zip(names_below(source), source.labels.tolist(), source.splits.tolist(), strict=True)
    assert sorted(rows) == sorted(
        [
            ("train/a/1.png", 0, "train"),
            ("train/b/1.png", 1, "train"),
            (f"{held_out}/b/2.png", 1, "val"),
            (f"{held_out}/c/3.png", 2, "val"),
        ]
    )


def test_a_class_may_be_called_train(tmp_path):
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "bus" / "1.png")
    assert FolderSource(tmp_path).class_names == ("bus", "train")


def test_flat_folder(tmp_path):
    save(tmp_path / "2.png")
    save(tmp_path / "1.jpg")
    source = FolderSource(tmp_path)
    assert source.labels.tolist() == [-1, -1]
    assert source.class_names == ()
    assert FolderSource(tmp_path, NAMES).class_names == NAMES
    assert source.load([0, 1], RGB).shape == (2, 6, 6, 3)


def test_train_val_and_test_folders(tmp_path):
    for split in ("train", "test", "val"):
        save(tmp_path / split / "a" / f"{split}.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    source = FolderSource(tmp_path)
    assert source.class_names == ("a",)
    held_out = {p.name: s for p, s in zip(source.paths, source.splits, strict=True)}
    assert held_out == {"train.png": "train", "val.png": "val"}
    (tmp_path / "val").rename(tmp_path / "Validation")
    (tmp_path / "train").rename(tmp_path / "TRAIN")
    assert names_below(FolderSource(tmp_path)) == ["TRAIN/a/train.png", "Validation/a/val.png"]


def test_splits_beside_other_folders_are_refused(tmp_path):
    for path in ("train/a/1.png", "Val/a/1.png", "extra/a/1.png"):
        save(tmp_path / path)
    message = "holds the folders Val, extra, train, of which Val, train are splits"
    with pytest.raises(InputError, match=message):
        FolderSource(tmp_path)
    (tmp_path / "Val").rename(tmp_path / "Train")
    (tmp_path / "extra").rename(tmp_path / "val")
    with pytest.raises(InputError, match="of which Train, train, val are splits"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("path", ["test/2.png", "train/2.JPEG"])
def test_images_in_no_class_are_left_out_and_that_is_said(tmp_path, path, caplog):
    save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "train" / "._1.png").touch()
    assert len(FolderSource(tmp_path)) == 1 and not caplog.text
    save(tmp_path / path)
    assert len(FolderSource(tmp_path)) == 1
    folder, name = path.split("/")
    assert f"{folder}: left out 1 images in no class, such as {name}" in caplog.text


@pytest.mark.parametrize("above", ["", "train/"])
def test_images_beside_all_classes_or_splits_are_left_out_and_that_is_said(tmp_path, above, caplog):
    save(tmp_path / f"{above}a" / "1.png")
    save(tmp_path / "2.png")
    assert len(FolderSource(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path}: left out 1 images in no class, such as 2.png"]


@pytest.mark.parametrize("above", ["", "train/"])
def test_folders_without_images_are_no_classes(tmp_path, caplog, above):
    for name in ("a", "c"):
        save(tmp_path / f"{above}{name}" / "1.png")
    (tmp_path / f"{above}b" / "deep").mkdir(parents=True)
    source = FolderSource(tmp_path)
    assert (source.class_names, source.labels.tolist()) == (("a", "c"), [0, 1])
    assert caplog.messages == [f"{tmp_path}: left out 1 folders without images, such as {above}b"]
    assert FolderSource(tmp_path, ("c", "a")).labels.tolist() == [1, 0]


@pytest.mark.parametrize("above", ["", "train/"])
def test_images_beside_folders_without_images_are_a_flat_folder(tmp_path, caplog, above):
    save(tmp_path / f"{above}1.png")
    (tmp_path / f"{above}a").mkdir()
    source = FolderSource(tmp_path)
    assert (source.class_names, source.labels.tolist()) == ((), [-1])
    assert len(caplog.messages) == 1


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a\.png: no such folder"):
        FolderSource(save(tmp_path / "file" / "a.png"))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: holds no images"):
        FolderSource(tmp_path / "none")


# CSV files


def labelled(classes, text, class_names=NAMES):
    file = classes / "labels.csv"
    file.write_text(text)
    return FolderSource(classes, class_names, labels_file=file)


def test_labels_file(classes):
    save(classes / "val" / "z.png")
    text = "path,label\n\ncat/x.bmp,bee\nbee/1.png,0\nval/z.png, 2\n"
    source = labelled(classes, text)
    assert names_below(source) == ["cat/x.bmp", "bee/1.png", "val/z.png"]
    assert source.labels.tolist() == [1, 0, 2]
    assert source.splits.tolist() == ["train", "train", "val"]
    assert source.class_names == NAMES
    (classes / "val").rename(classes / "Val")
    assert labelled(classes, "Val/z.png,0\n").splits.tolist() == ["val"]


def test_labels_file_defines_classes(classes):
    source = labelled(classes, "cat/x.bmp,dog\nbee/1.png,bird\n", None)
    assert source.class_names == ("bird", "dog")
    assert source.labels.tolist() == [1, 0]
    source = labelled(classes, "cat/x.bmp,2\nbee/1.png,0\n", None)
    assert source.class_names == ("0", "1", "2")
    assert source.labels.tolist() == [2, 0]


def test_names_win_over_numbers(classes):
    assert labelled(classes, "cat/x.bmp,7\ncat/y.webp,1\n", ("9", "7")).labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/x.bmp,3\n", "line 1: label '3' is out of range"),
        ("path,label\ncat/x.bmp,-1\n", "line 2: label '-1'"),
        ("cat/x.bmp,dog\n", "line 1: label 'dog' is out of range"),
        ("cat/x.bmp,\n", "line 1: label ''"),
        ("cat/x.bmp,1.5\n", "line 1: label '1.5'"),
        (f"cat/x.bmp,{'9' * 30}\n", "line 1: label '999"),
        ("cat/x.bmp,0\nno/such.png,0\n", r"line 2: .*such\.png: image is missing"),
        ("../x.png,0\n", "line 1: path '../x.png', expected one below"),
        ("/etc/x.png,0\n", "line 1: path '/etc/x.png', expected one below"),
        (",0\n", "line 1: path ''"),
        ("cat/x.bmp,0\n\ncat/x.bmp,1\n", "line 3: cat/x.bmp is in line 1 already"),
        ("cat/x.bmp\n", "line 1 has 1 fields"),
        ("cat/x.bmp,0,1\n", "line 1 has 3 fields"),
        ('cat/x.bmp,"0\n', "not a CSV file that can be read"),
        ("path,label\n", "holds no images"),
        ("", "holds no images"),
    ],
)
def test_labels_file_refuses(classes, text, message):
    with pytest.raises(InputError, match=message):
        labelled(classes, text)


def test_labels_file_without_classes_is_bounded(classes):
    with pytest.raises(InputError, match="line 1: label '70000' is out of range"):
        labelled(classes, "cat/x.bmp,70000\n", None)
    with pytest.raises(InputError, match="line 1: label '-2'"):
        labelled(classes, "cat/x.bmp,-2\n", None)


def test_labels_file_must_be_text(classes):
    with pytest.raises(InputError, match=r"none.csv: no such file"):
        FolderSource(classes, labels_file=classes / "none.csv")
    (classes / "bad.csv").write_bytes(b"\xff\xfe,0\n")
    with pytest.raises(InputError, match="not a CSV file that can be read"):
        FolderSource(classes, labels_file=classes / "bad.csv")


# Damage


def test_damaged_and_missing_images(classes):
    source = FolderSource(classes)
    whole = save(classes / "big.jpg", size=(64, 64)).read_bytes()
    (classes / "ant" / "deep" / "er" / "1.JPEG").write_bytes(whole[: len(whole) // 2])
    (classes / "bee" / "1.png").unlink()
    (classes / "cat" / "x.bmp").write_text("no image at all")
    (classes / "cat" / "y.webp").write_bytes(b"")
    shares = []
    bad = find_corrupt(source, range(5), RGB, shares.append)
    assert shares == [0.2] * 5
    assert [i for i, _ in bad] == [0, 1, 3, 4]
    assert bad[1][1] == f"{classes / 'bee' / '1.png'} (image 1): image is missing"
    assert "truncated" in bad[0][1].lower()
    expected = "image is corrupt or in another format than JPEG, PNG, BMP, WEBP, GIF, TIFF"
    assert bad[2][1] == f"{classes / 'cat' / 'x.bmp'} (image 3): {expected}"
    for i, message in bad:
        assert source.describe(i) in message
        with pytest.raises(InputError) as caught:
            source.load([2, i], RGB)
        assert str(caught.value) == message
    assert find_corrupt(source, [2, 3, 2], RGB) == [bad[2]]
    assert source.load([2], RGB).shape == (1, 6, 6, 3)
    with pytest.raises(InputError, match="indices 5 to 5"):
        find_corrupt(source, [5], RGB)


def test_damaged_png_of_every_length_is_reported(tmp_path):
    whole = save(tmp_path / "c" / "1.png", size=(9, 9)).read_bytes()
    source = FolderSource(tmp_path)
    # What follows the last 24 bytes' beginning is checksums and the end mark, not pixels.
    for length in range(len(whole) - 24):
        (tmp_path / "c" / "1.png").write_bytes(whole[:length])
        assert len(find_corrupt(source, [0], RGB)) == 1, length


def test_huge_images_are_refused_before_decoding(classes, monkeypatch):
    monkeypatch.setattr(preprocess, "_MAX_PIXELS", 35)
    with pytest.raises(InputError, match=r"1\.png \(image 1\): 6 x 6 pixels, expected at most 35"):
        FolderSource(classes).load([1], RGB)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    for i in range(8):
        save(tmp_path / "c" / f"{i}.png", size=(9, 9) if i % 2 else (5, 5))
    monkeypatch.setattr(preprocess, "_MANY_PIXELS", 30)
    running, most, array = [], {5: 0, 9: 0}, preprocess.Preprocess.array

    def slow(self, image):
        size = image.width
        running.append(size)
        time.sleep(0.02)
        most[size] = max(most[size], running.count(size))
        running.remove(size)
        return array(self, image)

    monkeypatch.setattr(preprocess.Preprocess, "array", slow)
    assert FolderSource(tmp_path).load(range(8), RGB).shape == (8, 6, 6, 3)
    assert most[9] == 1 < most[5]


@pytest.mark.parametrize("changed", [{"crop_pct": 1e-9}, {"image_size": 10**30}])
def test_preprocessing_to_an_absurd_size_is_refused(changed):
    with pytest.raises(InputError, match=r"image_size is .* more than 134217728 pixels"):
        dataclasses.replace(RGB, **changed)


def test_elongated_images_are_refused_before_resizing(tmp_path, monkeypatch):
    save(tmp_path / "c" / "1.png", size=(2000, 1))
    monkeypatch.setattr(preprocess, "_MAX_PIXELS", 3000)
    ((i, message),) = find_corrupt(FolderSource(tmp_path), [0], RGB)
    assert i == 0 and "1.png (image 0): 2000 x 1 pixels: too elongated" in message


def test_randomly_damaged_files_load_or_are_reported(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "webp", "gif", "tif"):
        path = save(tmp_path / suffix / "c" / f"1.{suffix}", size=(20, 20))
        source, whole = FolderSource(path.parent.parent), path.read_bytes()
        for _ in range(50):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            if not find_corrupt(source, [0], RGB):
                assert np.isfinite(source.load([0], RGB)).all()


def test_decoding_threads_leave_the_warning_filters_alone(tmp_path):
    for i in range(100):
        save(tmp_path / "c" / f"{i}.png")
    before = list(warnings.filters)
    for _ in range(20):
        FolderSource(tmp_path).load(range(100), RGB)
    assert warnings.filters == before


def test_other_formats_are_not_opened(tmp_path):
    path = tmp_path / "c" / "1.png"
    path.parent.mkdir()
    Image.new("RGB", (6, 6)).save(path, format="TGA")
    with pytest.raises(InputError, match="corrupt or in another format than JPEG,"):
        FolderSource(tmp_path).load([0], RGB)


def test_the_first_frame_of_gif_and_tiff(tmp_path):
    frames = [Image.new("RGB", (6, 6), (value, value // 2, 0)) for value in (200, 40)]
    (tmp_path / "c").mkdir()
    for name in ("1.gif", "2.TIF", "3.tiff"):
        frames[0].save(tmp_path / "c" / name, save_all=True, append_images=frames[1:])
    save(tmp_path / "c" / "4.png", 200)
    found = FolderSource(tmp_path).load(range(4), RGB)
    np.testing.assert_array_equal(found, found[[3, 3, 3, 3]])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_tiffs_of_any_scale_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((6, 6), 100, dtype)).save(tmp_path / "1.tif")
    with pytest.raises(InputError, match=r"1\.tif .*: pixels are floats or 32-bit"):
        FolderSource(tmp_path).load([0], RGB)


def test_deep_tiffs_are_read_as_deep_pngs_are(tmp_path):
    image = Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800)
    for name in ("1.png", "2.tif"):
        image.save(tmp_path / name)
    found = FolderSource(tmp_path).load([0, 1], RGB)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.ptp(found[0][..., 0]) > 4


@pytest.mark.parametrize("above", ["", "a/"])
def test_images_in_other_formats_are_counted(tmp_path, caplog, above):
    save(tmp_path / f"{above}1.png")
    for name in ("2.HEIC", "3.avif", "4.heic", "._5.heic", "notes.txt"):
        (tmp_path / f"{above}{name}").touch()
    assert len(FolderSource(tmp_path)) == 1
    message = f"{tmp_path}: left out 3 files that are not read: .avif, .heic"
    assert caplog.messages == [message]


# Fingerprints


def test_fingerprint_follows_the_contents_not_the_place(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        save(root / "x" / "1.png")
        save(root / "y" / "1.png")
    reference = FolderSource(first).fingerprint()
    assert len(reference) == 64
    assert FolderSource(second).fingerprint() == reference
    assert FolderSource(second, ("y", "x")).fingerprint() != reference
    images = FolderSource(first).images_fingerprint()
    assert FolderSource(second, ("y", "x")).images_fingerprint() == images != reference
    save(second / "y" / "1.png", size=(50, 50))
    assert FolderSource(second).fingerprint() != reference
    assert FolderSource(second).images_fingerprint() != images
    source = FolderSource(first)
    (first / "y" / "1.png").unlink()
    assert source.fingerprint() != reference
    assert DigitsSource().fingerprint() == DigitsSource().fingerprint() != reference


# Tiny-ImageNet


def test_tiny_imagenet(tmp_path):
    source = open_source(str(tiny(tmp_path)))
    assert isinstance(source, TinyImageNetSource)
    assert source.wnids == ("n1", "n2")
    assert source.class_names == ("fish", "dog")
    assert source.labels.tolist() == [0, 1, 1, 1, 0]
    assert source.splits.tolist() == ["train"] * 3 + ["val"] * 2
    assert names_below(source)[3] == "val/images/val_1.JPEG"
    assert source.load(range(5), RGB).shape == (5, 6, 6, 3)


def test_tiny_imagenet_without_val_or_words(tmp_path):
    root = tiny(tmp_path, val=False)
    (root / "words.txt").unlink()
    source = TinyImageNetSource(root)
    assert source.class_names == ("n1", "n2")
    assert len(source) == 3
    (root / "words.txt").write_text("n1\tcrane, bird\nn2\tcrane\n")
    assert TinyImageNetSource(root).class_names == ("crane (n1)", "crane (n2)")


def test_tiny_imagenet_follows_the_models_classes(tmp_path):
    tiny(tmp_path)
    for names in (("dog", "cat", "fish"), ("n2", "cat", "n1")):
        source = TinyImageNetSource(tmp_path, names)
        assert source.class_names == names
        assert source.labels.tolist() == [2, 0, 0, 0, 2]
    with pytest.raises(InputError, match="labels out of range: dog"):
        TinyImageNetSource(tmp_path, ("fish",))


def test_missing_tiny_imagenet_image_is_found_when_loading(tmp_path):
    tiny(tmp_path)
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    source = TinyImageNetSource(tmp_path)
    with pytest.raises(InputError, match=r"val_1\.JPEG \(image 3\): image is missing"):
        source.load([3], RGB)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("wnids.txt", "n1\nn2\nn1\n", "has an id twice"),
        ("wnids.txt", "\n", "labels out of range"),
        ("wnids.txt", "n1\n", "line 1: labels out of range"),
        ("wnids.txt", "n1\nn2\nn3\n", "wnids.txt names n3"),
        ("val/val_annotations.txt", "val_0.JPEG\n", "line 1: labels out of range"),
        ("val/val_annotations.txt", "../x.JPEG\tn1\n", "line 1: '../x.JPEG' is no file name"),
        ("val/val_annotations.txt", "..\tn1\n", r"line 1: '\.\.' is no file name"),
        ("val/val_annotations.txt", ".\tn1\n", r"line 1: '\.' is no file name"),
        ("val/val_annotations.txt", "a.JPEG\tn1\na.JPEG\tn2\n", r"line 2: a\.JPEG is in line 1"),
        ("val/val_annotations.txt", "val_0.JPEG\tn9\n", "line 1: labels out of range: .*n9"),
        ("words.txt", None, "words.txt: is not a text file"),
        ("val/val_annotations.txt", None, "annotations.txt: is not a text file"),
    ],
)
def test_tiny_imagenet_refuses(tmp_path, file, text, message):
    (tiny(tmp_path) / file).write_bytes(b"\xff\xff" if text is None else text.encode())
    with pytest.raises(InputError, match=message):
        TinyImageNetSource(tmp_path)


# Many files


def test_folders_are_listed_once_and_files_looked_at_once(tmp_path, monkeypatch):
    """No call to the file system for a file while scanning, and one for its size."""
    for i in range(2500):
        folder = tmp_path / ("train" if i % 5 else "val") / f"n{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.JPEG").touch()
    (tmp_path / "train" / "n0" / "link.JPEG").symlink_to(tmp_path / "val" / "n0" / "0.JPEG")
    asked = collections.Counter()
    scandir, find = os.scandir, os.stat

    def listing(path):
        asked["scandir"] += 1
        return scandir(path)

    def looking(path, *args, **kwargs):
        asked[str(path).rpartition(".")[2]] += 1
        return find(path, *args, **kwargs)

    monkeypatch.setattr(folders.os, "scandir", listing)
    monkeypatch.setattr(folders.os, "stat", looking)
    source = FolderSource(tmp_path)
    assert len(source) == 2501
    assert asked["scandir"] <= 3 + 2 * 7 and asked["JPEG"] == 0
    before = source.fingerprint()
    assert asked["JPEG"] == 2501
    written = pickle.dumps(source)
    assert len(written) < 100 * len(source)
    assert names_below(pickle.loads(written)) == names_below(source)
    # The order is that of paths, part by part, whatever the file system's.
    assert names_below(source) == sorted(names_below(source), key=lambda name: name.split("/"))
    (tmp_path / "val" / "n0" / "0.JPEG").write_bytes(b"x")
    assert source.fingerprint() != before


def test_fingerprint_is_the_hash_of_all_rows(classes):
    source = FolderSource(classes)
    rows = [
        [path.relative_to(classes).as_posix(), path.stat().st_size, int(label)]
        for path, label in zip(source.paths, source.labels, strict=True)
    ]
    (bitmap,) = (row for row in rows if row[0].endswith(".bmp"))
    bitmap.append(file_hash(classes / bitmap[0]))
    expected = content_hash({"files": rows, "classes": list(source.class_names)})
    assert source.fingerprint() == expected


def test_bitmaps_of_one_size_are_told_apart(tmp_path):
    for suffix in ("bmp", "BMP", "tif", "TIFF"):
        path = tmp_path / suffix / "c" / f"1.{suffix}"
        source = FolderSource(save(path, 10).parent.parent)
        size, before = path.stat().st_size, (source.fingerprint(), source.images_fingerprint())
        save(path, 20)
        assert path.stat().st_size == size
        again = FolderSource(source.root)
        assert again.fingerprint() != before[0] and again.images_fingerprint() != before[1]


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    save(tmp_path / "ant" / name, 10)
    source = FolderSource(tmp_path)
    assert source.paths[-1] == tmp_path / "ant" / name
    assert source.load([0], RGB).shape == (1, 6, 6, 3)
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize("closed", [".", "train", "train/ant"])
def test_folders_that_cannot_be_listed(tmp_path, monkeypatch, closed):
    save(tmp_path / "train" / "ant" / "1.png", 10)
    closed, scandir = tmp_path / closed, os.scandir

    def listing(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", listing)
    message = rf"{re.escape(str(closed))}: cannot be read \(Permission denied\)"
    with pytest.raises(InputError, match=message):
        FolderSource(tmp_path)


def test_links_in_circles_are_left_out(tmp_path, monkeypatch):
    save(tmp_path / "ant" / "1.png", 10)
    for name in ("bee", "bee.png", "ant/2.png", "ant/bee"):
        (tmp_path / name).symlink_to(tmp_path / name)
    source = FolderSource(tmp_path)
    assert names_below(source) == ["ant/1.png"]
    # What is there and cannot be looked at is not passed over.
    (tmp_path / "cat").symlink_to(tmp_path / "ant")
    find = os.DirEntry.is_dir

    class Closed:
        def __init__(self, entry):
            self.name, self.is_file = entry.name, entry.is_file
            self._entry = entry

        def is_dir(self, **options):
            if self.name == "cat":
                raise PermissionError(errno.EACCES, "Permission denied", self._entry.path)
            return find(self._entry, **options)

    scandir = os.scandir
    monkeypatch.setattr(
        folders.os,
        "scandir",
        lambda path: contextlib.nullcontext(Closed(entry) for entry in scandir(path)),
    )
    with pytest.raises(InputError, match=r"cat: cannot be read \(Permission denied\)"):
        FolderSource(tmp_path)
