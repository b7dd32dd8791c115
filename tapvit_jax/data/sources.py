"""Where images come from: digits, image folders, Tiny-ImageNet, TFDS, or arrays in memory."""

import abc
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError

from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "val"}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 3: "RGB"}
_MAX_PIXELS = 2**27
_THREADS = min(16, (os.cpu_count() or 1) + 2)
UNLABELLED = -1


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input; it travels with the model.

    The shorter side is resized to floor(image_size / crop_pct), the centre cropped, pixels scaled
    to [0, 1], then (x - mean) / std: timm's evaluation transform.

    Raises:
      InputError: a value out of range, or as many means or deviations as there are no channels.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    crop_pct: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self):
        if self.image_size < 1:
            raise InputError(f"image_size is {self.image_size}, expected 1 or more")
        if self.channels not in _MODES:
            raise InputError(f"channels is {self.channels}, expected 1 or 3")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct is {self.crop_pct}, expected more than 0 and at most 1")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise InputError(
                f"mean and std have {len(self.mean)} and {len(self.std)} entries, "
                f"expected {self.channels}"
            )
        if any(not s > 0 for s in self.std):
            raise InputError(f"std is {self.std}, expected positive values")

    def array(self, image: Image.Image) -> Float[np.ndarray, "s s c"]:
        """Prepare one image. A grey image of mode "F" holds values in [0, 1] already."""
        exact = image.mode == "F"
        if not exact:
            image = image.convert(_MODES[self.channels])
        shorter = math.floor(self.image_size / self.crop_pct)
        width, height = image.size
        scale = shorter / min(width, height)
        size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
        if size != image.size:
            image = image.resize(size, _FILTERS[self.interpolation])
        left, top = ((length - self.image_size) // 2 for length in size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = np.asarray(image, np.float32)
        pixels = pixels.reshape(self.image_size, self.image_size, -1)
        pixels = pixels if exact else pixels / 255
        if pixels.shape[-1] != self.channels:
            pixels = np.repeat(pixels, self.channels, axis=-1)
        return ((pixels - np.float32(self.mean)) / np.float32(self.std)).astype(np.float32)


class ImageSource(abc.ABC):
    """Labelled images that are read on demand.

    Attributes:
      name: what the user called it.
      class_names: names of the classes; empty when nothing is labelled.
      labels: class of every image, -1 where unknown.
      splits: "train" or "val" for every image.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Int[np.ndarray, "n"]
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

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

    def load(
        self, indices: Int[np.ndarray, "b"], preprocess: Preprocess
    ) -> Float[np.ndarray, "b s s c"]:
        """Read and prepare some images, in order, on several threads.

        Raises:
          InputError: an image is missing or damaged (named).
        """
        images = list(_pool().map(lambda i: self.read(int(i), preprocess), indices))
        side = preprocess.image_size
        if not images:
            return np.zeros((0, side, side, preprocess.channels), np.float32)
        return np.stack(images)


@functools.lru_cache(maxsize=1)
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")


def find_corrupt(
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    on_image: Callable[[], None] | None = None,
) -> list[tuple[int, str]]:
    """Read every image and return the indices and messages of those that cannot be read."""

    def attempt(index: int) -> tuple[int, str] | None:
        try:
            source.read(index, preprocess)
        except InputError as error:
            return index, str(error)
        return None

    bad = []
    for found in _pool().map(attempt, map(int, indices)):
        if on_image is not None:
            on_image()
        if found is not None:
            bad.append(found)
    return bad


class MemorySource(ImageSource):
    """Images that were prepared before and lie in memory."""

    def __init__(
        self,
        images: Float[np.ndarray, "n s s c"],
        labels: Int[np.ndarray, "n"],
        class_names: Sequence[str] = (),
        name: str = "memory",
    ):
        self.name = name
        self.images = np.asarray(images, np.float32)
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)
        self.splits = np.full(len(self.labels), "train")
        if len(self.images) != len(self.labels):
            raise InputError(f"{len(self.images)} images but {len(self.labels)} labels")

    def describe(self, index: int) -> str:
        """Position in the arrays."""
        return f"{self.name}[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """One row; the preprocessing must be the one that the images went through."""
        return self.load(np.array([index]), preprocess)[0]

    def load(
        self, indices: Int[np.ndarray, "b"], preprocess: Preprocess
    ) -> Float[np.ndarray, "b s s c"]:
        """Rows; the preprocessing must be the one that the images went through.

        Raises:
          InputError: the preprocessing gives another shape.
        """
        expected = (preprocess.image_size, preprocess.image_size, preprocess.channels)
        if self.images.shape[1:] != expected:
            raise InputError(
                f"{self.name}: prepared as {self.images.shape[1:]}, expected {expected}"
            )
        return self.images[indices]

    def fingerprint(self) -> str:
        """Hash of all pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; they come with the package."""

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.name = "digits"
        self.class_names = tuple(str(digit) for digit in range(10))
        self.labels = digits.target.astype(np.int32)
        self.splits = np.full(len(self.labels), "train")
        self._images = (digits.images / 16.0).astype(np.float32)

    def describe(self, index: int) -> str:
        """Position in the set."""
        return f"digits[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """One digit; nothing is rounded to bytes on the way."""
        return preprocess.array(Image.fromarray(self._images[index]))

    def fingerprint(self) -> str:
        """Hash of the pixels."""
        return hashlib.sha256(self._images.tobytes()).hexdigest()


class _FileSource(ImageSource):
    """Images that are files under one folder."""

    root: Path
    paths: list[Path]

    def _set(self, root: Path, rows: list[tuple[Path, int, str]], class_names: Sequence[str]):
        self.root, self.name = root, str(root)
        self.paths = [path for path, _, _ in rows]
        self.labels = np.array([label for _, label, _ in rows], np.int32)
        self.splits = np.array([split for _, _, split in rows])
        self.class_names = tuple(class_names)
        if not rows:
            raise InputError(f"{root}: holds no images (looked for {', '.join(sorted(_SUFFIXES))})")

    def describe(self, index: int) -> str:
        """Path of the file."""
        return str(self.paths[index])

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Decode and prepare one file.

        Raises:
          InputError: missing, not an image, truncated, or absurdly large.
        """
        path = self.paths[index]
        try:
            with warnings.catch_warnings():
                # Decompression bombs are an error here; a file's odd metadata is not our concern.
                warnings.simplefilter("ignore")
                with Image.open(path) as image:
                    if image.width * image.height > _MAX_PIXELS:
                        raise InputError(
                            f"{path}: {image.width} x {image.height} pixels, "
                            f"expected at most {_MAX_PIXELS}"
                        )
                    return preprocess.array(image)
        except FileNotFoundError as error:
            raise InputError(f"{path}: image is missing") from error
        except UnidentifiedImageError as error:
            raise InputError(f"{path}: is not an image that can be read") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: image is corrupt ({error})") from error

    def fingerprint(self) -> str:
        """Hash of all relative paths, sizes and labels; file contents are not read."""
        rows = [
            [str(path.relative_to(self.root)), path.stat().st_size, int(label)]
            for path, label in zip(self.paths, self.labels, strict=True)
            if path.is_file()
        ]
        return content_hash({"files": rows, "classes": list(self.class_names)})


class FolderSource(_FileSource):
    """A folder per class, with or without train and val above them, or a flat folder of images.

    Args:
      root: the folder.
      class_names: the classes that labels refer to, usually a model's; by default the folders'.
      labels_file: a CSV "path,label" relative to `root`, instead of class folders.

    Raises:
      InputError: no images, a class folder or label that is not among `class_names`.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        labels_file: str | os.PathLike | None = None,
    ):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        if labels_file is not None:
            rows, names = _read_labels_file(root, Path(labels_file), class_names)
        else:
            rows, names = _scan_folders(root, class_names)
        self._set(root, rows, names)


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _scan_folders(
    root: Path, class_names: Sequence[str] | None
) -> tuple[list[tuple[Path, int, str]], Sequence[str]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if folders and all(p.name in _SPLITS for p in folders):
        classes = [(c, _SPLITS[p.name]) for p in folders for c in sorted(p.iterdir()) if c.is_dir()]
    else:
        classes = [(p, "train") for p in folders]
    if not classes:
        flat = [(p, UNLABELLED, "train") for p in _images_below(root)]
        return flat, class_names or ()
    names = tuple(class_names or sorted({folder.name for folder, _ in classes}))
    unknown = sorted({folder.name for folder, _ in classes} - set(names))
    if unknown:
        raise InputError(
            f"{root}: labels out of range: folders {', '.join(unknown[:10])} are not among the "
            f"{len(names)} classes of the model"
        )
    index = {name: i for i, name in enumerate(names)}
    rows = [(p, index[c.name], split) for c, split in classes for p in _images_below(c)]
    return rows, names


def _read_labels_file(
    root: Path, path: Path, class_names: Sequence[str] | None
) -> tuple[list[tuple[Path, int, str]], Sequence[str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8") as file:
        lines = [row for row in csv.reader(file) if row]
    if lines and lines[0] == ["path", "label"]:
        lines = lines[1:]
    for number, row in enumerate(lines, 1):
        if len(row) != 2:
            raise InputError(f"{path}: row {number} has {len(row)} fields, expected path,label")
    found = [label.strip() for _, label in lines]
    numeric = all(label.lstrip("-").isdigit() for label in found)
    if class_names is None:
        largest = max((int(label) for label in found), default=-1) if numeric else -1
        class_names = [str(i) for i in range(largest + 1)] if numeric else sorted(set(found))
    index = {name: i for i, name in enumerate(class_names)}
    rows = []
    for number, ((name, _), label) in enumerate(zip(lines, found, strict=True), 1):
        value = int(label) if numeric else index.get(label, UNLABELLED)
        if not 0 <= value < len(class_names):
            raise InputError(
                f"{path}: row {number}: label {label} is out of range, "
                f"expected one of {len(class_names)} classes"
            )
        if not (root / name).is_file():
            raise InputError(f"{path}: row {number}: {root / name}: image is missing")
        rows.append((root / name, value, "train"))
    return rows, class_names


class TinyImageNetSource(_FileSource):
    """Tiny-ImageNet in its own layout; classes are the wnids in sorted order.

    Raises:
      InputError: a part of the layout is missing or contradicts itself.
    """

    def __init__(self, root: str | os.PathLike):
        root = Path(root)
        self.wnids = tuple(sorted(_lines(root / "wnids.txt")))
        index = {wnid: i for i, wnid in enumerate(self.wnids)}
        words = {}
        if (root / "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
        names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in self.wnids]
        rows = []
        for wnid in self.wnids:
            folder = root / "train" / wnid / "images"
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder, but wnids.txt names {wnid}")
            rows += [(path, index[wnid], "train") for path in _images_below(folder)]
        annotations = root / "val" / "val_annotations.txt"
        for number, line in enumerate(_lines(annotations), 1):
            fields = line.split("\t")
            if len(fields) < 2 or fields[1] not in index:
                raise InputError(
                    f"{annotations}: line {number}: labels out of range: {line[:60]!r} "
                    "names no class of wnids.txt"
                )
            rows.append((root / "val" / "images" / fields[0], index[fields[1]], "val"))
        self._set(root, rows, names)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but Tiny-ImageNet's layout has one")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


class TfdsSource(ImageSource):
    """A TensorFlow Datasets image classification set, read from ArrayRecord without TensorFlow.

    Args:
      name: such as "cifar100" or "tiny_imagenet:1.0.0".
      data_dir: where prepared sets lie; TFDS's own default otherwise.

    Raises:
      InputError: unknown name, not prepared, or prepared in another file format.
    """

    def __init__(self, name: str, data_dir: str | os.PathLike | None = None):
        # Imported here: it takes seconds, and only this source needs it.
        import tensorflow_datasets as tfds

        self.name = f"tfds:{name}"
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            raise InputError(f"{self.name}: {str(error).splitlines()[0]}") from error
        features = builder.info.features
        if "image" not in features or "label" not in features:
            raise InputError(f"{self.name}: has no image and label features")
        self.class_names = tuple(features["label"].names)
        wanted = {_SPLITS[split]: split for split in reversed(_SPLITS) if split in _splits(builder)}
        if not wanted:
            raise InputError(
                f"{self.name}: is not prepared in {builder.data_dir}. Prepare it once, where "
                "TensorFlow may be installed: pip install tensorflow && "
                f"tfds build {name} --file_format=array_record"
            )
        raw = {"image": tfds.decode.SkipDecoding()}
        self._parts, labels, splits = [], [], []
        for ours, theirs in wanted.items():
            try:
                part = builder.as_data_source(theirs, decoders=raw)
            except (NotImplementedError, ValueError, AssertionError) as error:
                raise InputError(
                    f"{self.name}: cannot be read without TensorFlow ({error}); prepare it with "
                    "--file_format=array_record"
                ) from error
            self._parts.append(part)
            labels += [int(part[i]["label"]) for i in range(len(part))]
            splits += [ours] * len(part)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._feature = features["image"]
        self.labels = np.array(labels, np.int32)
        self.splits = np.array(splits)

    def describe(self, index: int) -> str:
        """Position in the set."""
        return f"{self.name}[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Decode and prepare one image."""
        import io

        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        encoded = self._parts[part][index - int(self._starts[part])]["image"]
        try:
            if isinstance(encoded, bytes):
                with Image.open(io.BytesIO(encoded)) as image:
                    return preprocess.array(image)
            pixels = np.asarray(encoded)
            return preprocess.array(
                Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            )
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{self.describe(index)}: image is corrupt ({error})") from error

    def fingerprint(self) -> str:
        """Hash of the name and all labels."""
        digest = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return content_hash({"name": self.name, "labels": digest})


def _splits(builder) -> dict:
    return {} if builder.info.splits is None else dict(builder.info.splits)


def open_source(spec: str, class_names: Sequence[str] | None = None) -> ImageSource:
    """Open "digits", "tfds:NAME", or a path (Tiny-ImageNet's layout, or image folders).

    Raises:
      InputError: nothing there, or not in a known layout.
    """
    if spec == "digits":
        return DigitsSource()
    if spec.startswith("tfds:"):
        return TfdsSource(spec.removeprefix("tfds:"))
    root = Path(spec)
    if not root.is_dir():
        raise InputError(f"{spec}: no such folder (expected a folder, 'digits' or 'tfds:NAME')")
    if (root / "wnids.txt").is_file():
        return TinyImageNetSource(root)
    return FolderSource(root, class_names)
