"""tapvit train: from weights of other classes, or of none, to a dense model of one's own."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import tapvit_jax as tap
from tapvit_jax.__main__ import main
from tapvit_jax.convert.timm import to_timm
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.models.registry import Model
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.vit import vit_config

PRESET = "deit_tiny_patch16_224"
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "crop_pct": 1.0}
SET = [part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")]
FAST = [
    "--learning-rate",
    "1e-2",
    "--layer-decay",
    "1",
    "--warmup-epochs",
    "0",
    "--batch-size",
    "8",
]


def call(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of two classes that brightness tells apart, and weights without a classifier."""
    root = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.clip(level + 20 * rng.standard_normal((8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{i}.png")
    config, _ = create(PRESET, **SIZES, num_classes=7)
    state = to_timm(config, backbone.init(config, jax.random.key(0)))
    state = {name: array for name, array in state.items() if not name.startswith("head")}
    safetensors.numpy.save_file(state, root / "weights.safetensors")
    return root


def start(work, *more):
    call("train", "--model", PRESET, "--weights", work / "weights.safetensors", *SET,
         "--new-classifier", "--images", work / "images", *FAST, *more)  # fmt: skip


def top1(printed):
    return float(printed.split("top-1 ")[1].split(" %")[0])


def test_weights_without_a_classifier_become_a_model_of_ones_own_classes(work, tmp_path, capsys):
    start(work, "--epochs", "4", "--flip", "--out", tmp_path / "model")
    printed = capsys.readouterr().out
    assert "top-1 on 8 images that were held out and chose the epoch: " in printed
    assert "of 4\n" in printed
    model = tap.load(tmp_path / "model")
    assert model.class_names == ("dark", "light")
    assert model.history["training"]["recipe"]["flip"] is True
    assert model.history["training"]["recipe"]["learning_rate"] == 1e-2
    assert model.history["training"]["count"] == 80
    assert model.history["weights"]["file"] == "weights.safetensors"
    call("evaluate", "--model", tmp_path / "model", "--images", work / "images")
    assert top1(capsys.readouterr().out) > 90
    # It is a dense model like any other.
    call("prune", "--model", tmp_path / "model", "--pool", work / "images", "--budget", "macs=0.7",
         "--payload", payload(work, tmp_path), "--extractor", tmp_path / "extractor", "--count",
         "32", "--recover-epochs", "0", "--out", tmp_path / "small")  # fmt: skip
    capsys.readouterr()
    call("evaluate", "--model", tmp_path / "small", "--images", work / "images")
    assert top1(capsys.readouterr().out) > 80


def payload(work, folder):
    """Of an extractor that is made of the weights without a classifier too."""
    call("extractor", "--model", PRESET, "--weights", work / "weights.safetensors", *SET,
         "--new-classifier", "--pool", work / "images", "--dim", "4",
         "--out", folder / "extractor")  # fmt: skip
    call("device-fit", "--extractor", folder / "extractor", "--images", work / "images",
         "--components", "2", "--out", folder / "device.gmm")  # fmt: skip
    return folder / "device.gmm"


def test_a_model_learns_other_classes_and_then_more_of_them(work, tmp_path, capsys):
    config = vit_config(image_size=8, patch_size=4, num_classes=5, depth=1, num_heads=2,
                        embed_dim=8)  # fmt: skip
    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
    dense = Model(config, backbone.init(config, jax.random.key(1)), preprocess, tuple("abcde"))
    tap.save(dense, tmp_path / "old")
    options = ["--images", work / "images", *FAST, "--epochs"]
    call("train", "--model", tmp_path / "old", "--new-classifier", *options, "2",
         "--out", tmp_path / "new")  # fmt: skip
    assert re.search(r": \d+\.0 % before, \d+\.0 % after epoch \d of 2\n", capsys.readouterr().out)
    assert tap.load(tmp_path / "new").class_names == ("dark", "light")
    call("train", "--model", tmp_path / "new", *options, "0", "--out", tmp_path / "same")
    new, same = (tap.load(tmp_path / name).params for name in ("new", "same"))
    jax.tree.map(np.testing.assert_array_equal, new, same)
    tap.save(tap.load(tmp_path / "new").replace(class_names=()), tmp_path / "nameless")
    call("train", "--model", tmp_path / "nameless", *options, "0", "--out", tmp_path / "named")
    assert tap.load(tmp_path / "named").class_names == ("dark", "light")
    with pytest.raises(tap.InputError, match=r"dark.* classes"):
        call("train", "--model", tmp_path / "old", *options, "1", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_interrupted_training_goes_on(work, tmp_path, monkeypatch):
    start(work, "--epochs", "3", "--out", tmp_path / "whole")
    from tapvit_jax.progress import Step

    advanced = []

    def advance(self, share):
        advanced.append(share)
        if len(advanced) == 19:
            raise KeyboardInterrupt

    options = "--epochs", "3", "--checkpoints", tmp_path / "kept", "--out", tmp_path / "again"
    monkeypatch.setattr(Step, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        start(work, *options)
    assert not (tmp_path / "again").exists()
    start(work, *options)
    # Two epochs of nine steps were kept, the third alone was left.
    evaluated = [1 / 2] * 2
    np.testing.assert_allclose(advanced[19:], [2 / 3] + [1 / 27] * 9 + evaluated)
    whole, again = (tap.load(tmp_path / name).params for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_model_that_cannot_be_saved_costs_no_training(work, tmp_path, monkeypatch):
    from tapvit_jax.commands.train import store
    from tapvit_jax.train import finetune

    def full(*_):
        raise tap.InputError("No space left on device")

    options = "--epochs", "1", "--checkpoints", tmp_path / "kept", "--out", tmp_path / "model"
    with monkeypatch.context() as patch, pytest.raises(tap.InputError, match="No space left"):
        patch.setattr(store, "save", full)
        start(work, *options)
    monkeypatch.setattr(finetune, "_step", lambda *_: pytest.fail("a step again"))
    start(work, *options)
    assert tap.load(tmp_path / "model").history["training"]["epoch"] in (0, 1)
    assert not (tmp_path / "kept").exists()


def test_what_cannot_be_trained_is_refused_before_any_work(work, tmp_path, monkeypatch):
    monkeypatch.delattr("tapvit_jax.commands.train.run_training")
    with pytest.raises(tap.InputError, match="--set num_classes=2: with --new-classifier, the cl"):
        start(work, "--set", "num_classes=2", "--out", tmp_path / "x")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(tap.InputError, match="--classes: with --new-classifier, the classes are"):
        start(work, "--classes", tmp_path / "names.txt", "--out", tmp_path / "x")
    with pytest.raises(tap.InputError, match="dark: has no classes, expected a folder of images"):
        start(work, "--images", work / "images" / "dark", "--out", tmp_path / "x")
    for place in ("x", "x/kept"):
        with pytest.raises(
            tap.InputError, match=f"{place}: lies in --out, which the model replaces"
        ):
            start(work, "--checkpoints", tmp_path / place, "--out", tmp_path / "x")
    for item in ("name=a", "weights=b", "new_classifier=true"):
        with pytest.raises(tap.InputError, match=f"--set {item}: is no argument of timm's"):
            start(work, "--set", item, "--out", tmp_path / "x")
    with pytest.raises(tap.InputError, match=r"learning_rate is -1\.0"):
        start(work, "--learning-rate", "-1", "--out", tmp_path / "x")
    config = vit_config(image_size=8, patch_size=4, num_classes=2, depth=1, num_heads=2,
                        embed_dim=8)  # fmt: skip
    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
    params = backbone.init(config, jax.random.key(1))
    dense = Model(config, params, preprocess, ("dark", "light"))
    tap.save(dense, tmp_path / "dense")
    tap.save(dense.replace(prior=True), tmp_path / "prior")
    resnet = ResNetConfig(32, 2, True, (1, 1))
    tap.save(
        Model(
            resnet, backbone.init(resnet, jax.random.key(0)), Preprocess(32, (0.5,) * 3, (1.0,) * 3)
        ),
        tmp_path / "resnet",
    )
    images = "--images", work / "images"
    for name, out, message in (
        ("prior", "x", "prior: has a device's prior in its logits"),
        ("dense", "dense", "is the dense model, which would be lost"),
        ("resnet", "x", "a resnet only serves as a feature extractor"),
        ("none", "x", "none: no such directory; a preset's name needs --weights too"),
    ):
        with pytest.raises(tap.InputError, match=message):
            call("train", "--model", tmp_path / name, *images, "--out", tmp_path / out)
    with pytest.raises(tap.InputError, match="--set describes --weights, which is not given"):
        call("train", "--model", tmp_path / "dense", *SET, "--new-classifier", *images,
             "--out", tmp_path / "x")  # fmt: skip
    with pytest.raises(tap.InputError, match="--new-classifier is for --weights"):
        call("extractor", "--model", tmp_path / "dense", "--new-classifier", "--pool",
             work / "images", "--out", tmp_path / "x")  # fmt: skip
    assert not (tmp_path / "x").exists()
