"""Where images come from: digits, image folders, Tiny-ImageNet, TFDS, or arrays in memory."""

import abc
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

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
# Pillow goes by the contents, not by the suffix. Naming the decoders keeps a renamed file away from
# the many others, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# Without class names, labels that are numbers are bounded by nothing else.
_MOST_CLASSES = 2**16
_THREADS = min(16, (os.cpu_count() or 1) + 2)
UNLABELLED = -1

# Images are bounded by _MAX_PIXELS below. Pillow's own warning about large ones comes from decoding
# threads, where a filter set around one call would leak into all others, so it is set once.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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
        if type(self.image_size) is not int or self.image_size < 1:
            raise InputError(f"image_size is {self.image_size!r}, expected 1 or more")
        if self.channels not in _MODES:
            raise InputError(f"channels is {self.channels}, expected 1 or 3")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct is {self.crop_pct}, expected more than 0 and at most 1")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise InputError(
                f"mean and std have {len(self.mean)} and {len(self.std)} entries, "
                f"expected {self.channels}"
            )
        if not all(math.isfinite(m) for m in self.mean):
            raise InputError(f"mean is {self.mean}, expected finite values")
        if not all(s > 0 and math.isfinite(s) for s in self.std):
            raise InputError(f"std is {self.std}, expected finite positive values")
        kinds = get_args(type(self).__annotations__["interpolation"])
        if self.interpolation not in kinds:
            raise InputError(
                f"interpolation is {self.interpolation!r}, expected one of {', '.join(kinds)}"
            )

    def array(self, image: Image.Image) -> Float[np.ndarray, "s s c"]:
        """Prepare one image. A grey image of mode "F" holds values in [0, 1] already.

        Raises:
          InputError: so elongated that the resized image would be absurdly large.
        """
        exact = image.mode == "F"
        if not exact:
            image = _convert(image, _MODES[self.channels])
        shorter = math.floor(self.image_size / self.crop_pct)
        # Rounded down here and to even below, as torchvision does under timm: a pixel more or less
        # resamples the whole image differently.
        longer = int(shorter * max(image.size) / min(image.size))
        if shorter * longer > max(_MAX_PIXELS, shorter**2):
            raise InputError(
                f"{image.width} x {image.height} pixels: too elongated to be resized to {shorter} "
                f"x {longer}, expected at most {_MAX_PIXELS} pixels"
            )
        size = (shorter, longer) if image.width <= image.height else (longer, shorter)
        if min(image.size) != shorter:
            image = image.resize(size, _FILTERS[self.interpolation])
        left, top = (round((length - self.image_size) / 2) for length in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = np.asarray(image, np.float32)
        pixels = pixels.reshape(self.image_size, self.image_size, -1)
        pixels = pixels if exact else pixels / 255
        if pixels.shape[-1] != self.channels:
            pixels = np.repeat(pixels, self.channels, axis=-1)
        return ((pixels - np.float32(self.mean)) / np.float32(self.std)).astype(np.float32)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 2**16 - 1)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Straight to RGB gives the same colours and a warning.
        image = image.convert("RGBA")
    return image.convert(mode)


def _decode(
    read: Callable[[], BinaryIO], name: str, preprocess: Preprocess
) -> Float[np.ndarray, "s s c"]:
    """Decode and prepare one encoded image; whatever goes wrong is an InputError that names it."""
    try:
        with read() as stream, Image.open(stream, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(
                    f"{image.width} x {image.height} pixels, expected at most {_MAX_PIXELS}"
                )
            return preprocess.array(image)
    except FileNotFoundError as error:
        raise InputError(f"{name}: image is missing") from error
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files make Pillow's decoders raise nearly anything.
        raise InputError(f"{name}: image is corrupt or in another format ({error})") from error


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


def _align(
    found: Sequence[tuple[str, ...]], class_names: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], Int[np.ndarray, "c"]]:
    """Place a source's classes, each known by one or more names, among the model's."""
    if class_names is None:
        return tuple(names[0] for names in found), np.arange(len(found), dtype=np.int32)
    index = {name: i for i, name in enumerate(class_names)}
    if len(index) != len(class_names):
        raise InputError(f"{where}: class_names has a name twice, expected distinct names")
    placed = [next((index[n] for n in names if n in index), None) for names in found]
    unknown = [names[0] for names, i in zip(found, placed, strict=True) if i is None]
    if unknown:
        raise InputError(
            f"{where}: labels out of range: {', '.join(unknown[:10])} are not among the "
            f"{len(index)} classes of the model"
        )
    return tuple(class_names), np.array(placed, np.int32)


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
          InputError: an image is missing or damaged (named), or an index is out of range.
        """
        indices = check_indices(indices, self)
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
    """Read every image and return the indices and messages of those that cannot be read.

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
    for found in _pool().map(attempt, map(int, indices)):
        if on_image is not None:
            on_image()
        if found is not None:
            bad.append(found)
    return bad


class MemorySource(ImageSource):
    """Images that were prepared before and lie in memory.

    Raises:
      InputError: arrays that do not fit each other, values that are not finite, or a label that is
        not among `class_names`.
    """

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
        if self.images.ndim != 4:
            raise InputError(f"{name}: images of shape {self.images.shape}, expected 4 dimensions")
        if not np.isfinite(self.images).all():
            raise InputError(f"{name}: images hold NaN or infinity, expected finite values")
        known = len(self.class_names)
        wrong = self.labels[(self.labels < UNLABELLED) | (self.labels >= known)]
        if wrong.size:
            raise InputError(
                f"{name}: label {wrong[0]} is out of range, expected one of {known} classes or -1"
            )

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
          InputError: the preprocessing gives another shape, or an index is out of range.
        """
        indices = check_indices(indices, self)
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
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; they come with the package.

    Raises:
      InputError: a digit that is not among `class_names`.
    """

    def __init__(self, class_names: Sequence[str] | None = None):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.name = "digits"
        self.class_names, order = _align([(str(d),) for d in range(10)], class_names, self.name)
        self.labels = order[digits.target]
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
        return _decode(lambda: path.open("rb"), f"{path} (image {index})", preprocess)

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
    # macOS leaves "._photo.jpg" files behind that hold no image.
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _scan_folders(
    root: Path, class_names: Sequence[str] | None
) -> tuple[list[tuple[Path, int, str]], Sequence[str]]:
    folders = _folders_in(root)
    if folders and all(p.name in _SPLITS for p in folders):
        classes = [(c, _SPLITS[p.name]) for p in folders for c in _folders_in(p)]
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
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file that can be read ({error})") from error
    if lines and lines[0][1] == ["path", "label"]:
        lines = lines[1:]
    for number, row in lines:
        if len(row) != 2:
            raise InputError(f"{path}: line {number} has {len(row)} fields, expected path,label")
    labels = [label for _, (_, label) in lines]
    numbers = [_whole_number(label) for label in labels]
    if class_names is None and all(n is not None for n in numbers):
        class_names = [str(i) for i in range(min(max(numbers, default=-1) + 1, _MOST_CLASSES))]
    elif class_names is None:
        class_names = sorted(set(labels))
    index = {name: i for i, name in enumerate(class_names)}
    rows, seen = [], {}
    for (number, (name, label)), value in zip(lines, numbers, strict=True):
        where = f"{path}: line {number}"
        # A class may be called "3" without being number 3; names go first.
        value = index.get(label, UNLABELLED if value is None else value)
        if not label or label.startswith("-") or not 0 <= value < len(class_names):
            raise InputError(
                f"{where}: label {label!r} is out of range, "
                f"expected one of {len(class_names)} classes"
            )
        relative = Path(name)
        if not name or relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{where}: path {name!r}, expected one below {root}")
        if not (root / relative).is_file():
            raise InputError(f"{where}: {root / relative}: image is missing")
        if seen.setdefault(relative, number) != number:
            raise InputError(f"{where}: {name} is in line {seen[relative]} already")
        above = relative.parts[0] if len(relative.parts) > 1 else "train"
        rows.append((root / relative, value, _SPLITS.get(above, "train")))
    return rows, class_names


def _whole_number(text: str) -> int | None:
    digits = text.removeprefix("-")
    # Longer ones are out of any range, and slow to convert.
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


class TinyImageNetSource(_FileSource):
    """Tiny-ImageNet in its own layout, val optional; classes are the wnids in sorted order.

    `class_names`, a model's, may hold the classes' first synonyms or their wnids.

    Raises:
      InputError: a part of the layout is missing or contradicts itself, or a class is not among
        `class_names`.
    """

    def __init__(self, root: str | os.PathLike, class_names: Sequence[str] | None = None):
        root = Path(root)
        self.wnids = tuple(sorted(_lines(root / "wnids.txt")))
        if len(set(self.wnids)) != len(self.wnids):
            raise InputError(f"{root / 'wnids.txt'}: has an id twice, expected distinct ids")
        words = {}
        if (root / "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
        synonyms = [words.get(wnid, "").split(",")[0].strip() or wnid for wnid in self.wnids]
        names = [
            name if synonyms.count(name) == 1 else f"{name} ({wnid})"
            for name, wnid in zip(synonyms, self.wnids, strict=True)
        ]
        pairs = list(zip(names, self.wnids, strict=True))
        names, order = _align(pairs, class_names, str(root))
        index = dict(zip(self.wnids, order.tolist(), strict=True))
        rows = []
        for wnid in self.wnids:
            folder = root / "train" / wnid / "images"
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder, but wnids.txt names {wnid}")
            rows += [(path, index[wnid], "train") for path in _images_below(folder)]
        annotations = root / "val" / "val_annotations.txt"
        for number, line in enumerate(_lines(annotations) if (root / "val").is_dir() else (), 1):
            fields = line.split("\t")
            if len(fields) < 2 or fields[1] not in index:
                raise InputError(
                    f"{annotations}: line {number}: labels out of range: {line[:60]!r} "
                    "names no class of wnids.txt"
                )
            if Path(fields[0]).name != fields[0]:
                raise InputError(f"{annotations}: line {number}: {fields[0]!r} is no file name")
            rows.append((root / "val" / "images" / fields[0], index[fields[1]], "val"))
        self._set(root, rows, names)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but Tiny-ImageNet's layout has one")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a text file that can be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


class TfdsSource(ImageSource):
    """A TensorFlow Datasets image classification set, read from ArrayRecord without TensorFlow.

    Args:
      name: such as "cifar100" or "tiny_imagenet:1.0.0".
      data_dir: where prepared sets lie; TFDS's own default otherwise.
      class_names: the classes that labels refer to, usually a model's; by default the set's.
      splits: the set's split to use as "train" and the one to use as "val"; by default "train" and
        the first of "val", "validation" and "test" that exists.

    Raises:
      InputError: unknown name, not prepared, prepared in another file format, or a class that is
        not among `class_names`.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | os.PathLike | None = None,
        class_names: Sequence[str] | None = None,
        splits: Mapping[str, str] | None = None,
    ):
        # Imported here: it takes seconds, and only this source needs it.
        import tensorflow_datasets as tfds

        self.name = f"tfds:{name}"
        try:
            builder = tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            raise InputError(f"{self.name}: {(str(error).splitlines() or [''])[0]}") from error
        features = builder.info.features
        for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            if key not in features or not isinstance(features[key], kind):
                raise InputError(f"{self.name}: feature {key!r} is no {kind.__name__}")
        found = [(name,) for name in features["label"].names or ()]
        self.class_names, order = _align(found, class_names, self.name)
        prepared = _splits(builder)
        wanted = {_SPLITS[split]: split for split in reversed(_SPLITS) if split in prepared}
        if splits is not None and prepared:
            wanted = dict(splits)
            missing = [split for split in wanted.values() if split not in prepared]
            if missing or not wanted or not set(wanted) <= {"train", "val"}:
                raise InputError(
                    f"{self.name}: splits {wanted}, expected 'train' and 'val' to name some of "
                    f"{', '.join(prepared)}"
                )
        if not wanted:
            raise InputError(
                f"{self.name}: is not prepared in {builder.data_dir}. Prepare it once, where "
                "TensorFlow may be installed: pip install tensorflow && "
                f"tfds build {name} --file_format=array_record"
            )
        raw = {"image": tfds.decode.SkipDecoding()}
        self._parts, labels, kinds = [], [], []
        for ours, theirs in wanted.items():
            try:
                part = builder.as_data_source(theirs, decoders=raw)
                labels += [int(part[i]["label"]) for i in range(len(part))]
            except (
                NotImplementedError,
                ImportError,
                ValueError,
                AssertionError,
                LookupError,
                OSError,
                RuntimeError,
            ) as error:
                raise InputError(
                    f"{self.name}: cannot be read without TensorFlow ({error}); prepare it with "
                    "--file_format=array_record"
                ) from error
            self._parts.append(part)
            kinds += [ours] * len(part)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        # The entry added is that of -1, which some sets have for images without a label.
        self.labels = np.append(order, np.int32(UNLABELLED))[np.array(labels, np.int64)]
        self.splits = np.array(kinds)

    def describe(self, index: int) -> str:
        """Position in the set."""
        return f"{self.name}[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Decode and prepare one image.

        Raises:
          InputError: the image is damaged or absurdly large.
        """
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[part])
        return _decode(
            lambda: io.BytesIO(self._parts[part][row]["image"]), self.describe(index), preprocess
        )

    def fingerprint(self) -> str:
        """Hash of the name and all labels."""
        digest = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return content_hash({"name": self.name, "labels": digest})


def _splits(builder) -> dict:
    return {} if builder.info.splits is None else dict(builder.info.splits)


def open_source(spec: str, class_names: Sequence[str] | None = None) -> ImageSource:
    """Open "digits", "tfds:NAME", or a path (Tiny-ImageNet's layout, or image folders).

    Raises:
      InputError: nothing there, not in a known layout, or a class not among `class_names`.
    """
    if spec == "digits":
        return DigitsSource(class_names)
    if spec.startswith("tfds:"):
        return TfdsSource(spec.removeprefix("tfds:"), class_names=class_names)
    root = Path(spec)
    if not root.is_dir():
        raise InputError(f"{spec}: no such folder (expected a folder, 'digits' or 'tfds:NAME')")
    if (root / "wnids.txt").is_file():
        return TinyImageNetSource(root, class_names)
    return FolderSource(root, class_names)
