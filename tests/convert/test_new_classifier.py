"""Checkpoints of other classes, or of none, as a start for training."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import tapvit_jax as tap
from tapvit_jax.convert.timm import from_timm, load_timm, save_timm, to_timm
from tapvit_jax.models import backbone
from tapvit_jax.models.params import flatten
from tapvit_jax.models.presets import create
from tests.conftest import realistic

SMALL = {
    "deit_tiny_patch16_224": {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2},
    "deit_tiny_distilled_patch16_224": {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 12,
        "depth": 2,
    },
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [3, 3],
        "window_size": 4,
    },
    "resnet18": {"img_size": 32},
}


def write(folder, name, *, classes=7, headless=False, record=None):
    """A checkpoint with parameters that are not zero; its config and parameters."""
    config, _ = create(name, **SMALL[name], num_classes=classes)
    params = realistic(backbone.init(config, jax.random.key(0)))
    save_timm(folder / "model.safetensors", config, params)
    if headless:
        state = {n: a for n, a in to_timm(config, params).items() if "head" not in n}
        safetensors.numpy.save_file(state, folder / "model.safetensors")
    if record is not None:
        record = {"architecture": name, "model_args": SMALL[name], **record}
        (folder / "config.json").write_text(json.dumps(record))
    return config, params


@pytest.mark.parametrize("name", SMALL)
def test_all_but_the_classifier_is_the_checkpoints(tmp_path, name):
    config, params = write(tmp_path, name)
    options = SMALL[name] | {"num_classes": 3, "new_classifier": True}
    found = load_timm(name, tmp_path / "model.safetensors", **options)
    assert found.config.num_classes == 3
    heads = {path for path in flatten(found.params) if path[0] in ("head", "head_dist", "fc")}
    assert len(heads) == (4 if "distilled" in name else 2)
    for path, leaf in flatten(found.params).items():
        expected = np.zeros(leaf.shape) if path in heads else flatten(params)[path]
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.shape[-1] == 3 or path not in heads
    side = config.image_size
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    np.testing.assert_array_equal(found.apply(images), np.zeros((2, 3)))
    np.testing.assert_array_equal(
        backbone.pooled(found.config, found.params, images),
        backbone.pooled(config, params, images),
    )


def test_a_checkpoint_without_a_classifier(tmp_path):
    name = "deit_tiny_patch16_224"
    config, params = write(tmp_path, name, headless=True, record={"num_classes": 0})
    with pytest.raises(tap.InputError, match=r"num_classes 0\); new_classifier=True \(--new-cl"):
        load_timm(name, tmp_path / "model.safetensors")
    found = load_timm(name, tmp_path / "model.safetensors", new_classifier=True, num_classes=7)
    assert found.config == config
    assert found.class_names == ()
    np.testing.assert_array_equal(found.params["pos_embed"], params["pos_embed"])
    # Without its config.json, the tensors tell.
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        tap.InputError, match=r"2 problems: missing head\.weight .*; new_classifier"
    ):
        load_timm(name, tmp_path / "model.safetensors", **SMALL[name], num_classes=7)


@pytest.mark.parametrize("at_top", [True, False])
def test_what_a_checkpoint_says_about_its_classes_is_not_the_new_ones(tmp_path, at_top):
    name = "deit_tiny_patch16_224"
    record = {"label_names": list("abcdefg")}
    record |= {"num_classes": 7} if at_top else {}
    record |= {} if at_top else {"model_args": SMALL[name] | {"num_classes": 7}}
    write(tmp_path, name, record=record)
    old = load_timm(name, tmp_path / "model.safetensors")
    assert old.class_names == tuple("abcdefg")
    new = load_timm(name, tmp_path / "model.safetensors", new_classifier=True, num_classes=7)
    assert new.config == old.config
    assert new.class_names == ()
    preset = load_timm(name, tmp_path / "model.safetensors", new_classifier=True)
    assert preset.config.num_classes == 1000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 3}, True),
        ({"num_classes": 3, "depth": 1}, False),
        ({"num_classes": 3, "embed_dim": 24}, False),
        ({"embed_dim": 24}, False),
    ],
)
def test_a_new_classifier_is_proposed_where_all_else_fits(tmp_path, changes, said):
    name = "deit_tiny_patch16_224"
    write(tmp_path, name)
    options = SMALL[name] | {"num_classes": 7} | changes
    with pytest.raises(tap.InputError) as caught:
        load_timm(name, tmp_path / "model.safetensors", **options)
    assert ("makes a new one, to be trained" in str(caught.value)) is said


def test_weights_that_are_not_finite_are_no_matter_of_the_classifier():
    config, _ = create("deit_tiny_patch16_224", **SMALL["deit_tiny_patch16_224"], num_classes=7)
    state = to_timm(config, realistic(backbone.init(config, jax.random.key(0))))
    state["blocks.0.mlp.fc1.bias"] = np.full_like(state["blocks.0.mlp.fc1.bias"], np.nan)
    with pytest.raises(tap.InputError, match=r"fc1\.bias .*holds NaN or infinity$"):
        from_timm(config, state)


def test_a_models_classifier_is_replaced(tiny_model, images):
    model = tiny_model.replace(class_names=tuple("abcde"), prior=True)
    found = tap.new_classifier(model, ["x", "y"])
    assert (found.config.num_classes, found.class_names, found.prior) == (2, ("x", "y"), False)
    np.testing.assert_array_equal(found.apply(images), np.zeros((len(images), 2)))
    np.testing.assert_array_equal(
        backbone.pooled(found.config, found.params, images),
        backbone.pooled(model.config, model.params, images),
    )
    with pytest.raises(tap.InputError, match="num_classes is 0"):
        tap.new_classifier(model, [])
    for names in ("ab", [1, 2], [b"a", b"b"]):
        with pytest.raises(tap.InputError, match="class_names"):
            tap.new_classifier(model, names)


def test_a_checkpoint_cannot_name_another_preset(tmp_path):
    name = "deit_tiny_patch16_224"
    write(tmp_path, name, record={"model_args": SMALL[name] | {"name": "resnet18"}})
    with pytest.raises(tap.InputError, match=r"unknown argument.*name"):
        load_timm(name, tmp_path / "model.safetensors", num_classes=7)
