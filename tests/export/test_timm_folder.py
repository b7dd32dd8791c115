"""The folder for timm: what timm's loader looks for (tests/peers loads it with timm itself)."""

import json

import jax
import numpy as np
import pytest

from tapvit_jax.convert.timm import load_timm
from tapvit_jax.errors import InputError
from tapvit_jax.export.timm import export_timm
from tests.convert.test_parity import CASES, images, make_model


@pytest.mark.parametrize("case", CASES)
def test_our_own_loader_reads_it_back(tmp_path, case):
    model, _ = make_model(case)
    model = model.replace(class_names=tuple("abcde"))
    export_timm(model, tmp_path / "folder")
    record = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert record["architecture"] == CASES[case][0]
    assert record["label_names"] == list("abcde")
    again = load_timm(CASES[case][0], tmp_path / "folder" / "model.safetensors")
    assert again.config == model.config
    assert again.preprocess == model.preprocess
    batch = images(model.config.image_size)
    np.testing.assert_array_equal(again.apply(batch), model.apply(batch))


def test_preprocessing_is_needed(tmp_path):
    model, _ = make_model("vit")
    with pytest.raises(InputError, match="how its images are prepared"):
        export_timm(model.replace(preprocess=None), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_named(tmp_path):
    model, _ = make_model("vit")
    export_timm(model, tmp_path / "folder")
    with pytest.raises(InputError, match="says 'vit_tiny_patch16_224', expected 'deit_small"):
        load_timm("deit_small_patch16_224", tmp_path / "folder" / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (5, "label_names is 5, expected a list"),
        ("abcde", "label_names is 'abcde', expected a list"),
        (["a", None, "c", "d", "e"], r"label_names\[1\] is None, expected str"),
    ],
)
def test_class_names_that_are_no_text_are_refused(tmp_path, names, message):
    model, _ = make_model("vit")
    export_timm(model, tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"label_names": names}))
    with pytest.raises(InputError, match=rf"model\.safetensors: {message}"):
        load_timm(CASES["vit"][0], tmp_path / "folder" / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({str(i): f"n{i}" for i in range(5)}, ("n0", "n1", "n2", "n3", "n4")),
        ({"0": "cat", "7": "dog"}, ()),
        ([10, 11, 12, 13, 14], ("10", "11", "12", "13", "14")),
        (["too", "few"], ()),
        ([], ()),
    ],
)
def test_class_names_as_timm_may_write_them(tmp_path, names, expected):
    model, _ = make_model("vit")
    export_timm(model, tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"label_names": names}))
    found = load_timm(CASES["vit"][0], tmp_path / "folder" / "model.safetensors")
    assert found.class_names == expected


def test_an_unknown_architecture_is_refused_and_the_history_names_none(tmp_path):
    model, _ = make_model("vit")
    with pytest.raises(InputError, match="unknown model 'vit_big', expected one of"):
        export_timm(model.replace(architecture="vit_big"), tmp_path / "folder")
    export_timm(model.replace(history={"architecture": "vit_big"}), tmp_path / "folder")


def test_logits_are_compared_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    model, _ = make_model("vit")
    batch = images(model.config.image_size)
    export_timm(model, tmp_path / "folder", images=batch)
    assert (tmp_path / "folder" / "config.json").is_file()
    other = model.replace(params=jax.tree.map(lambda leaf: leaf + 0.1, model.params))
    monkeypatch.setattr("tapvit_jax.export.timm.load_timm", lambda *_: other)
    with pytest.raises(InputError, match="not written: its logits differ"):
        export_timm(model, tmp_path / "second", images=batch)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
