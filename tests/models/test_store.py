"""Models on disk: bit-identical round trips, and a message for everything that may be wrong."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash
from tapvit_jax.models import backbone, store
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.prune.units import unit_key
from tests.conftest import realistic

PREPROCESS = Preprocess(8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), crop_pct=0.9)


def pruned(model):
    """A really smaller model with absent branches and arrays without entries."""
    mask = np.arange(16).reshape(2, 8) % 3 == 0
    keep = {
        unit_key(0, "qk"): mask,
        unit_key(0, "mlp"): np.zeros(32, bool),
        unit_key(1, "attn_branch"): np.array(False),
        unit_key(1, "mlp"): np.arange(32) < 5,
        unit_key(2, "attn_branch"): np.array(False),
        unit_key(2, "mlp_branch"): np.array(False),
    }
    return reshape(model, Plan(model.config, keep))


def assert_models_equal(found, expected):
    for field in ("config", "preprocess", "class_names", "name", "architecture", "prior"):
        assert getattr(found, field) == getattr(expected, field)
    leaves = flatten(found.params)
    assert leaves.keys() == flatten(expected.params).keys()
    for path, leaf in flatten(expected.params).items():
        assert leaves[path].dtype == leaf.dtype
        np.testing.assert_array_equal(leaves[path], leaf, err_msg="/".join(path))


@pytest.mark.parametrize("kind", ["tiny", "distilled", "pruned", "pruned_distilled"])
def test_round_trip(tmp_path, tiny_model, distilled_model, kind):
    model = distilled_model if "distilled" in kind else tiny_model
    model = pruned(model) if "pruned" in kind else model
    history = {**model.history, "file": "a.safetensors", "nested": {"epochs": [1, 2.5, None]}}
    model = model.replace(
        preprocess=PREPROCESS,
        class_names=("ä", "b", "c", "d", "e"),
        architecture="vit_tiny_patch16_224",
        prior=True,
        history=history,
    )
    store.save(model, tmp_path / "new" / "model")
    found = store.load(tmp_path / "new" / "model")
    assert_models_equal(found, model)
    assert found.history == history
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_nothing_but_numbers_is_needed(tmp_path, tiny_model):
    store.save(tiny_model.replace(preprocess=None), tmp_path / "model")
    found = store.load(tmp_path / "model")
    assert_models_equal(found, tiny_model)
    assert (found.preprocess, found.class_names, found.history) == (None, (), {})


def test_a_fresh_process_needs_only_the_directory(tmp_path, tiny_model, images):
    model = pruned(tiny_model)
    store.save(model, tmp_path / "model")
    np.save(tmp_path / "images.npy", images)
    program = (
        "import numpy as np; from tapvit_jax.models import store; "
        "model = store.load('model'); "
        "np.save('logits.npy', model.apply(np.load('images.npy')))"
    )
    environment = {
        "PYTHONPATH": str(store.Path(backbone.__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model.apply(images), atol=1e-6)


@pytest.fixture(scope="module")
def small_model(tiny_config):
    config = dataclasses.replace(tiny_config, blocks=(BlockConfig(1, 2, 2, 3),))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    return Model(config, realistic(ones), PREPROCESS, class_names=tuple("abcde"), name="small")


@pytest.fixture
def directory(tmp_path, small_model):
    store.save(small_model, tmp_path / "model")
    return tmp_path / "model"


def change_spec(directory, **changes):
    path = directory / store.SPEC_FILE
    spec = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in spec.items() if value is not ...}))


def change_params(directory, change):
    """Change the arrays and the checksum with them, so that the checks behind it are reached."""
    path = directory / store.PARAMS_FILE
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    change_spec(directory, params_sha256=file_hash(path))


def refused(directory, message, file=""):
    with pytest.raises(InputError, match=message) as caught:
        store.load(directory)
    assert str(directory / file) in str(caught.value)


@pytest.mark.parametrize("file", [store.SPEC_FILE, store.PARAMS_FILE])
def test_a_missing_file(directory, file):
    (directory / file).unlink()
    refused(directory, "no such file", file)


def test_a_missing_directory(tmp_path):
    refused(tmp_path / "nothing", "no such file", store.SPEC_FILE)


def test_a_spec_that_is_no_text(directory):
    (directory / store.SPEC_FILE).write_bytes(b"\xb5\0")
    refused(directory, "is not valid JSON .*; expected a tapvit-model file", store.SPEC_FILE)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("extractor.json", "an extractor"),
        ("config.json", "a folder of timm or Hugging Face"),
    ],
)
def test_a_directory_of_another_kind(tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    refused(tmp_path, f": is {kind}, expected a model's directory")
    refused(tmp_path / file, ": is a file, expected a model's directory")


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_params(directory, length, rewritten):
    path = directory / store.PARAMS_FILE
    path.write_bytes(path.read_bytes()[:length])
    if rewritten:
        change_spec(directory, params_sha256=file_hash(path))
    refused(directory, "truncated or not a" if rewritten else "checksum", store.PARAMS_FILE)


def test_a_flipped_bit(directory):
    path = directory / store.PARAMS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(directory, "checksum differs", store.PARAMS_FILE)


def test_names_of_endless_parts_are_refused(directory):
    path = directory / store.PARAMS_FILE
    safetensors.numpy.save_file({"/".join("a" * 2000): np.zeros(1, np.float32)}, path)
    change_spec(directory, params_sha256=file_hash(path))
    refused(directory, "expected at most 16 parts", store.PARAMS_FILE)


@pytest.mark.parametrize("checksum", ["0" * 64, None, 5, ...])
def test_a_wrong_or_missing_checksum(directory, checksum):
    change_spec(directory, params_sha256=checksum)
    refused(directory, "checksum differs", store.PARAMS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("head/bias"), "missing head/bias"),
        (lambda a: a.update({"head/more": np.zeros(2)}), "unexpected head/more"),
        (lambda a: a.update({"head": np.zeros(2)}), "names head"),
        (lambda a: a.update({"head/bias/more": np.zeros(2)}), "names head/bias"),
        (
            lambda a: a.update({"head/bias": np.zeros(4, np.float32)}),
            r"head/bias has shape \(4,\), expected \(5,\)",
        ),
        (
            lambda a: a.update({"head/bias": np.zeros(5, np.float64)}),
            "head/bias has dtype float64, expected float32",
        ),
        (
            lambda a: a.update({"head/bias": np.zeros(5, ml_dtypes.bfloat16)}),
            "head/bias has dtype bfloat16, expected float32",
        ),
    ],
    ids=["missing", "extra", "leaf_as_node", "node_as_leaf", "shape", "float64", "bfloat16"],
)
def test_parameters_that_do_not_fit_the_config(directory, change, message):
    change_params(directory, change)
    refused(directory, message)


def test_all_wrong_parameters_are_named_at_once(directory):
    def change(arrays):
        arrays["head/more"] = arrays.pop("head/bias")
        arrays["pos_embed"] = arrays["pos_embed"][:, 1:]

    change_params(directory, change)
    refused(directory, "missing head/bias; pos_embed has shape .*; unexpected head/more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tapvit-extractor"}, "is not a tapvit-model file"),
        ({"format": ...}, "is not a tapvit-model file"),
        ({"version": 3}, "has version 3, expected 2"),
        ({"version": ...}, "has version None, expected 2"),
        ({"family": ...}, "family is None, expected one of 'vit', 'swin', 'resnet'"),
        ({"config": ...}, "config is None, expected a mapping"),
        ({"config": {"depth": 3}}, "unknown field .*config.depth"),
        ({"preprocess": {"image_size": 8}}, "missing field .*preprocess.mean"),
        ({"class_names": "abc"}, "class_names is 'abc', expected a list"),
        ({"class_names": ["a", 2]}, r"class_names\[1\] is 2, expected str"),
        ({"class_names": ["a", "b"]}, "2 class names, expected 5 or none"),
        ({"name": 3}, "name is 3, expected str"),
        ({"architecture": 3}, "architecture is 3, expected str"),
        ({"prior": ...}, "prior is None, expected bool"),
        ({"history": [1]}, r"history is \[1\], expected a mapping"),
    ],
)
def test_a_tampered_spec(directory, changes, message):
    change_spec(directory, **changes)
    refused(directory, message, store.SPEC_FILE)


def test_a_tampered_config(directory):
    spec = json.loads((directory / store.SPEC_FILE).read_text())
    for changes, message in (
        ({"dtype": "int8"}, "config.dtype is 'int8', expected one of 'float32', 'bfloat16'"),
        ({"in_channels": -1}, "in_channels is -1"),
        ({"num_classes": 7}, r"head/bias has shape \(5,\), expected \(7,\)"),
        ({"blocks": []}, "unexpected blocks_0/attn/k/bias"),
        ({"blocks": [{"num_heads": -1}]}, r"missing field .*config.blocks\[0\].qk_dim"),
    ):
        change_spec(directory, config=spec["config"] | changes, class_names=[])
        refused(directory, message)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff"])
def test_a_spec_that_is_no_spec(directory, text):
    (directory / store.SPEC_FILE).write_bytes(text.encode("latin-1"))
    refused(directory, "is not", store.SPEC_FILE)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path, directory):
    path, marker = directory / store.PARAMS_FILE, tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    refused(directory, "checksum differs", store.PARAMS_FILE)
    change_spec(directory, params_sha256=file_hash(path))
    refused(directory, r"not a \.safetensors file", store.PARAMS_FILE)
    assert not marker.exists()
    pickle.loads(path.read_bytes()).close()
    assert marker.exists()


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {}}, "does not match its config"),
        ({"history": {"score": object()}}, r"history\.score is <object .*, expected what JSON can"),
        ({"history": {"s": [1.0, np.nan]}}, r"history\.s\[1\] is nan, expected a finite number"),
        ({"class_names": ("a",)}, "1 class names"),
    ],
    ids=["params", "object", "nan", "class_names"],
)
def test_a_failed_save_changes_nothing(tmp_path, small_model, changes, message, existing):
    if existing:
        store.save(small_model, tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"small: {message}"):
        store.save(small_model.replace(**changes), tmp_path / "model")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == existing


def test_a_history_of_numpy_scalars_and_paths_becomes_plain(tmp_path, small_model):
    found = {"top1": np.float32(0.5), "seed": np.int64(3), "best": np.bool_(True)}
    model = small_model.replace(history={"source": Path("a", "b.bin"), "scores": [found]})
    store.save(model, tmp_path / "model")
    assert store.load(tmp_path / "model").history == {
        "source": str(Path("a", "b.bin")),
        "scores": [{"top1": 0.5, "seed": 3, "best": True}],
    }


def test_saving_replaces_what_stood_there(tmp_path, directory, small_model):
    other = small_model.replace(params=realistic(small_model.params, 9), name="other")
    store.save(other, directory)
    assert_models_equal(store.load(directory), other)
    assert {path.name for path in directory.iterdir()} == {store.SPEC_FILE, store.PARAMS_FILE}
    assert list(tmp_path.iterdir()) == [directory]


def test_saving_keeps_foreign_files(directory, small_model):
    (directory / "notes").write_text("mine")
    before = contents(directory)
    with pytest.raises(InputError, match="model: holds 'notes', which would be lost"):
        store.save(small_model.replace(name="other"), directory)
    assert contents(directory) == before


def test_a_file_in_the_way_is_refused(tmp_path, small_model):
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(InputError, match="model: is a file"):
        store.save(small_model, tmp_path / "model")
