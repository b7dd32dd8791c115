"""Writing files so that nobody ever sees half of one."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tapvit_jax.errors import InputError

# What a full or failing disk says, whoever happens to write at that moment.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# What file systems without locks say.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_POLL_SECONDS, _SILENT_SECONDS = 0.1, 3.0


class WriteError(InputError):
    """A file cannot be written: the disk is full, broken or closed to the user."""


def _cannot_write(path: Path, reason: object) -> WriteError:
    return WriteError(f"{path}: cannot be written: {reason}")


def _partial_name(path: Path, target: Path, directory: bool) -> Path:
    # In the target's own folder, so that the final rename never crosses a file system.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        make = tempfile.mkdtemp if directory else _temporary_file
        return Path(make(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except (FileExistsError, NotADirectoryError) as error:
        raise WriteError(f"{path}: lies below a file, expected a folder there") from error
    except OSError as error:
        raise _cannot_write(path, error.strerror) from error


def _temporary_file(prefix: str, suffix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=dir)
    os.close(handle)
    return name


@contextlib.contextmanager
def _disk_errors_name(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        # From a file within a folder: say its name as it would have been.
        raise type(error)(str(error).replace(str(partial), str(path))) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise _cannot_write(path, error.strerror) from error
    except safetensors.SafetensorError as error:
        # All that the library lets through of an OSError is its text.
        if "os error" not in str(error):
            raise
        raise _cannot_write(path, error) from error


def _finish(partial: Path) -> None:
    """Flush a file and give it the mode that the user's umask would have given.

    tempfile makes everything private to the user, and so does the safetensors library.
    """
    if not partial.is_dir():
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod((0o777 if partial.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` if the body succeeds and vanishes if it does not.

    A link stays, and what it points to is replaced.

    Raises:
      InputError: `path` is no regular file, its folder cannot be made or written to, or the disk is
        full, even when that shows inside the body.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    _check_replaceable_file(path, target)
    partial = _partial_name(path, target, directory=False)
    try:
        with _disk_errors_name(path, partial):
            yield partial
            _finish(partial)
            _rename(path, partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the body succeeds and vanishes otherwise.

    A folder that stood at `path` is replaced, unless it holds anything that the new one does not:
    that would be lost. It is moved aside first, so that a crash between the two renames leaves the
    old or the new contents on disk, never a mixture. A link stays, and what it points to is
    replaced.

    Raises:
      InputError: `path` is a file or a folder with other contents, its parent cannot be made or
        written to, or the disk is full, even when that shows inside the body.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise InputError(f"{path}: is a file, expected a folder or nothing")
    partial = _partial_name(path, target, directory=True)
    try:
        with _disk_errors_name(path, partial):
            yield partial
            for made in (*partial.rglob("*"), partial):
                _finish(made)
            if target.exists():
                _replace_directory(path, target, partial)
            else:
                _rename(path, partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(path: Path, source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            # Another writer was quicker, which may be as well.
            raise
        # Not a disk error by its number: mounted buckets, for one, rename no folders (EMFILE).
        raise _cannot_write(path, f"renaming to it failed: {error.strerror}") from error


def check_file(path: str | os.PathLike) -> None:
    """Refuse a path at which `atomic_file` could not put a file.

    For programs that work long before they write.

    Raises:
      InputError: `path` is no regular file, or its folder cannot be made or written to.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    _check_replaceable_file(path, target)
    _check_writable(path, target)


def _check_replaceable_file(path: Path, target: Path) -> None:
    if target.exists() and not target.is_file():
        # Not even a device: root could replace /dev/null by a file.
        raise InputError(f"{path}: is a folder or a device, expected a file or nothing")


def check_directory(path: str | os.PathLike, names: Iterable[str]) -> None:
    """Refuse a path at which `atomic_directory` could not put a folder of these entries.

    For programs that work long before they write.

    Raises:
      InputError: `path` is a file or holds anything else, or its parent cannot be made or written
        to.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists():
        _check_replaceable_directory(path, target, names)
    _check_writable(path, target)


def _check_writable(path: Path, target: Path) -> None:
    # Nothing is above the root.
    above = next((folder for folder in target.parents if folder.exists()), target)
    if not above.is_dir():
        raise WriteError(f"{path}: lies below a file, expected a folder there")
    # Only trying tells: permissions say little to root, and nothing of mounted buckets.
    probe = _partial_name(path, above / target.name, directory=True)
    probe.rmdir()


def _check_replaceable_directory(path: Path, target: Path, names: Iterable[str]) -> None:
    if not target.is_dir():
        raise InputError(f"{path}: is a file, expected a folder or nothing")
    lost = sorted({entry.name for entry in target.iterdir()} - set(names))
    if lost:
        raise InputError(
            f"{path}: holds {lost[0]!r}, which would be lost; choose another folder or delete it"
        )


def _replace_directory(path: Path, target: Path, partial: Path) -> None:
    _check_replaceable_directory(path, target, (entry.name for entry in partial.iterdir()))
    old = partial.with_suffix(".old")
    # A mount point, for one, cannot be moved.
    _rename(path, target, old)
    try:
        _rename(path, partial, target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete what writers of `path` that were killed left beside it.

    Only for who holds the lock of `path`: a writer that is alive would lose its work.
    """
    target = Path(os.path.realpath(path))
    for suffix in ("partial", "old"):
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.{suffix}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(
    path: str | os.PathLike, *, wait: bool = True, on_wait: Callable[[], None] = lambda: None
) -> Iterator[bool | None]:
    """Hold a lock that vanishes with its process, however that ends.

    Yields True, False where another process holds it and `wait` is false, or None where the file
    system has no locks: then nobody is kept out.

    Args:
      path: the lock's file; it is gone again when nobody holds the lock.
      wait: for a process that holds it.
      on_wait: called once when waiting takes more than a few seconds.

    Raises:
      WriteError: the file cannot be made.

    Source: ours.
    """
    path = Path(path)
    locked, handle = _acquire(path, wait, on_wait)
    try:
        yield locked
    finally:
        if handle is not None:
            # Before it is released: who waited for this file sees that it is no longer the lock.
            path.unlink(missing_ok=True)
            os.close(handle)


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a process holds the lock of this path."""
    if not Path(path).exists():
        return False
    with file_lock(path, wait=False) as locked:
        return locked is False


def _acquire(path: Path, wait: bool, on_wait: Callable[[], None]) -> tuple[bool | None, int | None]:
    start, said = time.monotonic(), False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileExistsError, NotADirectoryError) as error:
            raise WriteError(f"{path}: lies below a file, expected a folder there") from error
        except OSError as error:
            raise _cannot_write(path, error.strerror) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                return True, handle
            os.close(handle)
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None, handle
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise _cannot_write(path, error.strerror) from error
        if not wait:
            return False, None
        if not said and time.monotonic() - start > _SILENT_SECONDS:
            on_wait()
            said = True
        time.sleep(_POLL_SECONDS)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, limit_bytes: int = 64 * 2**20) -> Any:
    """Read a JSON file.

    Raises:
      InputError: missing, larger than `limit_bytes`, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > limit_bytes:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {limit_bytes}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # Not only what json itself finds: also other encodings, endless numbers and deep nesting.
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read all tensors of a .safetensors file; nothing in such a file is executed.

    Raises:
      InputError: missing, or not a whole .safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: truncated or not a .safetensors file ({error})") from error
