"""What every source of labelled images has in common."""

import abc
import collections
import concurrent.futures
import copy
import functools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError

UNLABELLED = -1
# What the parts of a data set are called, and which of ours each is.
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "val"}
# Of classes, in a message.
_MOST_NAMED = 10
_THREADS = min(16, (os.cpu_count() or 1) + 2)
# Images that wait for a thread; each takes a kilobyte or two.
_MOST_WAITING = 1000


def check_indices(indices: Any, source: "ImageSource") -> Int[np.ndarray, "n"]:
    """Indices as an array.

    Raises:
      InputError: not a list of whole numbers, or one that the source does not have.
    """
    array = np.asarray(indices)
    if array.ndim == 1 and array.size == 0:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{source.name}: image indices of shape {array.shape} and type {array.dtype}, "
            "expected a list of whole numbers"
        )
    if array.min() < 0 or array.max() >= len(source):
        raise InputError(
            f"{source.name}: image indices {array.min()} to {array.max()}, "
            f"expected 0 to {len(source) - 1}"
        )
    return array.astype(np.int64)


def composed(name: str) -> str:
    """A name in Unicode's composed form: file systems and archives of macOS decompose accents."""
    return unicodedata.normalize("NFC", name)


def unknown_classes(
    where: str, unknown: Sequence[str], class_names: Sequence[str], kind: str = ""
) -> InputError:
    """What to raise where labels are none of the model's classes; names some of both."""
    known = ", ".join(class_names[:_MOST_NAMED]) + (", ..." * (len(class_names) > _MOST_NAMED))
    return InputError(
        f"{where}: labels out of range: {kind}{', '.join(unknown[:_MOST_NAMED])} are not among the "
        f"{len(class_names)} classes of the model ({known})"
    )


def index_classes(class_names: Sequence[str], used: Iterable[str], where: str) -> dict[str, int]:
    """Number of each class by its name in the composed form.

    Names that nothing uses may repeat: two classes of ImageNet are called "crane".

    Raises:
      InputError: several classes have a name of `used`.
    """
    class_names = [composed(name) for name in class_names]
    counts = collections.Counter(class_names)
    repeated = sorted(name for name in set(map(composed, used)) if counts[name] > 1)
    if repeated:
        raise InputError(
            f"{where}: several classes of the model are called {', '.join(repeated[:10])}, "
            "expected distinct names for what is labelled so"
        )
    return {name: i for i, name in enumerate(class_names)}


def align_classes(
    found: Sequence[tuple[str, ...]], class_names: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], Int[np.ndarray, "c"]]:
    """Place a source's classes, each known by one or more names, among the model's.

    Raises:
      InputError: a class is not among the model's, or several of those have its name.
    """
    if class_names is None:
        return tuple(names[0] for names in found), np.arange(len(found), dtype=np.int32)
    index = index_classes(class_names, (name for names in found for name in names), where)
    keys = [map(composed, names) for names in found]
    placed = [next((index[n] for n in names if n in index), None) for names in keys]
    unknown = [names[0] for names, i in zip(found, placed, strict=True) if i is None]
    if unknown:
        raise unknown_classes(where, unknown, class_names)
    return tuple(class_names), np.array(placed, np.int32)


class ImageSource(abc.ABC):
    """Labelled images that are read on demand.

    Attributes:
      name: what the user called it.
      class_names: names of the classes; empty when nothing is labelled.
      labels: class of every image, -1 where unknown.
      splits: "train" or "val" for every image.
      in_memory: the images lie prepared in memory, so that there is nothing to decode.
    """

    in_memory: bool = False

    name: str
    class_names: tuple[str, ...]
    labels: Int[np.ndarray, "n"]
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def with_labels(self, labels: Int[np.ndarray, "n"]) -> "ImageSource":
        """The same images under other labels.

        Raises:
          InputError: as many labels as there are images were expected.
        """
        if len(labels) != len(self):
            raise InputError(f"{self.name}: {len(labels)} labels for {len(self)} images")
        other = copy.copy(self)
        other.labels = np.asarray(labels, np.int32)
        return other

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """What to call an image in a message: its path, where it has one."""

    @abc.abstractmethod
    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Read and prepare one image.

        Raises:
          InputError: the image is missing or damaged.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes when the images or labels do."""

    @abc.abstractmethod
    def images_fingerprint(self) -> str:
        """Hash that changes when the images do, however they are labelled."""

    def load(
        self, indices: Int[np.ndarray, "b"], preprocess: Preprocess
    ) -> Float[np.ndarray, "b s s c"]:
        """Read and prepare some images, in order, on several threads.

        Raises:
          InputError: an image is missing or damaged (named), or an index is out of range.
        """
        indices = check_indices(indices, self)
        images = list(threads().map(lambda i: self.read(int(i), preprocess), indices))
        side = preprocess.image_size
        if not images:
            return np.zeros((0, side, side, preprocess.channels), np.float32)
        return np.stack(images)


@functools.lru_cache(maxsize=1)
def threads() -> concurrent.futures.ThreadPoolExecutor:
    """The threads that read and decode, one pool for all sources."""
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")


def map_images(function: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """Results of a function for every image, in order, on several threads."""
    for start in range(0, len(indices), _MOST_WAITING):
        yield from threads().map(function, indices[start : start + _MOST_WAITING])


def find_corrupt(
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    on_share: Callable[[float], None] = lambda share: None,
) -> list[tuple[int, str]]:
    """Read every image and return the indices and messages of those that cannot be read.

    `on_share` is called with every share of the work that is done.

    Raises:
      InputError: an index is out of range.
    """
    indices = check_indices(indices, source)

    def attempt(index: int) -> tuple[int, str] | None:
        try:
            source.read(index, preprocess)
        except InputError as error:
            return index, str(error)
        return None

    bad = []
    for found in map_images(attempt, indices.tolist()):
        bad += [] if found is None else [found]
        on_share(1.0 / len(indices))
    return bad
