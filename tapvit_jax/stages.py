"""Cached stages: what was computed once under a configuration is never computed again.

A stage's artefact is a directory named after the stage and a hash of everything it depends on. It
appears by a rename when it is whole, so that a run killed at any moment continues where it was.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    atomic_directory,
    content_hash,
    file_hash,
    read_json,
    read_safetensors,
    write_json,
)
from tapvit_jax.versions import library_versions

_LAYOUT = 2
_META = "stage.json"
_ARRAYS = "arrays.safetensors"

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


Compute = Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]


class Stages:
    """All artefacts under one directory."""

    def __init__(self, directory: Path):
        self._directory = directory

    def run(self, name: str, inputs: Mapping[str, Any], compute: Compute) -> Artefact:
        """Return the stage's artefact, computing it only if it is not there.

        A damaged artefact is computed again, and that is said.
        """
        key = content_hash({"layout": _LAYOUT, "stage": name, "inputs": inputs})
        directory = self._directory / f"{name}-{key[:16]}"
        if directory.exists():
            try:
                return self._read(directory, key)
            except InputError as error:
                log.warning("%s; computing it again", error)
        arrays, meta = compute()
        # Not ascontiguousarray, which makes a vector of a scalar.
        arrays = {n: np.asarray(array, order="C") for n, array in arrays.items()}
        spec = {"key": key, "inputs": inputs, "meta": meta, "libraries": library_versions()}
        # As it will be read: a first run and a second one get the same.
        spec = json.loads(json.dumps(spec, allow_nan=False))
        with atomic_directory(directory) as partial:
            safetensors.numpy.save_file(arrays, partial / _ARRAYS)
            spec["sha256"] = file_hash(partial / _ARRAYS)
            write_json(partial / _META, spec | {"spec_sha256": content_hash(spec)})
        return Artefact(key, arrays, spec["meta"], cached=False)

    def scratch(self, name: str) -> Path:
        """A directory for a stage's own unfinished work, such as checkpoints."""
        return self._directory / "unfinished" / name

    def _read(self, directory: Path, key: str) -> Artefact:
        spec = read_json(directory / _META)
        path = directory / _ARRAYS
        if not isinstance(spec, dict) or spec.get("key") != key or not path.is_file():
            raise InputError(f"{directory}: is not the stage it should be")
        if spec.pop("spec_sha256", None) != content_hash(spec):
            raise InputError(f"{directory / _META}: altered")
        if spec.get("sha256") != file_hash(path):
            raise InputError(f"{path}: truncated or altered")
        return Artefact(key, read_safetensors(path), spec["meta"], cached=True)


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Tie a work directory to one configuration, or check that it is tied to this one.

    Raises:
      InputError: it belongs to another configuration (names the fields that differ), or it holds
        files that are none of ours.
    """
    path = workdir / "config.json"
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict):
            raise InputError(f"{path}: is not a configuration; choose another --workdir")
        differing = differences(found, config)
        if differing:
            raise InputError(
                f"{workdir}: belongs to another configuration; these fields differ: "
                + ", ".join(differing)
                + ". Choose another --workdir or delete this one"
            )
        return
    if workdir.is_dir() and any(workdir.iterdir()):
        raise InputError(f"{workdir}: is not empty and holds no config.json; choose another")
    write_json(path, config)


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Dotted names of the fields in which two nested JSON values differ, with both values."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        result = []
        for key in sorted(found.keys() | expected.keys()):
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
