"""Writing files so that nobody ever sees half of one."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tapvit_jax.errors import InputError


def _partial_name(path: Path, directory: bool) -> Path:
    # In the target's own folder, so that the final rename never crosses a file system.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make = tempfile.mkdtemp if directory else _temporary_file
        return Path(make(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _temporary_file(prefix: str, suffix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=dir)
    os.close(handle)
    return name


def _user_mode(path: Path, mode: int) -> None:
    # tempfile makes everything private to the user; give what the user's umask would have given.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` if the body succeeds and vanishes if it does not.

    Raises:
      InputError: the folder cannot be made or written to.
    """
    path = Path(path)
    partial = _partial_name(path, directory=False)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        _user_mode(partial, 0o666)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the body succeeds and vanishes otherwise.

    A folder that stood at `path` is replaced; it is moved aside first, so that a crash between the
    two renames leaves the old or the new contents on disk, never a mixture.

    Raises:
      InputError: `path` is a file, or its parent cannot be made or written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, expected a folder or nothing")
    partial = _partial_name(path, directory=True)
    try:
        yield partial
        _user_mode(partial, 0o777)
        if path.exists():
            old = partial.with_suffix(".old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
