"""Cached stages: what was computed once under a configuration is never computed again.

A stage's artefact is a directory named after the stage and a hash of everything it depends on. It
appears by a rename when it is whole, so that a run killed at any moment continues where it was.
Any number of programs may work in one directory: who needs what another one is computing waits.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    DISK_ERRORS,
    WriteError,
    atomic_directory,
    content_hash,
    file_hash,
    file_lock,
    read_json,
    read_safetensors,
    remove_leftovers,
    write_json,
)
from tapvit_jax.runtime import forget_programs
from tapvit_jax.versions import library_versions

_LAYOUT = 2
_META = "stage.json"
_ARRAYS = "arrays.safetensors"
_PACKAGE = "tapvit-jax"
# Of those in which a work directory's configuration is another.
_NAMED_FIELDS = 8

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Artefact:
    """What a stage produced.

    Attributes:
      key: hash of everything it depends on; stages that use it name it among their inputs.
      arrays: named arrays.
      meta: everything else, as JSON values.
      cached: whether it was found rather than computed.
    """

    key: str
    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]
    cached: bool


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A directory for a stage's own unfinished work, such as checkpoints.

    What another run left there is no one's: it may be deleted. `Stages.run` deletes all of it once
    the stage's artefact is there.

    Attributes:
      path: the directory, which need not exist.
    """

    path: Path


Compute = Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]


class Stages:
    """All artefacts under one directory, which all processes of a job see.

    Attributes:
      computed: names of the stages that were computed here rather than found, in order.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.computed: list[str] = []

    def key(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Hash of everything that a stage depends on."""
        return content_hash({"layout": _LAYOUT, "stage": name, "inputs": inputs})

    def directory(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Where a stage's artefact is kept; also for one that is written piece by piece."""
        return self._directory / f"{name}-{self.key(name, inputs)[:16]}"

    def run(self, name: str, inputs: Mapping[str, Any], compute: Compute) -> Artefact:
        """Return the stage's artefact, computing it only if it is not there.

        A damaged artefact is computed again, and that is said. Where a job has several processes
        the first of them decides and writes, all compute together, and all read the same.

        Raises:
          InputError: on every process, what `compute` raises on any of them, inputs that differ
            between processes, or an artefact that cannot be written or is not seen by all.
        """
        # A program may have hundreds of units, each with shapes of its own.
        forget_programs()
        # Else each would add its own part to another sum, under the key of the first.
        distributed.check_agreement({"stage": name, "inputs": inputs}, "the hosts")
        key = self.key(name, inputs)
        directory = self.directory(name, inputs)
        main = distributed.is_main()
        found = all_succeed(lambda: self._find(directory, key, say=False) if main else None)
        with contextlib.ExitStack() as stack:
            if not from_main(found is not None):
                found = all_succeed(lambda: self._claim(directory, key, stack) if main else None)
                if not from_main(found is not None):
                    arrays, meta = all_succeed(compute)
                    self.computed.append(name)
                    found = all_succeed(
                        lambda: self._write(directory, key, inputs, arrays, meta) if main else None
                    )
            artefact = all_succeed(lambda: found or self._read(directory, key))
        # Also what a program left that was killed between the artefact and this line.
        scratch = self.scratch(name, inputs).path
        if main and scratch.exists():
            # It only takes up room, which is no reason to fail.
            with contextlib.suppress(WriteError), file_lock(_lock_of(directory), wait=False) as own:
                # Else a program of another version is at work there.
                if own is not False:
                    shutil.rmtree(scratch, ignore_errors=True)
        return artefact

    def scratch(self, name: str, inputs: Mapping[str, Any]) -> Scratch:
        """Where a stage may keep unfinished work; gone when its artefact is there."""
        return Scratch(self._directory / "unfinished" / self.directory(name, inputs).name)

    def _claim(self, directory: Path, key: str, stack: contextlib.ExitStack) -> Artefact | None:
        """Take the stage's lock; whoever held it before may have computed the stage."""
        lock = file_lock(
            _lock_of(directory),
            on_wait=lambda: log.warning("%s: another process computes it; waiting", directory),
        )
        locked = stack.enter_context(lock)
        found = self._find(directory, key, say=True)
        if found is None and locked:
            remove_leftovers(directory)
        return found

    def _find(self, directory: Path, key: str, say: bool) -> Artefact | None:
        if not directory.exists():
            return None
        try:
            return self._read(directory, key)
        except InputError as error:
            if say:
                log.warning("%s; computing it again", error)
            return None

    def _write(
        self,
        directory: Path,
        key: str,
        inputs: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
    ) -> Artefact:
        # Not ascontiguousarray, which makes a vector of a scalar.
        arrays = {n: np.asarray(array, order="C") for n, array in arrays.items()}
        spec = {"key": key, "inputs": inputs, "meta": meta, "libraries": library_versions()}
        # As it will be read: a first run and a second one get the same.
        spec = json.loads(json.dumps(spec, allow_nan=False))
        if directory.exists():
            # Without locks two may compute the same; who is whole first wins.
            overtaken = self._find(directory, key, say=False)
            if overtaken is not None:
                return overtaken
        try:
            with atomic_directory(directory) as partial:
                safetensors.numpy.save_file(arrays, partial / _ARRAYS)
                spec["sha256"] = file_hash(partial / _ARRAYS)
                write_json(partial / _META, spec | {"spec_sha256": content_hash(spec)})
        except OSError as error:
            # The other one was quicker by that much.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return self._read(directory, key)
        return Artefact(key, arrays, spec["meta"], cached=False)

    def _read(self, directory: Path, key: str) -> Artefact:
        spec = read_json(directory / _META)
        path = directory / _ARRAYS
        if not isinstance(spec, dict) or spec.get("key") != key or not path.is_file():
            raise InputError(f"{directory}: is not the stage it should be")
        if spec.pop("spec_sha256", None) != content_hash(spec):
            raise InputError(f"{directory / _META}: altered")
        _check_version(directory, dict(spec.get("libraries", {})).get(_PACKAGE))
        if spec.get("sha256") != file_hash(path):
            raise InputError(f"{path}: truncated or altered")
        return Artefact(key, read_safetensors(path), spec["meta"], cached=True)


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


Files = Mapping[str, str | None]
"""Hashes of what a result was made from, by what it is."""


def write_row(path: Path, key: str, row: Mapping[str, Any], files: Files | None = None) -> None:
    """Write a finished result, JSON values, under the hash of what it depends on but files."""
    version = library_versions()[_PACKAGE]
    write_json(path, {"key": key, "files": files, "version": version, "row": row})


def read_row(
    path: Path, key: str, say: bool = False, files: Files | None = None
) -> dict[str, Any] | None:
    """What `write_row` wrote; None where there is nothing, or nothing whole, of this version.

    Args:
      path: of the file.
      key: what it has to be the result of.
      say: whether to say that it is damaged, or that another version made it.
      files: and of which files; None does not ask.
    """
    if not path.exists():
        return None
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("row"), dict):
            raise InputError(f"{path}: truncated or altered")
        if found.get("key") != key:
            raise InputError(f"{path}: is not the result it should be")
        _check_version(path, found.get("version"))
    except InputError as error:
        if say:
            log.warning("%s; computing it again", error)
        return None
    return found["row"] if files is None or found.get("files") == files else None


def _check_version(path: Path, found: Any) -> None:
    version = library_versions()[_PACKAGE]
    if found != version:
        raise InputError(f"{path}: was made by {_PACKAGE} {found}, this is {version}")


def all_succeed(action: Callable[[], T]) -> T:
    """Do something on every process; where it fails on one it fails on all.

    What is done may use the collectives of `distributed`: a process that waits in one of them for
    another that has failed is told so.

    Raises:
      InputError: it failed on another process; what it raises here goes through as it is, but for
        a disk that is full or broken, which is a `WriteError`.
    """
    result = failure = None
    with distributed.section() as depth:
        try:
            try:
                result = action()
            except distributed.PeerError:
                raise
            except OSError as error:
                failure = _disk_error(error)
            except Exception as error:
                failure = error
            distributed.agree(0 if failure is None else depth)
            return result
        except distributed.PeerError as error:
            if error.depth < depth:
                raise
    reason = "" if failure is None else str(failure) or type(failure).__name__
    kind = b"w" if isinstance(failure, WriteError) else b"i"
    reasons = distributed.exchange_bytes(kind + reason.encode() if failure is not None else b"")
    if failure is not None:
        raise failure
    process, text = next((p, text) for p, text in enumerate(reasons) if text)
    error = WriteError if text[:1] == b"w" else InputError
    raise error(f"process {process}: {text[1:].decode()}")


def _disk_error(error: OSError) -> Exception:
    if error.errno not in DISK_ERRORS:
        return error
    where = "" if error.filename is None else f"{error.filename}: "
    found = WriteError(f"{where}cannot be written: {error.strerror}")
    found.__cause__ = error
    return found


def from_main(value: T) -> T:
    """What the first process holds, a JSON value, on every process."""
    return json.loads(distributed.gather_bytes(json.dumps(value).encode())[0])


def on_main(action: Callable[[], Any]) -> None:
    """Do something on the first process; where it fails, all fail, and none goes on before."""
    all_succeed(lambda: action() if distributed.is_main() else None)


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Tie a work directory to one configuration, or check that it is tied to this one.

    Raises:
      InputError: it belongs to another configuration (names the fields that differ), or it holds
        files that are none of ours.
    """
    path = workdir / "config.json"
    # Listed first: whoever has written something by then has its config.json there as well.
    entries = list(workdir.iterdir()) if workdir.is_dir() else []
    if path.exists():
        check_workdir(workdir, config)
        return
    # A program that was killed while it claimed the directory has left a part of the file.
    if any(
        not (entry.name.startswith(".config.json.") and entry.suffix == ".partial")
        for entry in entries
    ):
        raise InputError(f"{workdir}: is not empty and holds no config.json; choose another")
    write_json(path, config)


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Check that a work directory is tied to this configuration.

    Raises:
      InputError: it is tied to none, or to another one (names the fields that differ).
    """
    path = workdir / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a configuration; choose another --workdir")
    differing = differences(found, config)
    if differing:
        more = len(differing) - _NAMED_FIELDS
        raise InputError(
            f"{workdir}: belongs to another configuration; these fields differ: "
            + ", ".join(differing[:_NAMED_FIELDS])
            + (f" and {more} more" if more > 0 else "")
            + ". Choose another --workdir or delete this one"
        )


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Dotted names of the fields in which two nested JSON values differ, with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        result = []
        # Single values first: which program, whose data, what seed.
        keys = sorted(found.keys() | expected.keys())
        for key in sorted(keys, key=lambda k: isinstance(found.get(k, expected.get(k)), Mapping)):
            path = f"{name}.{key}" if name else str(key)
            if key not in found or key not in expected:
                there = repr(found[key]) if key in found else "nothing"
                here = repr(expected[key]) if key in expected else "nothing"
                result.append(f"{path} ({there} there, {here} here)")
            else:
                result += differences(found[key], expected[key], path)
        return result
    if found != expected:
        return [f"{name} ({found!r} there, {expected!r} here)"]
    return []
