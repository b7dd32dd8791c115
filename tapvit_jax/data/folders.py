"""Images that are files: a folder per class, a list of labels, or Tiny-ImageNet's layout."""

import contextlib
import csv
import errno
import functools
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.data.base import (
    SPLITS,
    UNLABELLED,
    ImageSource,
    align_classes,
    composed,
    index_classes,
    threads,
    unknown_classes,
)
from tapvit_jax.data.preprocess import Preprocess, decode
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash

log = logging.getLogger(__name__)

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
# Of other images, which are not read; that they are there is said.
_OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".pgm", ".ppm", ".svg", ".tga"}
)
# Not compressed: other pixels of the same shape fill as many bytes, so that sizes tell nothing.
_HASHED_SUFFIXES = (".bmp", ".tif", ".tiff")
# Without class names, labels that are numbers are bounded by nothing else.
_MOST_CLASSES = 2**16


# How many files a thread looks at in one go.
_FILES_AT_ONCE = 1000

_Group = tuple[list[str], int, str]
"""Images of one class: paths relative to the root, label, "train" or "val"."""


class _Paths(Sequence[Path]):
    """Paths below one folder, held as a few bytes each: there may be millions."""

    def __init__(self, root: Path, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._root = root
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Path:
        return self._root / self.name(range(len(self))[index])

    def name(self, index: int) -> str:
        """Path relative to the root."""
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


class _FileSource(ImageSource):
    """Images that are files under one folder."""

    root: Path
    paths: _Paths

    def _set(self, root: Path, groups: Sequence[_Group], class_names: Sequence[str]):
        self.root, self.name = root, str(root)
        # Copies with other labels share it.
        self._hashed: dict[str, str] = {}
        self.paths = _Paths(root, [name for names, _, _ in groups for name in names])
        if not self.paths:
            raise InputError(f"{root}: holds no images (looked for {', '.join(sorted(_SUFFIXES))})")
        counts = [len(names) for names, _, _ in groups]
        self.labels = np.repeat(np.array([label for _, label, _ in groups], np.int32), counts)
        self.splits = np.repeat([split for _, _, split in groups], counts)
        self.class_names = tuple(class_names)

    def describe(self, index: int) -> str:
        """Path of the file."""
        return str(self.paths[index])

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Decode and prepare one file.

        Raises:
          InputError: missing, not an image, truncated, or absurdly large.
        """
        path = self.paths[index]
        return decode(lambda: path.open("rb"), f"{path} (image {index})", preprocess)

    def fingerprint(self) -> str:
        """Hash of all relative paths, sizes and labels, and of the contents of BMPs and TIFFs."""
        # content_hash of {"classes": ..., "files": [[path, size, label], ...]}, piece by piece.
        return self._hash_files(f'{{"classes":{_json(self.class_names)},"files":[', self.labels)

    def images_fingerprint(self) -> str:
        """Hash of all relative paths and sizes, and of the contents of BMPs and TIFFs."""
        return self._hash_files('{"files":[')

    def _hash_files(self, beginning: str, labels: Int[np.ndarray, "n"] | None = None) -> str:
        starts = range(0, len(self), _FILES_AT_ONCE)
        digest = hashlib.sha256(beginning.encode())
        separator = ""
        for rows in threads().map(functools.partial(self._describe_files, labels), starts):
            for row in rows:
                digest.update(f"{separator}{row}".encode())
                separator = ","
        digest.update(b"]}")
        return digest.hexdigest()

    def _describe_files(self, labels: Int[np.ndarray, "n"] | None, start: int) -> list[str]:
        rows = []
        for index in range(start, min(start + _FILES_AT_ONCE, len(self))):
            name = self.paths.name(index)
            with contextlib.suppress(OSError):
                found = os.stat(f"{self.root}/{name}")  # noqa: PTH116 (a Path takes longer)
                if stat.S_ISREG(found.st_mode):
                    row = [name, found.st_size]
                    if labels is not None:
                        row.append(int(labels[index]))
                    if name.lower().endswith(_HASHED_SUFFIXES):
                        if name not in self._hashed:
                            self._hashed[name] = file_hash(self.root / name)
                        row.append(self._hashed[name])
                    rows.append(_json(row))
        return rows


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


class FolderSource(_FileSource):
    """A folder per class, with or without train and val above them, or a flat folder of images.

    The split "val" is the folder "val", "validation" or "test": the first of them that is there.
    Images in no class beside class folders are left out, and so are class folders without images;
    both is said.

    Args:
      root: the folder.
      class_names: the classes that labels refer to, usually a model's; by default the folders', in
        the order of timm: 2 before 10.
      labels_file: a CSV "path,label" relative to `root`, instead of class folders.

    Raises:
      InputError: no images, folders for splits beside others, or a class folder or label that is
        not among `class_names` or is there more than once.
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
            groups, names = _read_labels_file(root, Path(labels_file), class_names)
        else:
            groups, names = _scan_folders(root, class_names)
        self._set(root, groups, names)


def _images_below(root: Path, folder: str, others: list[str]) -> list[str]:
    """Paths, relative to `root`, of all images below one of its folders, sorted part by part.

    Those of images in formats that are not read are added to `others`.
    """
    names = []
    for entry in _entries(root / folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        # Neither asks the file system again, except about links.
        if entry.is_dir(follow_symlinks=False):
            names += _images_below(root, name, others)
        # macOS leaves "._photo.jpg" files behind that hold no image.
        elif entry.name.startswith("."):
            continue
        elif _is_image(entry.name) and _leads_to(entry.is_file):
            names.append(name)
        elif _suffix(entry.name) in _OTHER_SUFFIXES:
            others.append(name)
    return names


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path takes longer)


def _is_image(name: str) -> bool:
    return _suffix(name) in _SUFFIXES


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; links that lead nowhere or in circles are of none."""
    try:
        return is_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _folders_and_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders in a folder, and the names of the images that are right in it."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if _leads_to(entry.is_dir)]
    images = {entry.name for entry in entries if _is_image(entry.name)} - {*folders}
    return [folder / name for name in folders], sorted(images)


def _in_timms_order(names: Iterable[str]) -> list[str]:
    """Distinct names in the order of timm's classes: numbers by value, and case ignored."""

    def key(name: str) -> tuple[list[Any], str]:
        parts: list[Any] = re.split(r"([0-9]+)", name.lower())
        # By length and then digit by digit: there is no limit to how many there are.
        parts[1::2] = [(len(digits), digits) for digits in (n.lstrip("0") for n in parts[1::2])]
        return parts, name

    return sorted(set(names), key=key)


def _split_folders(root: Path, folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """The folders that are "train" and "val"; of several for "val", the first of `SPLITS`."""
    named = [folder for folder in folders if folder.name.lower() in SPLITS]
    by_name = {folder.name.lower(): folder for folder in named}
    if len(by_name) < len(folders):
        # One such name, right above images, may be a class: there are pictures of trains.
        if not named or (len(named) == 1 and not _folders_and_images(named[0])[0]):
            return []
        listed = ", ".join(folder.name for folder in folders[:10])
        raise InputError(
            f"{root}: holds the folders {listed}, of which {', '.join(p.name for p in named)} "
            "are splits, expected either classes or one folder for each split"
        )
    found = {SPLITS[name]: by_name[name] for name in reversed(SPLITS) if name in by_name}
    return sorted((folder, split) for split, folder in found.items())


def _say_unlabelled(images: Mapping[Path, Sequence[str]]) -> None:
    """Say which images beside classes are left out: test sets without labels, or strays."""
    for part, left in images.items():
        if left:
            log.warning("%s: left out %d images in no class, such as %s", part, len(left), left[0])


def _say_others(root: Path, others: Sequence[str]) -> None:
    if others:
        kinds = ", ".join(sorted({_suffix(name) for name in others}))
        log.warning("%s: left out %d files that are not read: %s", root, len(others), kinds)


def _scan_folders(
    root: Path, class_names: Sequence[str] | None
) -> tuple[list[_Group], Sequence[str]]:
    beside: dict[Path, list[str]] = {}
    folders, beside[root] = _folders_and_images(root)
    parts = _split_folders(root, folders)
    classes = [] if parts else [(folder, "train") for folder in folders]
    for part, split in parts:
        inner, beside[part] = _folders_and_images(part)
        classes += [(folder, split) for folder in inner]
    below = [folder.relative_to(root).as_posix() for folder, _ in classes]
    # On threads: over a network most of the time is waiting.
    others: list[str] = []
    images = list(threads().map(lambda folder: _images_below(root, folder, others), below))
    found = [c for c, files in zip(classes, images, strict=True) if files]
    labels = [composed(folder.name) for folder, _ in found]
    names = tuple(class_names or _in_timms_order(labels))
    index = index_classes(names, labels, str(root))
    # Before anything is said: whoever asked for other classes may look again without.
    if unknown := sorted(set(labels) - index.keys()):
        raise unknown_classes(str(root), unknown, names, "folders ")
    # No class, as for timm: it would shift the labels of those after it.
    empty = [name for name, files in zip(below, images, strict=True) if not files]
    if empty:
        log.warning(
            "%s: left out %d folders without images, such as %s", root, len(empty), empty[0]
        )
    if not found:
        others = []
        flat = _images_below(root, "", others)
        _say_others(root, others)
        return [(flat, UNLABELLED, "train")], class_names or ()
    _say_others(root, others)
    _say_unlabelled(beside)
    rows = zip(filter(None, images), labels, found, strict=True)
    groups = [(files, index[label], split) for files, label, (_, split) in rows]
    return groups, names


def _read_labels_file(
    root: Path, path: Path, class_names: Sequence[str] | None
) -> tuple[list[_Group], Sequence[str]]:
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
    labels = [composed(label) for _, (_, label) in lines]
    numbers = [_whole_number(label) for label in labels]
    if class_names is None and all(n is not None for n in numbers):
        class_names = [str(i) for i in range(min(max(numbers, default=-1) + 1, _MOST_CLASSES))]
    elif class_names is None:
        class_names = _in_timms_order(labels)
    index = index_classes(class_names, labels, str(path))
    groups, seen = [], {}
    for (number, (name, label)), value in zip(lines, numbers, strict=True):
        where = f"{path}: line {number}"
        # A class may be called "3" without being number 3; names go first.
        value = index.get(composed(label), UNLABELLED if value is None else value)
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
        groups.append(([str(relative)], value, SPLITS.get(above.lower(), "train")))
    return groups, class_names


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
        names, order = align_classes(pairs, class_names, str(root))
        index = dict(zip(self.wnids, order.tolist(), strict=True))
        groups = []
        for wnid in self.wnids:
            folder = root / "train" / wnid / "images"
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder, but wnids.txt names {wnid}")
            below = folder.relative_to(root).as_posix()
            groups.append((_images_below(root, below, []), index[wnid], "train"))
        annotations, seen = root / "val" / "val_annotations.txt", {}
        for number, line in enumerate(_lines(annotations) if (root / "val").is_dir() else (), 1):
            fields = line.split("\t")
            if len(fields) < 2 or fields[1] not in index:
                raise InputError(
                    f"{annotations}: line {number}: labels out of range: {line[:60]!r} "
                    "names no class of wnids.txt"
                )
            file = fields[0]
            if file == ".." or Path(file).name != file:
                raise InputError(f"{annotations}: line {number}: {file!r} is no file name")
            if seen.setdefault(file, number) != number:
                raise InputError(
                    f"{annotations}: line {number}: {file} is in line {seen[file]} already"
                )
            groups.append(([f"val/images/{file}"], index[fields[1]], "val"))
        self._set(root, groups, names)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but Tiny-ImageNet's layout has one")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a text file that can be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]
