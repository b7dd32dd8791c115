"""Features of a public pool: computed once, kept on disk, and read in pieces from there.

A directory holds features.npy, (images, dimensions) in float32, and features.json: what they are
features of, and a checksum of every piece. Until they are whole, each piece is a file of its own in
"unfinished", so that a run that is killed goes on behind the last of them, with any number of
processes. Batches lie on one grid that starts at the first image, so that the features are the same
bits however often the work was interrupted and however many processes and devices shared it.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax import distributed
from tapvit_jax.data.base import ImageSource, check_indices
from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    atomic_file,
    content_hash,
    file_lock,
    read_json,
    remove_leftovers,
    write_json,
)
from tapvit_jax.models.store import read_spec
from tapvit_jax.proxy.features import Extractor
from tapvit_jax.prune.cost import images_at_once
from tapvit_jax.stages import all_succeed, from_main

FORMAT = "tapvit-pool-features"
VERSION = 1
FEATURES_FILE = "features.npy"
RECORD_FILE = "features.json"
_UNFINISHED, _PIECES_FILE = "unfinished", "pieces.json"
# Images of one piece, about: what a killed process has to compute again.
_PIECE_ROWS = 2**14
_DTYPE = np.dtype("<f4")
_DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


def pool_features(
    extractor: Extractor,
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    directory: str | os.PathLike,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Features of the images of a pool, in their order, as a read-only array mapped from a file.

    What `directory` holds of them is used and not computed: all of them, without a look at the
    images, or the pieces that a killed run left. Anything else that it holds of its own kind, of
    other images or damaged, is replaced, with a warning. Several processes share the images and
    the directory. Features that were computed in batches of another size, which differ by rounding,
    are used if they are whole.

    Args:
      extractor: what computes the features.
      source: where the images come from.
      indices: which images, in which order.
      directory: where the features are kept; made if it is not there.
      batch_size: images that a device takes at a time; None is `images_at_once`.
      workers: processes that decode; 0 decodes on threads of this process.
      on_batch: told how many images more are done, of this process's share.

    Raises:
      InputError: no images, an image that cannot be read or whose features are not finite (named),
        processes with different pools, or a directory that cannot be written to or is not seen by
        all processes.

    Source: ours.
    """
    indices = check_indices(indices, source)
    if indices.size == 0:
        raise InputError(f"{source.name}: no images chosen, expected at least one")
    if batch_size is None:
        batch_size = images_at_once(extractor.network)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    directory = Path(directory)
    record = {
        "extractor": extractor.fingerprint,
        "source": source.images_fingerprint(),
        "indices": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        "rows": int(indices.size),
        "dim": extractor.dim,
        "dtype": _DTYPE.str,
    }
    distributed.check_agreement(record | {"batch_size": batch_size}, "pool features")
    pieces = _Pieces(directory / _UNFINISHED, record, batch_size)
    with contextlib.ExitStack() as stack:
        whole = _on_main(lambda: not pieces.exist() and _is_whole(directory, record, say=False))
        whole = whole or _on_main(lambda: _claim(directory, record, pieces, stack))
        if not whole:
            all_succeed(lambda: pieces.compute(extractor, source, indices, workers, on_batch))
            _on_main(lambda: _join(directory, record, pieces))
        elif on_batch is not None:
            on_batch(len(distributed.share(indices.size)))
        return all_succeed(lambda: _open(directory / FEATURES_FILE, record))


def _on_main(action: Callable[[], bool]) -> bool:
    return from_main(all_succeed(lambda: action() if distributed.is_main() else False))


def _claim(
    directory: Path, record: Mapping[str, Any], pieces: "_Pieces", stack: contextlib.ExitStack
) -> bool:
    """Lock the directory and prepare it, unless whoever held it before has made the features."""
    for name in (FEATURES_FILE, RECORD_FILE):
        if (directory / name).is_dir():
            raise InputError(f"{directory / name}: is a folder, expected a file or nothing")
    if (directory / _UNFINISHED).is_file():
        raise InputError(f"{directory / _UNFINISHED}: is a file, expected a folder or nothing")
    waiting = "%s: another process computes these features; waiting"
    lock = file_lock(directory / ".lock", on_wait=lambda: log.warning(waiting, directory))
    locked = stack.enter_context(lock)
    if _is_whole(directory, record, say=True):
        # What a run left that was killed between its last two steps.
        pieces.remove()
        return True
    if locked:
        for name in (FEATURES_FILE, RECORD_FILE):
            remove_leftovers(directory / name)
    pieces.prepare()
    return False


def _is_whole(directory: Path, record: Mapping[str, Any], say: bool) -> bool:
    if not (directory / FEATURES_FILE).exists() and not (directory / RECORD_FILE).exists():
        return False
    try:
        _check(directory, record)
    except InputError as error:
        if say:
            log.warning("%s; making the features again", error)
        return False
    return True


def _check(directory: Path, record: Mapping[str, Any]) -> None:
    found = read_spec(directory / RECORD_FILE, FORMAT, VERSION)
    differing = sorted(name for name in record if found.get(name) != record[name])
    if differing:
        raise InputError(
            f"{directory / RECORD_FILE}: features of something else; these differ: "
            + ", ".join(differing)
        )
    path = directory / FEATURES_FILE
    mapped = _open(path, record)
    piece_rows, digests = found.get("piece_rows"), found.get("sha256")
    if type(piece_rows) is not int or piece_rows < 1 or not isinstance(digests, list):
        raise InputError(f"{directory / RECORD_FILE}: holds no checksums")
    piece_bytes = min(piece_rows, record["rows"]) * record["dim"] * _DTYPE.itemsize
    with path.open("rb") as file:
        file.seek(mapped.offset)
        read = iter(lambda: file.read(piece_bytes), b"")
        if [hashlib.sha256(data).hexdigest() for data in read] != digests:
            raise InputError(f"{path}: altered, the checksum differs")


def _open(path: Path, record: Mapping[str, Any]) -> Float[np.ndarray, "n d"]:
    """Map features from a file that is just what `_join` writes.

    Its header is compared, not read: NumPy would evaluate it, and take it at its word.
    """
    header, shape = _header(record), (record["rows"], record["dim"])
    size = len(header) + math.prod(shape) * _DTYPE.itemsize
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        found = file.read(len(header))
    if found != header:
        raise InputError(f"{path}: its header is not that of {_DTYPE} of shape {shape}")
    if path.stat().st_size != size:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected {size}")
    return np.memmap(path, _DTYPE, "r", len(header), shape)


def _header(record: Mapping[str, Any]) -> bytes:
    header = {"descr": _DTYPE.str, "fortran_order": False}
    header["shape"] = record["rows"], record["dim"]
    found = io.BytesIO()
    np.lib.format.write_array_header_1_0(found, header)
    return found.getvalue()


def _join(directory: Path, record: Mapping[str, Any], pieces: "_Pieces") -> bool:
    # First of all, so that it never stands beside features that it does not describe.
    (directory / RECORD_FILE).unlink(missing_ok=True)
    digests = []
    with atomic_file(directory / FEATURES_FILE) as partial, partial.open("wb") as file:
        file.write(_header(record))
        for number in range(pieces.count):
            data = pieces.read(number)
            if data is None:
                raise InputError(
                    f"{pieces.path(number)}: missing or damaged, expected a piece of the "
                    "features; all processes must see the same directory"
                )
            file.write(data)
            digests.append(hashlib.sha256(data).hexdigest())
    spec = {"format": FORMAT, "version": VERSION, **record}
    spec |= {"piece_rows": pieces.rows, "sha256": digests}
    write_json(directory / RECORD_FILE, spec)
    pieces.remove()
    return True


class _Pieces:
    """The files of features that are not whole yet: a checksum, then rows of numbers."""

    def __init__(self, directory: Path, record: Mapping[str, Any], batch_size: int):
        self._directory = directory
        self.rows = -(-_PIECE_ROWS // batch_size) * batch_size
        self.count = -(-record["rows"] // self.rows)
        self._record = record
        self._batch_size = batch_size
        self._key = content_hash({**record, "batch_size": batch_size, "piece_rows": self.rows})

    def path(self, number: int) -> Path:
        """Where a piece lies."""
        return self._directory / f"{number:06}.piece"

    def span(self, number: int) -> range:
        """Rows of a piece."""
        return range(number * self.rows, min((number + 1) * self.rows, self._record["rows"]))

    def read(self, number: int) -> bytes | None:
        """The numbers of a piece, or None if it is not there, damaged or of other features."""
        try:
            found = self.path(number).read_bytes()
        except FileNotFoundError:
            return None
        digest, data = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        return data if digest == self._digest(number, data) else None

    def exist(self) -> bool:
        """Whether anything is left that is not whole."""
        return self._directory.exists()

    def remove(self) -> None:
        """Delete all pieces, and their directory if it holds nothing else."""
        for pattern in ("*.piece", _PIECES_FILE, ".*.partial"):
            for path in self._directory.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def prepare(self) -> None:
        """Drop what pieces of other features, or of batches of another size, are left."""
        spec = {"key": self._key}
        path = self._directory / _PIECES_FILE
        with contextlib.suppress(InputError):
            if read_json(path) == spec:
                return
        if self._directory.exists():
            log.warning("%s: pieces of other features; computing all again", self._directory)
            self.remove()
        write_json(path, spec)

    def compute(
        self,
        extractor: Extractor,
        source: ImageSource,
        indices: Int[np.ndarray, "n"],
        workers: int,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        """Compute those of this process's pieces that are not there."""
        missing = []
        for number in distributed.share(self.count):
            if self.read(number) is None:
                if self.path(number).exists():
                    log.warning("%s: damaged; computing it again", self.path(number))
                missing.append(number)
            elif on_batch is not None:
                on_batch(len(self.span(number)))
        if not missing:
            return
        # Whole batches but for the last piece of all: each image stays in the batch it belongs to.
        wanted = np.concatenate([indices[self.span(number)] for number in missing])
        stream = _checked(
            extractor.stream(source, wanted, self._batch_size, workers=workers), source, wanted
        )
        with contextlib.closing(stream):
            self._write_all(missing, stream, on_batch)

    def _write_all(
        self,
        numbers: Sequence[int],
        stream: Iterator[Float[np.ndarray, "b d"]],
        on_batch: Callable[[int], None] | None,
    ) -> None:
        rest = np.zeros((0, self._record["dim"]), _DTYPE)
        for number in numbers:
            parts, held, size = [rest], len(rest), len(self.span(number))
            while held < size:
                parts.append(next(stream))
                held += len(parts[-1])
                if on_batch is not None:
                    on_batch(len(parts[-1]))
            found = np.concatenate(parts)
            rest = found[size:]
            data = found[:size].astype(_DTYPE).tobytes()
            with atomic_file(self.path(number)) as partial:
                partial.write_bytes(self._digest(number, data) + data)

    def _digest(self, number: int, data: bytes) -> bytes:
        return hashlib.sha256(f"{self._key} {number} ".encode() + data).digest()


def _checked(
    stream: Iterator[Float[np.ndarray, "b d"]], source: ImageSource, indices: Int[np.ndarray, "n"]
) -> Iterator[Float[np.ndarray, "b d"]]:
    """Pass features on if they are finite."""
    start = 0
    for found in stream:
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if bad.size:
            name = source.describe(int(indices[start + bad[0]]))
            raise InputError(f"{name}: its features hold NaN or infinity, expected finite numbers")
        yield found
        start += len(found)
