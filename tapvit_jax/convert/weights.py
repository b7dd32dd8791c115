"""Weights from a local file or from the Hugging Face hub, as NumPy arrays; nothing in them is run.

torch and huggingface_hub are imported only where they are needed.
"""

import argparse
import dataclasses
import logging
import re
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tapvit_jax.convert.identify import backbone_prefix
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash, read_json, read_safetensors

log = logging.getLogger(__name__)

_HUB = "hf-hub:"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# ".tar": timm writes model_best.pth.tar, which is no archive of that kind.
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_KINDS = (
    "a .safetensors, .pth, .pt, .bin, .ckpt or .pth.tar file, or a hub id such as hf-hub:owner/name"
)
# Where DeiT, MAE, Swin and timm's own training put the state dict, in timm's order: the averaged
# weights, which are what was evaluated, first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# torch.compile and training on several devices, around each other in either order.
_WRAPPED = re.compile(r"^(_orig_mod\.)?(module\.)?(_orig_mod\.)?")
_LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint and where they come from.

    Attributes:
      state: tensors by name, of whatever type the file has; torch's half types are float32.
      source: file name, sha256, and where there are any, hub id and revision and the entry of the
        file that holds the tensors; ready for JSON.
      name: the path or hub id, for messages.
      config: timm's record of the model (architecture, num_classes, model_args, pretrained_cfg) if
        a config.json lies beside the file.
    """

    state: dict[str, np.ndarray]
    source: dict[str, str]
    name: str
    config: dict[str, Any] | None


def read_weights(weights: str | Path, *, filename: str | None = None) -> Weights:
    """Read a checkpoint; a file of torch is never allowed to run code.

    Of the state dicts that training leaves in one file, the first of state_dict_ema, model_ema,
    state_dict and model is read, as timm does; where there are several, that is said.

    Args:
      weights: a local .safetensors, .pth, .pt, .bin, .ckpt or .pth.tar, or a hub id:
        hf-hub:owner/name, with @revision if wanted.
      filename: the file of the hub's repository if it is neither model.safetensors nor
        pytorch_model.bin.

    Raises:
      InputError: no such file or repository, no access to it, or no whole file of tensors.
    """
    name = str(weights)
    if name.startswith(_HUB):
        path, config, source = _download(name, filename)
    elif filename is not None:
        raise InputError(f"{name}: filename is {filename!r}, expected none beside a local path")
    else:
        path, source = Path(weights), {}
        config = path.parent / "config.json"
    state, entry = _read(path)
    source = {"file": path.name, "sha256": file_hash(path)} | entry | source
    return Weights(state, source, name, _timm_config(config))


def fingerprint(weights: str | Path) -> str:
    """What identifies a checkpoint: a file's SHA-256, or the hub id, which nothing is fetched for.

    Raises:
      InputError: no such file.
    """
    if str(weights).startswith(_HUB):
        return str(weights)
    if not Path(weights).is_file():
        raise InputError(f"{weights}: no such file, expected {_KINDS}")
    return file_hash(weights)


def _timm_config(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    record = read_json(path)
    if not (isinstance(record, dict) and isinstance(record.get("architecture"), str)):
        return None  # Another library's.
    # Early files of timm are flat.
    record = {"pretrained_cfg": record} | record
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(record.get(key, {}), dict | None):
            raise InputError(f"{path}: {key} is {record[key]!r:.80}, expected an object")
    return record


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, and what to record of their place in the file."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected {_KINDS}")
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise InputError(f"{path}: ends in {suffix!r}, expected {_KINDS}")
    if start == _LFS_POINTER:
        raise InputError(f"{path}: is a git-lfs pointer, expected the weights: run 'git lfs pull'")
    entry: dict[str, str] = {}
    if suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        state, entry = _read_torch(path, start)
    if not state:
        raise InputError(f"{path}: holds no tensors")
    return _unprefixed(path, state), entry


def _unprefixed(path: Path, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what training puts before the names: wrappers key by key, as timm does, and what all
    have in common before a backbone's names, such as Lightning's "model."."""
    cleaned = {_WRAPPED.sub("", key): value for key, value in state.items()}
    if len(cleaned) < len(state):
        raise InputError(f"{path}: holds tensors both with and without _orig_mod. or module.")
    prefix = backbone_prefix(cleaned)
    if not all(key.startswith(prefix) for key in cleaned):
        return cleaned
    return {key.removeprefix(prefix): value for key, value in cleaned.items()}


def _read_torch(path: Path, start: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    torch = _import_torch(path)
    try:
        if start.startswith(b"PK\3\4"):
            _check_archive(path)
        # The command line's arguments lie beside many state dicts; a Namespace is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # Of other pickle protocols.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        # On a damaged file the unpickler raises whatever its next instruction runs into.
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refers to Python's {named[1]}, which was not run, expected tensors and "
                "plain data; if you trust the file, convert it to .safetensors elsewhere"
            ) from error
        kind = type(error).__name__
        raise InputError(f"{path}: truncated or not torch.save's usual format ({kind})") from error
    tensors, entry = _unwrap(path, torch, loaded)
    return _to_numpy(path, torch, tensors), entry


def _import_torch(path: Path) -> ModuleType:
    ways = "run 'pip install -U torch', or convert the file to .safetensors elsewhere"
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: torch, which reads it, is not installed: {ways}") from error
    # CVE-2025-32434 and CVE-2026-24747: in older ones weights_only can be made to run code.
    if torch.__version__ < (2, 10):
        raise InputError(f"{path}: torch is {torch.__version__}, expected 2.10 or newer: {ways}")
    return torch


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{path}: is a TorchScript archive, expected a state dict")
    # torch.save never compresses, so that more can only be a bomb.
    size, unpacked = path.stat().st_size, sum(member.file_size for member in members)
    if unpacked > size:
        raise InputError(f"{path}: unpacks to {unpacked} bytes, expected at most its own {size}")


def _unwrap(path: Path, torch: ModuleType, loaded: Any) -> tuple[dict[str, Any], dict[str, str]]:
    expected = f"expected a dict of tensors, plain or under one of {', '.join(_WRAPPERS)}"
    entry = {}
    if isinstance(loaded, dict):
        inside = [key for key in _WRAPPERS if isinstance(loaded.get(key), dict)]
        if len(inside) > 1:
            log.warning("%s: holds %s; taking %s", path, ", ".join(inside), inside[0])
        if inside:
            entry, loaded = {"entry": inside[0]}, loaded[inside[0]]
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, {expected}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise InputError(f"{path}: its entry {key!r:.80} is a {kind}, {expected}")
    return loaded, entry


def _to_numpy(path: Path, torch: ModuleType, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    # One stored number can pose as any number of them. Twice, since tensors may be shared.
    size = path.stat().st_size
    unpacked = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if unpacked > 2 * size:
        raise InputError(f"{path}: its tensors take {unpacked} bytes, but it has only {size}")
    state = {}
    for name, tensor in tensors.items():
        known = (torch.float32, torch.float64)
        wider = tensor.is_floating_point() and tensor.dtype not in known
        try:
            state[name] = (tensor.float() if wider else tensor).detach().numpy()
        except (RuntimeError, TypeError) as error:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise InputError(f"{path}: {name} is {kind}, which NumPy cannot hold") from error
    return state


def _download(weights: str, filename: str | None) -> tuple[Path, Path | None, dict[str, str]]:
    """The paths of a hub's weights and config.json, which need not exist, and what to record."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", weights.removeprefix(_HUB))
    if not found:
        raise InputError(f"{weights}: expected hf-hub:owner/name or hf-hub:owner/name@revision")
    repo, revision = found.groups()
    config = _fetch(weights, repo, revision, "config.json")
    files = _HUB_FILES if filename is None else (filename,)
    fetched = (_fetch(weights, repo, revision, file) for file in files)
    path = next((path for path in fetched if path is not None), None)
    if path is None:
        raise InputError(f"{weights}: has no {' and no '.join(files)}; expected another filename")
    # A branch moves on; the cache's folder bears the commit's hash.
    commit = re.search(r"/snapshots/([^/]+)/", path.as_posix())
    source = {"hub": repo, "revision": commit[1] if commit else revision or "main"}
    return path, config, source


def _fetch(weights: str, repo: str, revision: str | None, file: str) -> Path | None:
    """Download a file, or find it in the cache; None if the repository has no such file."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(
            f"{weights}: huggingface_hub is not installed: run 'pip install huggingface_hub', or "
            "download the file yourself and give its path"
        ) from error
    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except Exception as error:
        # Anything: the libraries below raise errors of their own when a connection fails midway.
        absent = isinstance(error, errors.EntryNotFoundError)
        reason = f"cannot be downloaded ({type(error).__name__})"
        if isinstance(error, errors.LocalEntryNotFoundError):
            # The cache also remembers which files a repository does not have.
            cached = hub.try_to_load_from_cache(repo, file, revision=revision)
            absent = cached is hub._CACHED_NO_EXIST
            cause = type(error.__cause__ or error).__name__
            reason = f"the hub does not answer ({cause}) and the cache does not hold it"
        elif isinstance(error, errors.GatedRepoError):
            reason = "is gated: ask for access on its page, then run 'hf auth login'"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "is not on the hub, or is private: run 'hf auth login'"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"has no revision {revision!r}"
        if absent:
            return None
        raise InputError(
            f"{weights}: {reason} (wanted {file}); without the hub, fetch the weights and "
            "config.json elsewhere and give the weights' path, or set HF_HOME to a cache with them"
        ) from error
