import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax.data import base
from tapvit_jax.data.base import find_corrupt
from tapvit_jax.data.pipeline import batches, load_all
from tapvit_jax.data.sources import DigitsSource, MemorySource, Preprocess
from tapvit_jax.errors import InputError

PRE = Preprocess(4, channels=1, mean=(0.0,), std=(1.0,))


def memory(count=23):
    """Image i is filled with i + 1, so that none looks like padding."""
    images = np.broadcast_to(
        np.arange(1, count + 1, dtype=np.float32)[:, None, None, None], (count, 4, 4, 1)
    )
    return MemorySource(images, np.arange(count) % 3, ("a", "b", "c"), "mem")


def batch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


class Failing(MemorySource):
    """Fails at the image numbered 10."""

    def load(self, indices, preprocess):
        if 10 in list(indices):
            raise InputError("mem[10]: is broken")
        return super().load(indices, preprocess)


def failing():
    source = memory()
    return Failing(source.load(range(23), PRE), source.labels, source.class_names, "mem")


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
@pytest.mark.parametrize("remainder", ["pad", "short"])
def test_every_image_counts_once(prefetch, remainder):
    source, indices = memory(), np.random.default_rng(0).permutation(np.arange(1, 23))
    found = list(batches(source, indices, PRE, 8, remainder=remainder, prefetch=prefetch))
    assert [len(b["image"]) for b in found] == [8, 8, 8 if remainder == "pad" else 6]
    for batch in found:
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "image": "float32",
            "label": "int32",
            "mask": "float32",
            "index": "int32",
        }
        real = batch["mask"] == 1
        np.testing.assert_array_equal(batch["image"][real][:, 0, 0, 0], batch["index"][real] + 1)
        np.testing.assert_array_equal(batch["label"][real], batch["index"][real] % 3)
        for key in batch:
            assert not batch[key][~real].any()
    seen = np.concatenate([b["index"][b["mask"] == 1] for b in found])
    np.testing.assert_array_equal(seen, indices)


def test_drop():
    found = list(batches(memory(), range(23), PRE, 8, remainder="drop"))
    assert [len(b["image"]) for b in found] == [8, 8]
    assert all(b["mask"].all() for b in found)


@given(
    count=st.integers(0, 23),
    width=st.integers(1, 5),
    parts=st.integers(1, 4),
    start=st.integers(0, 4),
    remainder=st.sampled_from(["pad", "short", "drop"]),
    prefetch=st.integers(0, 2),
)
@settings(max_examples=60)
def test_parts_are_the_whole_and_a_late_start_is_its_end(
    count, width, parts, start, remainder, prefetch
):
    source, order = memory(), np.random.default_rng(count).permutation(23)[:count]
    options = {"batch_size": width * parts, "remainder": remainder, "prefetch": prefetch}
    whole = list(batches(source, order, PRE, **options))
    split = [
        list(batches(source, order, PRE, part=(i, parts), start=start, **options))
        for i in range(parts)
    ]
    # As many batches everywhere, and those that were left out are the first ones.
    assert {len(found) for found in split} == {max(0, len(whole) - start)}
    if remainder != "short":
        assert {len(batch["image"]) for found in split for batch in found} <= {width}
    for together, *pieces in zip(whole[start:], *split, strict=True):
        for key, value in together.items():
            np.testing.assert_array_equal(np.concatenate([piece[key] for piece in pieces]), value)
    if remainder != "drop" or count % (width * parts) == 0:
        real = np.concatenate([np.empty(0), *(b["index"][b["mask"] == 1] for b in whole)])
        np.testing.assert_array_equal(real, order)


def test_batches_before_the_start_are_not_read():
    found = batches(failing(), range(23), PRE, 4, start=3)
    assert [batch["index"][0] for batch in found] == [12, 16, 20]


def test_no_images_make_no_batches():
    assert list(batches(memory(), [], PRE, 8)) == []


def test_unlabelled_images_keep_their_label():
    source = MemorySource(np.ones((2, 4, 4, 1), np.float32), [-1, 0], ("a",))
    (batch,) = batches(source, [0, 1], PRE, 3)
    assert batch["label"].tolist() == [-1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"remainder": "keep"}, "remainder is 'keep'"),
        ({"workers": -1}, "workers is -1"),
        ({"start": -1}, "start is -1, expected 0 or more"),
        ({"part": (2, 2)}, "part is 2 of 2, expected 0 to 1"),
        ({"part": (-1, 2)}, "part is -1 of 2"),
        ({"part": (0, 3)}, "batch_size is 4, expected a multiple of the 3 parts"),
        ({"indices": [23]}, "indices 23 to 23, expected 0 to 22"),
        ({"indices": [0, -1]}, "indices -1 to 0"),
        ({"indices": [0.5]}, "expected a list of whole numbers"),
        ({"indices": 3}, "expected a list of whole numbers"),
    ],
)
def test_bad_arguments_fail_at_the_call(options, message):
    options = {"indices": [0], "batch_size": 4} | options
    with pytest.raises(InputError, match=message):
        batches(memory(), options.pop("indices"), PRE, options.pop("batch_size"), **options)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_errors_reach_the_consumer_after_the_good_batches(prefetch):
    seen = []
    with pytest.raises(InputError, match=r"mem\[10\]: is broken"):
        for batch in batches(failing(), range(23), PRE, 4, prefetch=prefetch):
            seen += batch["index"].tolist()
    assert seen == list(range(8))
    assert not batch_threads()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_stopping_early_ends_the_thread(taken):
    found = batches(memory(), range(23), PRE, 2, prefetch=1)
    for _ in range(taken):
        next(found)
    found.close()
    assert not batch_threads()


def test_leaving_a_loop_ends_the_thread():
    for _ in batches(memory(), range(23), PRE, 2, prefetch=1):
        break
    assert not batch_threads()


def test_finishing_ends_the_thread():
    assert len(list(batches(memory(), range(23), PRE, 2))) == 12
    assert not batch_threads()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.ones((2, 4, 4))}, "images of shape"),
        ({"images": np.full((2, 4, 4, 1), np.nan)}, "images hold NaN"),
        ({"labels": [0]}, "2 images but 1 labels"),
        ({"labels": [0, 2]}, "label 2 is out of range"),
        ({"labels": [0, -2]}, "label -2 is out of range"),
    ],
)
def test_memory_source_refuses(change, message):
    arguments = {"images": np.ones((2, 4, 4, 1)), "labels": [0, 1], "class_names": "ab"}
    with pytest.raises(InputError, match=message):
        MemorySource(**(arguments | change))


def test_batches_are_made_ahead_but_not_further():
    made = []

    class Counting(MemorySource):
        def load(self, indices, preprocess):
            made.append(len(indices))
            return super().load(indices, preprocess)

    source = Counting(np.ones((40, 4, 4, 1), np.float32), np.zeros(40, int), ("a",))
    found = batches(source, range(40), PRE, 1, prefetch=3)
    next(found)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    found.close()
    assert 4 <= len(made) <= 5


def test_load_all():
    source = DigitsSource()
    indices = np.random.default_rng(0).permutation(1797)[:600]
    pre = Preprocess(8, channels=1, mean=(0.0,), std=(1.0,))
    images, labels = load_all(source, indices, pre)
    np.testing.assert_array_equal(images, source.load(indices, pre))
    np.testing.assert_array_equal(labels, source.labels[indices])
    empty, none = load_all(source, [], pre)
    assert empty.shape == (0, 8, 8, 1) and none.shape == (0,)
    with pytest.raises(InputError, match="indices -1 to -1"):
        load_all(source, [-1], pre)


def test_memory_source():
    source = memory(4)
    assert source.describe(3) == "mem[3]"
    rows = source.load([2, 0, 2], PRE)
    assert rows[:, 0, 0, 0].tolist() == [3, 1, 3]
    rows[:] = 0
    assert source.load([2], PRE).max() == 3
    assert find_corrupt(source, range(4), PRE) == []
    assert source.fingerprint() == memory(4).fingerprint() != memory(5).fingerprint()
    other = source.with_labels(source.labels[::-1])
    assert other.fingerprint() != source.fingerprint()
    assert other.images_fingerprint() == source.images_fingerprint()
    assert other.images_fingerprint() != memory(5).images_fingerprint()


def test_only_some_of_many_images_wait_for_a_thread(monkeypatch):
    asked = []

    class Threads:
        def map(self, function, indices):
            asked.append(len(indices))
            return map(function, indices)

    monkeypatch.setattr(base, "threads", Threads)
    indices = np.arange(2500) % 23
    found = find_corrupt(failing(), indices, PRE)
    assert [i for i, _ in found] == [10] * np.count_nonzero(indices == 10)
    assert asked == [1000, 1000, 500]


def test_memory_source_refuses_another_shape():
    other = Preprocess(5, channels=1, mean=(0.0,), std=(1.0,))
    with pytest.raises(InputError, match=r"mem: prepared as \(4, 4, 1\), expected \(5, 5, 1\)"):
        memory().load([0], other)
