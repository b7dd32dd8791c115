"""Batches of images, read ahead of their use, in an order that depends on nothing but the seed."""

import concurrent.futures
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.data.base import ImageSource, check_indices
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError

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
) -> Iterator[Batch]:
    """Yield the images in the given order.

    A last batch that is not full is padded with zeros whose mask is 0, so that every image counts
    exactly once and every batch has one shape; or it is short, or dropped. Batches are read on
    another thread while the ones before are used; an iterator that is left early stops reading.

    Raises:
      InputError: an image cannot be read, or an argument is out of range.
    """
    indices = check_indices(indices, source)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    if prefetch < 0:
        raise InputError(f"prefetch is {prefetch}, expected 0 or more")
    if remainder not in ("pad", "short", "drop"):
        raise InputError(f"remainder is {remainder!r}, expected 'pad', 'short' or 'drop'")
    stop = len(indices) // batch_size * batch_size if remainder == "drop" else len(indices)
    chunks = (indices[start : start + batch_size] for start in range(0, stop, batch_size))
    width = batch_size if remainder == "pad" else None
    return _read_ahead(lambda chunk: _read(source, chunk, preprocess, width), chunks, prefetch)


def _read(
    source: ImageSource, chunk: Int[np.ndarray, "b"], preprocess: Preprocess, width: int | None
) -> Batch:
    batch = {
        "image": source.load(chunk, preprocess),
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
    read: Callable[[np.ndarray], Batch], chunks: Iterator[np.ndarray], prefetch: int
) -> Iterator[Batch]:
    reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        chunks = iter(chunks)
        waiting = deque(reader.submit(read, c) for c in itertools.islice(chunks, prefetch + 1))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(reader.submit(read, c) for c in itertools.islice(chunks, 1))
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
