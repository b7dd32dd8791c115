"""Features on disk: the same as computed, made once, never wrong whatever becomes of the files."""

import json
import logging

import jax
import numpy as np
import pytest

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.models import convnet
from tapvit_jax.models.convnet import ConvNetConfig
from tapvit_jax.proxy import pool_features as module
from tapvit_jax.proxy.features import Extractor
from tapvit_jax.proxy.pool import open_pool
from tapvit_jax.proxy.pool_features import FEATURES_FILE, RECORD_FILE, pool_features
from tests.processes import run_together

BATCH, PIECE, COUNT = 2, 6, 23


class Counting(MemorySource):
    """Counts the images that are read."""

    def __init__(self, images):
        super().__init__(images, np.zeros(len(images), int), ["a"])
        self.read_images = 0

    def load(self, indices, preprocess):
        self.read_images += len(indices)
        return super().load(indices, preprocess)


class KilledError(Exception):
    pass


def killed_at(count):
    seen = []

    def on_batch(images):
        seen.append(images)
        if sum(seen) >= count:
            raise KilledError

    return on_batch


def make_extractor(dim=3):
    network = ConvNetConfig(image_size=8, num_classes=2, widths=(4, 4), embed_dim=5)
    rng = np.random.default_rng(0)
    shapes = {k: v for k, v in convnet.param_shapes(network).items() if k != "head"}
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    projection = rng.standard_normal((5, dim)).astype(np.float32)
    preprocess = Preprocess(8, (0.0,) * 3, (1.0,) * 3)
    return Extractor("embedding", network, params, preprocess, np.zeros(5, np.float32), projection)


def make_images():
    return np.random.default_rng(1).standard_normal((COUNT, 8, 8, 3)).astype(np.float32)


INDICES = np.random.default_rng(2).permutation(COUNT)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_ROWS", PIECE)


@pytest.fixture(scope="module")
def extractor():
    return make_extractor()


@pytest.fixture
def source():
    return Counting(make_images())


def make(extractor, source, directory, indices=INDICES, **options):
    return pool_features(extractor, source, indices, directory, batch_size=BATCH, **options)


@pytest.fixture
def whole(tmp_path, extractor, source):
    make(extractor, source, tmp_path / "pool")
    source.read_images = 0
    return tmp_path / "pool"


def test_they_are_the_extractors_features(tmp_path, extractor, source):
    done = []
    found = make(extractor, source, tmp_path / "deep" / "pool", on_batch=done.append)
    np.testing.assert_array_equal(found, extractor.features(source, INDICES, BATCH))
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1
    assert sum(done) == COUNT
    files = sorted(path.name for path in (tmp_path / "deep" / "pool").iterdir())
    assert files == sorted([FEATURES_FILE, RECORD_FILE])
    assert open_pool(tmp_path / "deep" / "pool" / FEATURES_FILE).shape == (COUNT, 3)


@pytest.mark.parametrize("batch_size", [BATCH, 5])
def test_what_is_there_is_used_without_the_images(whole, extractor, source, batch_size, caplog):
    before, done = (whole / FEATURES_FILE).read_bytes(), []
    found = pool_features(
        extractor, source, INDICES, whole, batch_size=batch_size, on_batch=done.append
    )
    assert source.read_images == 0
    assert done == [COUNT]
    assert (whole / FEATURES_FILE).read_bytes() == before
    np.testing.assert_array_equal(found, np.load(whole / FEATURES_FILE))
    assert not caplog.records


@pytest.mark.parametrize(("at", "pieces"), [(6, 0), (8, 1), (18, 2), (COUNT, 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path, whole, extractor, at, pieces, monkeypatch
):
    devices, directory = jax.local_devices(), tmp_path / "killed"
    # One batch at a time, and then more devices than before.
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    with pytest.raises(KilledError):
        make(extractor, Counting(make_images()), directory, on_batch=killed_at(at))
    assert not (directory / FEATURES_FILE).exists()
    assert len(list(directory.glob("unfinished/*.piece"))) == pieces
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    source, done = Counting(make_images()), []
    make(extractor, source, directory, on_batch=done.append)
    assert source.read_images == COUNT - pieces * PIECE
    assert sum(done) == COUNT
    for name in (FEATURES_FILE, RECORD_FILE):
        assert (directory / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_killed_while_joining_computes_nothing_again(
    tmp_path, whole, extractor, source, monkeypatch
):
    def fail(path, spec):
        if path.name == RECORD_FILE:
            raise KeyboardInterrupt
        plain(path, spec)

    plain, directory = module.write_json, tmp_path / "killed"
    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        make(extractor, source, directory)
    monkeypatch.setattr(module, "write_json", plain)
    source.read_images = 0
    make(extractor, source, directory)
    assert source.read_images == 0
    assert (directory / FEATURES_FILE).read_bytes() == (whole / FEATURES_FILE).read_bytes()
    assert not (directory / "unfinished").exists()


def test_what_a_run_left_that_was_killed_at_the_very_end_is_removed(
    whole, extractor, source, caplog
):
    (whole / "unfinished").mkdir()
    (whole / "unfinished" / "000001.piece").write_bytes(b"left")
    make(extractor, source, whole)
    assert source.read_images == 0
    assert not caplog.records
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted([FEATURES_FILE, RECORD_FILE])


def cut(directory):
    path = directory / FEATURES_FILE
    path.write_bytes(path.read_bytes()[:-4])


def lengthen(directory):
    path = directory / FEATURES_FILE
    path.write_bytes(path.read_bytes() + b"more")


def alter(directory):
    path = directory / FEATURES_FILE
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def change_record(**changes):
    def change(directory):
        path = directory / RECORD_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_header(old, new):
    def change(directory):
        path = directory / FEATURES_FILE
        before = path.read_bytes()
        path.write_bytes(before.replace(old, new, 1))
        assert path.read_bytes() != before

    return change


DAMAGE = {
    "truncated": (cut, "bytes, expected"),
    "longer": (lengthen, "bytes, expected"),
    "altered": (alter, "the checksum differs"),
    "missing": (lambda d: (d / FEATURES_FILE).unlink(), "features.npy: no such file"),
    "other numbers": (
        lambda d: np.save(d / FEATURES_FILE, np.zeros((COUNT, 4), np.float32)),
        "its header is not that of float32 of shape (23, 3)",
    ),
    "other order": (change_header(b"False", b"True "), "its header is not that of"),
    "header that is no Python": (
        change_header(b"(23, 3)", b"((((((("),
        "its header is not that of",
    ),
    "empty": (lambda d: (d / FEATURES_FILE).write_bytes(b""), "its header is not that of"),
    "of objects": (
        lambda d: np.save(d / FEATURES_FILE, np.array([{}] * COUNT), allow_pickle=True),
        "its header is not that of",
    ),
    "no record": (lambda d: (d / RECORD_FILE).unlink(), "no such file"),
    "record not JSON": (lambda d: (d / RECORD_FILE).write_text("{"), "not valid JSON"),
    "other format": (change_record(format="tapvit-model"), "is not a tapvit-pool-features"),
    "other version": (change_record(version=2), "has version 2"),
    "no checksums": (change_record(sha256=None), "holds no checksums"),
    "endless pieces": (change_record(piece_rows=0), "holds no checksums"),
    "one endless piece": (change_record(piece_rows=10**30), "the checksum differs"),
    "checksums cut": (change_record(sha256=[]), "the checksum differs"),
    "other extractor": (change_record(extractor="00"), "these differ: extractor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again_and_said(whole, extractor, source, damage, caplog):
    before = (whole / FEATURES_FILE).read_bytes(), (whole / RECORD_FILE).read_bytes()
    change, message = DAMAGE[damage]
    change(whole)
    make(extractor, source, whole)
    assert source.read_images == COUNT
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert message in caplog.text
    assert str(whole) in caplog.text
    assert ((whole / FEATURES_FILE).read_bytes(), (whole / RECORD_FILE).read_bytes()) == before


def test_features_of_other_things_are_replaced(whole, extractor, source, caplog):
    changes = {
        "dim, extractor": (make_extractor(2), source, INDICES),
        "indices, rows": (extractor, source, INDICES[:-1]),
        "indices": (extractor, source, INDICES[::-1]),
        "source": (extractor, Counting(make_images() + 1), INDICES),
    }
    for differing, parts in changes.items():
        make(extractor, source, whole)
        caplog.clear()
        found = make(parts[0], parts[1], whole, indices=parts[2])
        assert f"these differ: {differing};" in caplog.text
        np.testing.assert_array_equal(found, parts[0].features(parts[1], parts[2], BATCH))


def stop_at_the_end(extractor, directory):
    with pytest.raises(KilledError):
        make(extractor, Counting(make_images()), directory, on_batch=killed_at(COUNT))


def test_a_damaged_piece_is_made_again(tmp_path, whole, extractor, source, monkeypatch, caplog):
    # One device, so that not all images belong to the step that is killed.
    devices = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    stop_at_the_end(extractor, tmp_path / "killed")
    middle = tmp_path / "killed" / "unfinished" / "000001.piece"
    middle.write_bytes(middle.read_bytes()[:-1])
    make(extractor, source, tmp_path / "killed")
    assert "000001.piece: damaged; computing it again" in caplog.text
    assert source.read_images == PIECE + COUNT % PIECE
    expected = (whole / FEATURES_FILE).read_bytes()
    assert (tmp_path / "killed" / FEATURES_FILE).read_bytes() == expected


def test_pieces_of_other_features_are_dropped(tmp_path, extractor, caplog):
    stop_at_the_end(extractor, tmp_path)
    other = Counting(make_images() + 1)
    found = make(extractor, other, tmp_path)
    assert "pieces of other features" in caplog.text
    assert other.read_images == COUNT
    np.testing.assert_array_equal(found, extractor.features(other, INDICES, BATCH))


def test_what_else_is_in_the_folder_stays(tmp_path, extractor, source):
    (tmp_path / "unfinished" / "thesis").mkdir(parents=True)
    (tmp_path / "unfinished" / "thesis" / "1.tex").write_text("years of work")
    (tmp_path / "unfinished" / "000000.piece").write_bytes(b"of other features")
    for _ in range(2):
        make(extractor, source, tmp_path)
    assert source.read_images == COUNT
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == sorted(["unfinished", "thesis", "1.tex", FEATURES_FILE, RECORD_FILE])


def test_features_that_are_not_finite_are_refused(tmp_path, extractor):
    images = make_images()
    images[INDICES[9]] = 3e38
    source = Counting(images)
    name = source.describe(INDICES[9])
    with pytest.raises(InputError) as caught:
        make(extractor, source, tmp_path)
    assert (
        str(caught.value) == f"{name}: its features hold NaN or infinity, expected finite numbers"
    )
    assert not (tmp_path / FEATURES_FILE).exists()


def test_bad_arguments(tmp_path, extractor, source):
    with pytest.raises(InputError, match="no images chosen"):
        make(extractor, source, tmp_path, indices=INDICES[:0])
    with pytest.raises(InputError, match="image indices 0 to 23, expected 0 to 22"):
        make(extractor, source, tmp_path, indices=np.array([0, COUNT]))
    with pytest.raises(InputError, match="batch_size is 0"):
        pool_features(extractor, source, INDICES, tmp_path, batch_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="lies below a file"):
        make(extractor, source, tmp_path / "file")
    for name in (FEATURES_FILE, RECORD_FILE):
        (tmp_path / f"with {name}" / name).mkdir(parents=True)
        with pytest.raises(InputError, match=f"{name}: is a folder, expected a file or nothing"):
            make(extractor, source, tmp_path / f"with {name}")
    (tmp_path / "unfinished").write_text("")
    with pytest.raises(InputError, match="unfinished: is a file, expected a folder or nothing"):
        make(extractor, source, tmp_path)
    assert source.read_images == 0


PROGRAM = """
import sys
import numpy as np
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
distributed.initialize()
from tapvit_jax.proxy import pool_features as module
from tests.proxy import test_pool_features as t
module._PIECE_ROWS = t.PIECE
source = t.Counting(t.make_images())
found = t.make(t.make_extractor(), source, sys.argv[1])
print("read", source.read_images, float(found.sum()))
count = t.COUNT - distributed.process_index()
try:
    t.make(t.make_extractor(), source, sys.argv[1], indices=t.INDICES[:count])
except InputError as error:
    print(error)
"""


def test_two_processes_write_what_one_writes(tmp_path, whole):
    command = ["-c", PROGRAM, str(tmp_path / "two")]
    ended = run_together([command] * 2, tmp_path / "cache", one_job=True)
    texts = [process.stdout for process in ended]
    assert [process.returncode for process in ended] == [0, 0], texts
    total = float(np.load(whole / FEATURES_FILE).sum())
    for text, share in zip(texts, (2 * PIECE, COUNT - 2 * PIECE), strict=True):
        assert f"read {share} {total}" in text
        assert "these fields differ between hosts: indices, rows" in text
    for name in (FEATURES_FILE, RECORD_FILE):
        assert (tmp_path / "two" / name).read_bytes() == (whole / name).read_bytes()
