"""A model as a directory: model.json (everything but the numbers) and params.safetensors.

Nothing in either file is executed. Loading needs the directory alone and checks all of it: the
format's version, the config, the checksum, and every parameter's presence, shape and dtype.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_directory, file_hash, read_json, read_safetensors, write_json
from tapvit_jax.models.backbone import Config, family, param_shapes, read_config
from tapvit_jax.models.params import Params, check_params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.structs import from_plain, to_plain
from tapvit_jax.versions import library_versions

FORMAT = "tapvit-model"
VERSION = 2
SPEC_FILE = "model.json"
PARAMS_FILE = "params.safetensors"

FOREIGN = "a folder of timm or Hugging Face"

# Parts of a parameter's name; ours have four.
_DEEPEST = 16

# What a directory is, by a file in it.
_KINDS = {SPEC_FILE: "a model", "extractor.json": "an extractor", "config.json": FOREIGN}


def save(model: Model, directory: str | os.PathLike) -> None:
    """Write a model to a directory, all or nothing; a model that stood there is replaced.

    Raises:
      InputError: the parameters or class names do not match the config, the history holds what
        JSON cannot, or the directory cannot be written.

    Source: ours.
    """
    check_params(param_shapes(model.config), model.params, model.name)
    _check_class_names(model.class_names, model.config, model.name)
    with atomic_directory(directory) as partial:
        save_params(model.params, partial / PARAMS_FILE)
        spec = {
            "format": FORMAT,
            "version": VERSION,
            "name": model.name,
            "family": family(model.config),
            "config": to_plain(model.config),
            "preprocess": to_plain(model.preprocess),
            "class_names": list(model.class_names),
            "architecture": model.architecture,
            "prior": model.prior,
            "history": to_plain(model.history, f"{model.name}: history"),
            "params_sha256": file_hash(partial / PARAMS_FILE),
            "libraries": library_versions(),
        }
        write_json(partial / SPEC_FILE, spec)


def load(directory: str | os.PathLike) -> Model:
    """Read a model that `save` wrote.

    Raises:
      InputError: a missing, damaged or foreign file, or parameters that do not match the config.

    Source: ours.
    """
    directory = Path(directory)
    path = spec_file(directory, SPEC_FILE, "a model")
    spec = read_spec(path, FORMAT, VERSION)
    config = read_config(spec.get("family"), spec.get("config"), f"{path}: config")
    kinds = {
        "preprocess": Preprocess | None,
        "class_names": tuple[str, ...],
        "name": str,
        "architecture": str | None,
        "prior": bool,
        "history": Mapping[str, Any],
    }
    fields = {n: from_plain(kind, spec.get(n), f"{path}: {n}") for n, kind in kinds.items()}
    _check_class_names(fields["class_names"], config, str(path))
    params = load_params(directory / PARAMS_FILE, spec.get("params_sha256"))
    check_params(param_shapes(config), params, str(directory))
    return Model(config, jax.tree.map(jax.numpy.asarray, params), **fields)


def _check_class_names(class_names: tuple[str, ...], config: Config, name: str) -> None:
    if class_names and len(class_names) != config.num_classes:
        raise InputError(
            f"{name}: {len(class_names)} class names, expected {config.num_classes} or none"
        )


def kind_of(directory: Path) -> str | None:
    """What a directory is, in words: a model, an extractor, or `FOREIGN`; None if none of these."""
    return next((kind for name, kind in _KINDS.items() if (directory / name).is_file()), None)


def spec_file(directory: Path, name: str, expected: str) -> Path:
    """The path of a directory's spec file.

    Raises:
      InputError: it has none; says what the directory is instead.
    """
    path = directory / name
    if path.is_file():
        return path
    found = "a file" if directory.is_file() else kind_of(directory)
    if found is None:
        raise InputError(f"{path}: no such file, expected {expected}'s directory")
    raise InputError(f"{directory}: is {found}, expected {expected}'s directory")


def read_spec(path: Path, expected_format: str, expected_version: int) -> dict[str, Any]:
    """Read a spec file and check what it says it is.

    Raises:
      InputError: not a spec of this format and version.
    """
    try:
        spec = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; expected a {expected_format} file") from error
    if not isinstance(spec, dict) or spec.get("format") != expected_format:
        raise InputError(f"{path}: is not a {expected_format} file")
    if spec.get("version") != expected_version:
        raise InputError(
            f"{path}: has version {spec.get('version')!r}, expected {expected_version}"
        )
    return spec


def save_params(params: Params, path: Path) -> None:
    """Write a parameter tree as .safetensors with slash-joined names."""
    arrays = {"/".join(p): np.ascontiguousarray(leaf) for p, leaf in flatten(params).items()}
    safetensors.numpy.save_file(arrays, path)


def load_params(path: Path, sha256: Any) -> Params:
    """Read a parameter tree that `save_params` wrote, if its checksum is the one in its spec.

    Raises:
      InputError: missing, damaged, or with another checksum.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if file_hash(path) != sha256:
        raise InputError(f"{path}: checksum differs from its spec: truncated or altered")
    arrays = read_safetensors(path)
    for name in arrays:
        if name.count("/") >= _DEEPEST:
            # JAX walks trees by recursion.
            raise InputError(f"{path}: holds {name[:60]!r} ..., expected at most {_DEEPEST} parts")
    try:
        return unflatten({tuple(name.split("/")): array for name, array in arrays.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
