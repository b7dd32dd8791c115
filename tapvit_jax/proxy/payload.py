"""The format of the only thing that a device uploads: its Gaussian mixture.

The payload, version 1, is one safetensors file (no code can hide in it, nothing is unpickled):

- tensors `weights` (g,), `means` (g, d) and `covariances` (diag (g, d); spherical (g,);
  tied (d, d); full (g, d, d)), all little-endian float32;
- one metadata key, `tapvit_gmm`, holding a JSON object with exactly these fields: `version` (1),
  `covariance_type`, `components` (g), `dim` (d), `extractor` (fingerprint of the feature extractor,
  lower-case hex, or empty when unknown) and `sha256` (hex, over the bytes of weights, means and
  covariances in this order).

There is a single metadata key because safetensors writes several in an order of its own, and the
same mixture must give the same bytes. The checksum finds damage, not forgery: a payload comes from
an untrusted device, so everything in it is checked again on loading.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
import safetensors.numpy

from tapvit_jax.errors import InputError

CovarianceType = Literal["diag", "tied", "spherical", "full"]

PAYLOAD_VERSION = 1
MAX_PAYLOAD_BYTES = 16 * 2**20
TENSORS = ("weights", "means", "covariances")

_METADATA_KEY = "tapvit_gmm"
_METADATA_LIMIT = 4096
_FIELDS = ("version", "covariance_type", "components", "dim", "extractor", "sha256")
_EXTRACTOR = re.compile(r"[0-9a-f]{0,128}")


def payload_bytes(tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> bytes:
    """The payload of these tensors, with the header's fields but version and checksum.

    Raises:
      InputError: more than `MAX_PAYLOAD_BYTES`.
    """
    header = {"version": PAYLOAD_VERSION, **fields, "sha256": _checksum(tensors)}
    text = json.dumps(header, separators=(",", ":"))
    data = safetensors.numpy.save(dict(tensors), metadata={_METADATA_KEY: text})
    if len(data) > MAX_PAYLOAD_BYTES:
        raise InputError(
            f"gmm: its payload has {len(data)} bytes, expected at most {MAX_PAYLOAD_BYTES}: "
            "fewer components or dimensions, or diag instead of full or tied"
        )
    return data


def read_payload(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and tensors of a payload, of the right format and undamaged; what they say is unknown.

    Raises:
      InputError: missing, too large, not a payload, of another version, or damaged.
    """
    name, data = str(path), _read(path)
    try:
        entries = dict(safetensors.deserialize(data))
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: {_not_a_payload(data)}") from error
    header = _parse_header(name, metadata)
    tensors = _parse_tensors(name, entries)
    found = _checksum(tensors)
    if header["sha256"] != found:
        raise InputError(
            f"{name}: damaged: the tensors' SHA-256 is {found}, expected {_shown(header['sha256'])}"
        )
    return header, tensors


def check_covariance_type(name: str, value: Any) -> None:
    """Refuse what is no covariance type, under the name `name`."""
    kinds = get_args(CovarianceType)
    if value not in kinds:
        raise InputError(f"{name} is {_shown(value)}, expected one of {', '.join(kinds)}")


def check_extractor(name: str, value: Any) -> None:
    """Refuse what is no fingerprint of an extractor."""
    if not isinstance(value, str) or not _EXTRACTOR.fullmatch(value):
        raise InputError(
            f"{name}: extractor is {_shown(value)}, expected a fingerprint of at most 128 "
            "lower-case hex digits"
        )


def _shown(value: Any) -> str:
    # What an untrusted file says may be long, or hold control characters for the terminal.
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(np.ascontiguousarray(tensors[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a GMM payload")
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells a file that is too large without reading it whole.
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_PAYLOAD_BYTES else file.read(MAX_PAYLOAD_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    size = max(size, len(data))
    if size > MAX_PAYLOAD_BYTES:
        raise InputError(f"{path}: {size} bytes, expected at most {MAX_PAYLOAD_BYTES}")
    return data


def _not_a_payload(data: bytes) -> str:
    # Asked only once safetensors has refused the bytes: a sound header of 640 bytes also begins
    # with 0x80 0x02, as a pickle does.
    refused = "refused, and never executed; expected a GMM payload (safetensors)"
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return f"is a zip archive (as .npz and .pt files are), {refused}"
    if data[:6] == b"\x93NUMPY":
        return f"is a .npy file, {refused}"
    binary = data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if binary or (data[:1] in (b"(", b"c", b"]", b"}") and data[-1:] == b"."):
        return f"looks like a pickle, {refused}"
    return (
        f"truncated or not a GMM payload ({len(data)} bytes that are not sound safetensors), "
        f"expected version {PAYLOAD_VERSION} of it"
    )


def _parse_header(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(_METADATA_KEY)
    if text is None:
        raise InputError(
            f"{name}: a safetensors file without the metadata key {_METADATA_KEY!r}, "
            "expected a GMM payload"
        )
    if len(text) > _METADATA_LIMIT:
        raise InputError(
            f"{name}: its header has {len(text)} characters, expected at most {_METADATA_LIMIT}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: its header is not valid JSON, expected an object") from error
    if not isinstance(header, dict):
        raise InputError(f"{name}: its header is a {type(header).__name__}, expected an object")
    version = header.get("version")
    if type(version) is not int or version != PAYLOAD_VERSION:
        raise InputError(f"{name}: payload version {_shown(version)}, expected {PAYLOAD_VERSION}")
    if sorted(header) != sorted(_FIELDS):
        raise InputError(
            f"{name}: its header has the fields {_shown(sorted(header))}, expected "
            f"{', '.join(sorted(_FIELDS))}"
        )
    check_covariance_type(f"{name}: covariance type", header["covariance_type"])
    for field in ("components", "dim"):
        if type(header[field]) is not int:
            raise InputError(
                f"{name}: its header's {field} is {_shown(header[field])}, expected a whole number"
            )
    check_extractor(name, header["extractor"])
    return header


def _parse_tensors(name: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    if sorted(entries) != sorted(TENSORS):
        raise InputError(
            f"{name}: holds the tensors {_shown(sorted(entries))}, expected {', '.join(TENSORS)}"
        )
    tensors = {}
    for tensor in TENSORS:
        entry = entries[tensor]
        if entry["dtype"] != "F32":
            raise InputError(f"{name}: {tensor} have type {entry['dtype']}, expected F32")
        flat = np.frombuffer(entry["data"], dtype="<f4")
        tensors[tensor] = flat.reshape(entry["shape"])
    return tensors
