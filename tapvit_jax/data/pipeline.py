"""Batches of images, read ahead of their use, in an order that depends on the indices alone."""

import atexit
import concurrent.futures
import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.data.base import ImageSource, check_indices
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.workers import load_in_workers
from tapvit_jax.errors import InputError

_open_iterators: weakref.WeakSet[Iterator] = weakref.WeakSet()

Batch = dict[str, np.ndarray]
"""Keys: image (b, s, s, c), label (b), mask (b; 1 for images, 0 for padding), index (b)."""


def batches(
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    batch_size: int,
    *,
    remainder: Literal["pad", "short", "drop"] = "pad",
    prefetch: int = 2,
    workers: int = 0,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yield the images in the given order.

    A last batch that is not full is padded with zeros whose mask is 0, so that every image counts
    exactly once and every batch has one shape; or it is short, or dropped. Batches are read on
    another thread while the ones before are used; an iterator that is left early stops reading.

    Args:
      source: where the images come from.
      indices: which images, in which order.
      preprocess: how they become a model's input.
      batch_size: images in a batch, over all parts.
      remainder: what becomes of a last batch that is not full.
      prefetch: batches that are read ahead.
      workers: processes that decode; 0 decodes on threads of this process. The batches are the
        same. A worker takes seconds to start, every time: worth it for many large images.
        Sources that hold prepared images in memory are read without workers.
      start: leaves out so many batches without reading them, to go on in the midst of an epoch.
      part: (i, n): every batch is cut into n equal contiguous parts and only the i-th is read and
        yielded, so that n processes read every image once and take the same number of steps.

    Raises:
      InputError: an image cannot be read, a worker died, or an argument is out of range.

    Source: ours.
    """
    indices = check_indices(indices, source)
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("prefetch", prefetch, 0),
        ("workers", workers, 0),
        ("start", start, 0),
    ):
        if value < least:
            raise InputError(f"{name} is {value}, expected {least} or more")
    if remainder not in ("pad", "short", "drop"):
        raise InputError(f"remainder is {remainder!r}, expected 'pad', 'short' or 'drop'")
    place, count = part
    if not 0 <= place < count:
        raise InputError(f"part is {place} of {count}, expected 0 to {count - 1}")
    if batch_size % count:
        raise InputError(f"batch_size is {batch_size}, expected a multiple of the {count} parts")
    stop = len(indices) // batch_size * batch_size if remainder == "drop" else len(indices)
    width = batch_size // count
    # Not beyond the batch: a last one that is not full may leave nothing to this part.
    chunks = [
        indices[first + place * width : min(first + (place + 1) * width, stop)]
        for first in range(start * batch_size, stop, batch_size)
    ]
    found = _generate(
        source, chunks, preprocess, width if remainder == "pad" else None, prefetch, workers
    )
    _open_iterators.add(found)
    return found


@atexit.register
def _close_iterators() -> None:
    # When Python collects what a program left open, threads and workers can no longer be ended.
    for iterator in list(_open_iterators):
        # One that runs in a daemon thread cannot be closed.
        with contextlib.suppress(ValueError):
            iterator.close()


def _generate(
    source: ImageSource,
    chunks: Sequence[Int[np.ndarray, "b"]],
    preprocess: Preprocess,
    width: int | None,
    prefetch: int,
    workers: int,
) -> Iterator[Batch]:
    with contextlib.ExitStack() as stack:
        if workers and chunks and not source.in_memory:
            images = load_in_workers(source, chunks, preprocess, workers)
            stack.callback(images.close)

            def load(chunk):
                return next(images)
        else:

            def load(chunk):
                return source.load(chunk, preprocess)

        yield from _read_ahead(
            lambda chunk: _complete(load(chunk), source, chunk, width), chunks, prefetch
        )


def _complete(
    images: Float[np.ndarray, "b s s c"],
    source: ImageSource,
    chunk: Int[np.ndarray, "b"],
    width: int | None,
) -> Batch:
    batch = {
        "image": images,
        "label": source.labels[chunk].astype(np.int32),
        "mask": np.ones(len(chunk), np.float32),
        "index": chunk.astype(np.int32),
    }
    missing = 0 if width is None else width - len(chunk)
    if missing:
        batch = {
            name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            for name, array in batch.items()
        }
    return batch


def _read_ahead(
    read: Callable[[np.ndarray], Batch], chunks: Sequence[np.ndarray], prefetch: int
) -> Iterator[Batch]:
    reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        rest = iter(chunks)
        waiting = deque(reader.submit(read, c) for c in itertools.islice(rest, prefetch + 1))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(reader.submit(read, c) for c in itertools.islice(rest, 1))
            yield batch
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def load_all(
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    batch_size: int = 256,
) -> tuple[Float[np.ndarray, "n s s c"], Int[np.ndarray, "n"]]:
    """All the images and their labels at once.

    Raises:
      InputError: an image cannot be read.
    """
    indices = check_indices(indices, source)
    found = list(batches(source, indices, preprocess, batch_size, remainder="short"))
    images = [batch["image"] for batch in found] or [source.load(indices, preprocess)]
    return np.concatenate(images), source.labels[indices]
