"""Checkpoints from files and from the hub: what is read, and what is refused without being run."""

import argparse
import collections
import importlib
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax.convert.weights import read_weights
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ANCHOR = "patch_embed.proj.weight"
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "model_args": {"img_size": 8},
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]},
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def write_safetensors(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, path)
    return path


def refusal(weights, **options):
    """The message of the refusal, which is one line and names the weights."""
    with pytest.raises(InputError) as caught:
        read_weights(weights, **options)
    message = str(caught.value)
    assert message.startswith(f"{weights}: ")
    assert "\n" not in message
    return message


class Shell:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


# Files.


def test_safetensors_keep_their_types(tmp_path):
    types = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64)
    state = {np.dtype(t).name: np.arange(6).reshape(2, 3).astype(t) for t in types}
    path = write_safetensors(tmp_path / "a.safetensors", state)
    for given in (path, str(path)):
        found = read_weights(given)
        assert found.name == str(path)
        assert found.source == {"file": "a.safetensors", "sha256": file_hash(path)}
        assert found.config is None
        assert found.state.keys() == state.keys()
        for name, array in state.items():
            assert found.state[name].dtype == array.dtype
            np.testing.assert_array_equal(found.state[name], array)


def test_safetensors_need_no_torch(tmp_path, no_torch):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)})
    assert read_weights(path).state.keys() == {"a"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.a", "module.module.b"], ["a", "module.b"]),
        (["module.a", "b"], ["a", "b"]),
        (["module_a", "a.module.b"], ["module_a", "a.module.b"]),
        (["_orig_mod.module.a", "module._orig_mod.b", "_orig_mod.c"], ["a", "b", "c"]),
        (["model.head.bias", f"model.{ANCHOR}"], ["head.bias", ANCHOR]),
        (["module.net.model.cls", f"module.net.model.{ANCHOR}"], ["cls", ANCHOR]),
        (
            ["_orig_mod.model.a", f"model._orig_mod.{ANCHOR}"],
            ["model.a", f"model._orig_mod.{ANCHOR}"],
        ),
        (["loss.weight", f"model.{ANCHOR}"], ["loss.weight", f"model.{ANCHOR}"]),
        (["model.a", "model.b"], ["model.a", "model.b"]),
    ],
)
def test_what_training_puts_before_the_names_is_cut_off(tmp_path, names, expected):
    state = {name: np.float32([i]) for i, name in enumerate(names)}
    found = read_weights(write_safetensors(tmp_path / "a.safetensors", state)).state
    assert {name: array[0] for name, array in found.items()} == {
        name: i for i, name in enumerate(expected)
    }


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path):
    state = {name: np.ones(1, np.float32) for name in ("module.a", "a")}
    path = write_safetensors(tmp_path / "a.safetensors", state)
    assert "both with and without _orig_mod. or module." in refusal(path)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (TIMM, TIMM),
        (
            {"architecture": "a", "num_classes": 5, "mean": [0]},
            {
                "architecture": "a",
                "num_classes": 5,
                "mean": [0],
                "pretrained_cfg": {"architecture": "a", "num_classes": 5, "mean": [0]},
            },
        ),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, None),
        ({"architecture": {"depth": 3}}, None),
        ([1], None),
    ],
    ids=["timm", "early timm", "transformers", "other", "list"],
)
def test_the_config_beside_a_file(tmp_path, record, expected):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(2)})
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_weights(path).config == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architecture": ', "is not valid JSON"),
        ('{"architecture": "a", "pretrained_cfg": 3}', "pretrained_cfg is 3, expected an object"),
        ('{"architecture": "a", "model_args": [1]}', r"model_args is \[1\], expected an object"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, text, message):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(2)})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_weights(path)


def test_what_is_no_checkpoint_is_refused(tmp_path, no_torch):
    (tmp_path / "folder.pth").mkdir()
    for name in ("folder.pth", "missing.pt", "", "nul\0.bin"):
        assert "no such file, expected a .safetensors, .pth" in refusal(tmp_path / name)
    (tmp_path / "a.npz").touch()
    assert "ends in '.npz', expected a .safetensors, .pth" in refusal(tmp_path / "a.npz")
    assert "cannot be read: File name too long" in refusal(tmp_path / f"{'a' * 999}.pth")
    for suffix in ("safetensors", "pth", "pt", "bin"):
        path = tmp_path / f"pointer.{suffix}"
        path.write_text(LFS)
        assert "is a git-lfs pointer" in refusal(path)
    path = write_safetensors(tmp_path / "none.safetensors", {})
    assert refusal(path).endswith("holds no tensors")
    assert "expected none beside a local path" in refusal(path, filename="a.bin")


# Files of torch.


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
def test_without_torch_both_ways_out_are_named_and_nothing_is_run(tmp_path, no_torch, name):
    path, marker = tmp_path / name, tmp_path / "executed"
    path.write_bytes(pickle.dumps(Shell(marker), 2))
    message = refusal(path)
    assert "torch, which reads it, is not installed" in message
    assert "pip install -U torch" in message
    assert "convert the file to .safetensors" in message
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_malicious_pickles_are_refused_and_not_run(tmp_path, torch, zipped):
    path, marker = tmp_path / "a.pth", tmp_path / "executed"
    state = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(a=Shell(marker))}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "refers to Python's posix.system, which was not run" in refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickles_of_another_writer_are_not_run_either(tmp_path, torch, protocol):
    path, marker = tmp_path / "a.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Shell(marker), protocol))
    refusal(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_a_torch_whose_safe_reader_is_unsafe_is_refused(tmp_path, torch, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    assert "torch is 2.9.1+cpu, expected 2.10 or newer" in refusal(path)


# What stands beside the state dicts of DeiT, MAE and Swin.
BESIDE = {"optimizer": {"state": [1]}, "epoch": 3, "args": argparse.Namespace(lr=0.1, output="a")}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("wrap", "entry", "said"),
    [
        (lambda good, other: good, None, ""),
        (lambda good, other: {"model": good} | BESIDE, "model", ""),
        (
            lambda good, other: {"state_dict": good, "model": other, "state_dict_ema": None},
            "state_dict",
            "holds state_dict, model; taking state_dict",
        ),
        (
            lambda good, other: {"model": other, "state_dict": other, "model_ema": good} | BESIDE,
            "model_ema",
            "holds model_ema, state_dict, model; taking model_ema",
        ),
        (
            lambda good, other: {"state_dict": other, "state_dict_ema": good} | BESIDE,
            "state_dict_ema",
            "holds state_dict_ema, state_dict; taking state_dict_ema",
        ),
        (
            lambda good, other: collections.OrderedDict(
                {f"module.{k}": v for k, v in good.items()}
            ),
            None,
            "",
        ),
    ],
    ids=["plain", "model", "state_dict", "model_ema", "timm's ema", "module"],
)
def test_state_dicts_of_torch(tmp_path, torch, caplog, wrap, entry, said, zipped):
    path = tmp_path / "a.pth"
    good = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(2))}
    torch.save(wrap(good, {"a": torch.zeros(1)}), path, _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    recorded = {} if entry is None else {"entry": entry}
    assert found.source == {"file": "a.pth", "sha256": file_hash(path)} | recorded
    assert caplog.messages == ([f"{path}: {said}"] if said else [])
    assert found.state.keys() == good.keys()
    assert all(type(array) is np.ndarray for array in found.state.values())
    np.testing.assert_array_equal(found.state["a"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found.state["b"], [1, 1])
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", ["last.ckpt", "model_best.pth.tar"])
def test_names_that_training_gives_its_files(tmp_path, torch, name):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / name)
    np.testing.assert_array_equal(read_weights(tmp_path / name).state["a"], [1, 1])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / name, name)
    assert "truncated or not torch.save's usual format" in refusal(tmp_path / "a.tar")


def test_a_newer_pickle_protocol_is_read_without_a_warning(tmp_path, torch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", pickle_protocol=3)
    np.testing.assert_array_equal(read_weights(tmp_path / "a.pth").state["a"], [1, 1])


def test_types_of_torch(tmp_path, torch):
    path = tmp_path / "a.pth"
    names = ("bfloat16", "float16", "float32", "float64", "int64", "bool")
    torch.save({name: torch.tensor([1.0, 0.0], dtype=getattr(torch, name)) for name in names}, path)
    state = read_weights(path).state
    wider = {"bfloat16": "float32", "float16": "float32"}
    assert {name: state[name].dtype.name for name in names} == {n: wider.get(n, n) for n in names}
    for array in state.values():
        np.testing.assert_array_equal(array, [1, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: [torch.ones(2)], "holds a list, expected a dict of tensors"),
        (lambda torch: torch.ones(2), "holds a Tensor, expected a dict of tensors"),
        (lambda torch: {"net": {"a": torch.ones(2)}}, "its entry 'net' is a dict, expected"),
        (lambda torch: {"a": torch.ones(2), "epoch": 3}, "its entry 'epoch' is a int, expected"),
        (lambda torch: {3: torch.ones(2)}, "its entry 3 is a Tensor, expected"),
        (lambda torch: {"model": {}}, "holds no tensors"),
        (lambda torch: torch.nn.Linear(1, 1), "refers to Python's torch.nn.modules.linear.Linear"),
        (lambda torch: {"model": {}, "args": Path()}, "refers to Python's pathlib.PosixPath"),
        (lambda torch: {"a": torch.eye(2).to_sparse()}, "a is torch.float32, torch.sparse_coo"),
        (lambda torch: {"a": torch.ones(1).expand(10**12)}, "take 4000000000000 bytes, but it has"),
    ],
)
def test_other_contents_of_torch_are_refused(tmp_path, torch, make, message):
    path = tmp_path / "a.pth"
    torch.save(make(torch), path)
    assert message in refusal(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_of_torch_is_refused(tmp_path, torch, zipped):
    path = tmp_path / "a.pth"
    state = {f"layer{i}": torch.ones(2, 3) for i in range(3)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 17), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refusal(path)
        # The older format may be cut in the middle of a name, which makes another name.
        renamed = not zipped and "which was not run" in message
        assert "truncated or not torch.save's usual format" in message or renamed


@pytest.mark.parametrize("content", [b"some text\n", b"<!doctype html>", bytes(99), b"PK\3\4 no"])
def test_what_torch_did_not_write_is_refused(tmp_path, torch, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert "truncated or not torch.save's usual format" in refusal(path)


def test_archives_that_torch_should_not_open_are_refused(tmp_path, torch):
    path = tmp_path / "a.pt"
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    (tmp_path / "a.npz").rename(path)
    assert "truncated or not torch.save's usual format" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", b"")
    assert "is a TorchScript archive" in refusal(path)
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(10**6))
    assert "unpacks to 100" in refusal(path)


# The hub.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The library, with a cache of its own and no connection."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return importlib.import_module("huggingface_hub")


@pytest.fixture
def snapshot(tmp_path):
    """The folder of a commit in the cache, to which the branch main points."""
    repo = tmp_path / "cache" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def absent(snapshot, *names):
    """Let the cache remember that the repository has no such files."""
    folder = snapshot.parent.parent / ".no_exist" / snapshot.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize("weights", ["hf-hub:some/model", f"hf-hub:some/model@{COMMIT}"])
def test_a_cached_model_is_read_without_a_connection(hub, snapshot, weights):
    path = write_safetensors(snapshot / "model.safetensors", {"a": np.ones(2)})
    (snapshot / "config.json").write_text(json.dumps(TIMM))
    found = read_weights(weights)
    assert (found.name, found.config) == (weights, TIMM)
    np.testing.assert_array_equal(found.state["a"], [1, 1])
    assert found.source == {
        "file": "model.safetensors",
        "sha256": file_hash(path),
        "hub": "some/model",
        "revision": COMMIT,
    }


def test_a_repository_without_safetensors_and_config(hub, snapshot, torch):
    absent(snapshot, "model.safetensors", "config.json")
    torch.save({"a": torch.ones(2)}, snapshot / "pytorch_model.bin")
    found = read_weights("hf-hub:some/model")
    assert (found.source["file"], found.config) == ("pytorch_model.bin", None)
    np.testing.assert_array_equal(found.state["a"], [1, 1])


def test_another_file_of_a_repository(hub, snapshot):
    absent(snapshot, "config.json")
    write_safetensors(snapshot / "model.safetensors", {"a": np.ones(2)})
    write_safetensors(snapshot / "sub" / "b.safetensors", {"b": np.ones(2)})
    found = read_weights("hf-hub:some/model", filename="sub/b.safetensors")
    assert found.state.keys() == {"b"}
    assert (found.source["file"], found.source["revision"]) == ("b.safetensors", COMMIT)


@pytest.mark.parametrize("cached", [(), ("config.json",), ("model.safetensors",)])
def test_what_is_not_in_the_cache_is_not_guessed(hub, snapshot, cached):
    # A missing config may exist: without it the images would be prepared wrongly.
    if "config.json" in cached:
        (snapshot / "config.json").write_text(json.dumps(TIMM))
    if "model.safetensors" in cached:
        write_safetensors(snapshot / "model.safetensors", {"a": np.ones(2)})
    message = refusal("hf-hub:some/model")
    assert "the hub does not answer (OfflineModeIsEnabled) and the cache does not hold" in message
    wanted = "model.safetensors" if cached == ("config.json",) else "config.json"
    assert f"(wanted {wanted})" in message
    assert "give the weights' path, or set HF_HOME" in message


def test_a_repository_without_weights_is_refused(hub, snapshot):
    absent(snapshot, "config.json", "model.safetensors", "pytorch_model.bin", "c.pth")
    message = refusal("hf-hub:some/model")
    assert "has no model.safetensors and no pytorch_model.bin" in message
    assert "has no c.pth" in refusal("hf-hub:some/model", filename="c.pth")


def test_downloads(hub, tmp_path, monkeypatch):
    asked = []

    def download(repo, file, *, revision):
        asked.append((repo, file, revision))
        if file != "pytorch_model.bin":
            raise error_of(hub.errors.RemoteEntryNotFoundError)
        path = tmp_path / file
        path.write_text(LFS)
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: is a git-lfs pointer"):
        read_weights("hf-hub:some/model@refs/pr/1")
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    assert asked == [("some/model", name, "refs/pr/1") for name in names]


def error_of(kind):
    # Without a response, which the constructors of some ask for.
    return kind.__new__(kind, "several\nlines")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated: ask for access"),
        ("RepositoryNotFoundError", "is not on the hub, or is private"),
        ("RevisionNotFoundError", "has no revision 'v1'"),
        ("LocalEntryNotFoundError", "the hub does not answer (LocalEntryNotFoundError)"),
        ("HfHubHTTPError", "cannot be downloaded (HfHubHTTPError)"),
        ("OfflineModeIsEnabled", "cannot be downloaded (OfflineModeIsEnabled)"),
        (TimeoutError, "cannot be downloaded (TimeoutError)"),
        (RuntimeError, "cannot be downloaded (RuntimeError)"),
    ],
)
@pytest.mark.parametrize("failing", ["config.json", "model.safetensors"])
def test_failed_downloads_are_refused(hub, tmp_path, monkeypatch, kind, message, failing):
    kind = getattr(hub.errors, kind) if isinstance(kind, str) else kind
    (tmp_path / "config.json").write_text(json.dumps(TIMM))

    def download(repo, file, *, revision):
        if file == failing:
            raise error_of(kind)
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    found = refusal("hf-hub:some/model@v1")
    assert message in found
    assert f"(wanted {failing})" in found


@pytest.mark.parametrize("rest", ["", "model", "a/b/c", "a/b@", "a b/c", "../b@a b"])
def test_what_is_no_hub_id_is_refused(rest):
    assert "expected hf-hub:owner/name or" in refusal(f"hf-hub:{rest}")


def test_ids_that_only_the_hub_refuses(hub):
    assert "cannot be downloaded (HFValidationError)" in refusal("hf-hub:-a/..b")


def test_without_the_hubs_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal("hf-hub:some/model")
    assert "huggingface_hub is not installed" in message
    assert "give its path" in message
