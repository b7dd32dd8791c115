"""CIFAR-10 and CIFAR-100 in their binary layouts, read from the disk as they are asked for."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tapvit_jax.data.base import ImageSource, align_classes
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, file_hash

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Files of one of the sets.

    Attributes:
      parts: file and the split that it is.
      names: file with the classes' names; the last label of a record is one of these.
      classes: how many values each label of a record has.
      pickled: files that only the pickled layout has, whose contents nobody should run.
    """

    parts: tuple[tuple[str, str], ...]
    names: str
    classes: tuple[int, ...]
    pickled: tuple[str, ...]


_LAYOUTS = {
    "cifar-100": _Layout(
        (("train.bin", "train"), ("test.bin", "val")),
        "fine_label_names.txt",
        (20, 100),
        ("meta", "train"),
    ),
    "cifar-10": _Layout(
        (
            *((f"data_batch_{i}.bin", "train") for i in range(1, 6)),
            ("test_batch.bin", "val"),
        ),
        "batches.meta.txt",
        (10,),
        ("batches.meta", "data_batch_1"),
    ),
}


class CifarSource(ImageSource):
    """CIFAR-10 or CIFAR-100 as in cifar-10-binary.tar.gz or cifar-100-binary.tar.gz.

    A record is the labels, a byte each (CIFAR-100: superclass and class; the class is used), and
    3 x 32 x 32 bytes of pixels. Files are mapped into memory, not read.

    Raises:
      InputError: a file is missing, no multiple of a record or holds a label out of range, the
        layout is the pickled one, or a class is not among `class_names`.
    """

    def __init__(self, root: str | os.PathLike, class_names: Sequence[str] | None = None):
        root = Path(root)
        layout = next((x for name in _LAYOUTS if (x := _match(root, name))), None)
        if layout is None:
            raise InputError(f"{root}: no such folder, or not in a CIFAR layout")
        self.name = str(root)
        *_, count = layout.classes
        names = _read_names(root / layout.names, count)
        self.class_names, order = align_classes([(n,) for n in names], class_names, self.name)
        self._files = [root / file for file, _ in layout.parts]
        self._header = len(layout.classes)
        self._records = self._map()
        for path, records in zip(self._files, self._records, strict=True):
            for column, classes in enumerate(layout.classes):
                wrong = np.flatnonzero(records[:, column] >= classes)
                if wrong.size:
                    raise InputError(
                        f"{path}: record {wrong[0]}: label {records[wrong[0], column]} is out of "
                        f"range, expected 0 to {classes - 1}"
                    )
        sizes = [len(records) for records in self._records]
        self._starts = np.cumsum([0, *sizes])
        self.labels = order[np.concatenate([r[:, self._header - 1] for r in self._records])]
        self.splits = np.repeat([split for _, split in layout.parts], sizes)

    def _map(self) -> list[UInt8[np.ndarray, "n r"]]:
        size = self._header + _PIXELS
        found = []
        for path in self._files:
            if not path.is_file():
                raise InputError(f"{path}: no such file, but the layout has one")
            length = path.stat().st_size
            if length == 0 or length % size:
                raise InputError(f"{path}: {length} bytes, expected a multiple of {size}")
            found.append(np.memmap(path, np.uint8, "r").reshape(-1, size))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Pickled for another process, a memory map would become all its bytes.
        return self.__dict__ | {"_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._records = self._map()

    def describe(self, index: int) -> str:
        """File and position in it."""
        part, row = self._find(index)
        return f"{self._files[part]}[{row}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Prepare one image."""
        part, row = self._find(index)
        planes = self._records[part][row, self._header :].reshape(3, _SIDE, _SIDE)
        return preprocess.array(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))))

    def fingerprint(self) -> str:
        """Hash of the files and labels."""
        return content_hash({"files": self._hashes, "labels": self.labels.tolist()})

    def images_fingerprint(self) -> str:
        """Hash of the files."""
        return content_hash({"files": self._hashes})

    @functools.cached_property
    def _hashes(self) -> list[str]:
        return [file_hash(path) for path in self._files]

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])


def is_cifar(root: Path) -> bool:
    """Whether a folder is in one of the binary layouts.

    Raises:
      InputError: it is in a pickled layout.
    """
    return any(_match(root, name) for name in _LAYOUTS)


def _match(root: Path, name: str) -> _Layout | None:
    layout = _LAYOUTS[name]
    if any((root / file).is_file() for file in (layout.names, layout.parts[0][0])):
        return layout
    if all((root / file).is_file() for file in layout.pickled):
        raise InputError(
            f"{root}: is the pickled layout, which is never read (unpickling executes what a file "
            f"says); expected the binary one, {name}-binary.tar.gz"
        )
    return None


def _read_names(path: Path, count: int) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but the layout has one")
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a text file that can be read ({error})") from error
    if len(set(names)) != count or len(names) != count:
        raise InputError(f"{path}: {len(names)} names, expected {count} distinct ones")
    return names
