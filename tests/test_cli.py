"""The command line, as a user runs it: image files in, a smaller model out."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import tapvit_jax as tap
from tapvit_jax import commands
from tapvit_jax.__main__ import main
from tapvit_jax.convert.timm import save_timm
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone, vit
from tapvit_jax.models.registry import Model
from tapvit_jax.prune import latency
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.runtime import run_program

CLASSES = ("0", "1", "2")
PREPROCESS = Preprocess(image_size=8, channels=1, mean=(0.3,), std=(0.4,))


def write_digits(root, start, stop):
    digits = load_digits()
    for i in range(start, stop):
        if str(digits.target[i]) in CLASSES:
            folder = root / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[i] * 15).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A pool, a private set, a dense model, an extractor and a payload, all made by commands."""
    root = tmp_path_factory.mktemp("cli")
    write_digits(root / "pool", 0, 400)
    write_digits(root / "private", 400, 700)
    config = vit.vit_config(
        image_size=8,
        patch_size=4,
        in_channels=1,
        num_classes=3,
        depth=2,
        num_heads=2,
        embed_dim=16,
    )
    model = Model(
        config, backbone.init(config, jax.random.key(0)), PREPROCESS, CLASSES, name="dense"
    )
    tap.save(model, root / "dense")
    call("extractor", "--model", root / "dense", "--pool", root / "pool", "--dim", "4",
         "--depth", "1", "--out", root / "extractor")  # fmt: skip
    call("device-fit", "--extractor", root / "extractor", "--images", root / "private",
         "--components", "1-4", "--out", root / "device.gmm")  # fmt: skip
    return root


def call(*arguments):
    main([str(argument) for argument in arguments])


def prune(work, out, *more, budget="macs=0.5", pool="pool"):
    # A selection file says how many images there are.
    more = (*more, "--count", "64") if "--payload" in more else more
    call("prune", "--model", work / "dense", "--pool", work / pool, "--budget", budget,
         "--recover-epochs", "1", "--out", out, *more)  # fmt: skip


def test_from_private_images_to_a_smaller_model(work, tmp_path, capsys):
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
         "--pool", work / "pool", "--count", "64", "--finetune-count", "100",
         "--out", tmp_path / "selection.json")  # fmt: skip
    prune(work, tmp_path / "small", "--selection", tmp_path / "selection.json")
    captured = capsys.readouterr()
    assert "10 images tell little, expected 50 or more" in captured.err
    printed = captured.out
    full, kept = (tap.cost(tap.load(p).config) for p in (work / "dense", tmp_path / "small"))
    assert (
        f"{full.encoder_params:,} encoder parameters, {full.model_bytes:,} model bytes" in printed
    )
    share = 100 * kept.activation_bytes / full.activation_bytes
    assert f"pruned: {kept.params:,} parameters (" in printed
    assert f"{kept.activation_bytes:,} activation bytes ({share:.1f} %)" in printed
    assert "top-1 (weighted by the device's classes) on 10 of" in printed
    for stage in ("dense, ", "pruned, ", "recovered in closed form, ", "fine-tuned"):
        assert f" % {stage}" in printed
    small, dense = tap.load(tmp_path / "small"), tap.load(work / "dense")
    share = tap.cost(small.config).macs / tap.cost(dense.config).macs
    assert 0.45 <= share <= 0.5
    assert small.preprocess == PREPROCESS
    assert small.history["budget"] == "macs=0.5"
    assert (small.history["criterion"], small.history["recovery"]) == ("tap", "ridge")
    # A selection file holds no mixture to tell of the classes.
    assert small.history["recovered"]["prior"] == "metric"
    call("evaluate", "--model", tmp_path / "small", "--images", work / "private")
    assert "top-1" in capsys.readouterr().out


def test_an_interrupted_fine_tuning_goes_on(work, tmp_path, monkeypatch):
    from tapvit_jax.models import store
    from tapvit_jax.train import finetune

    options = "--payload", work / "device.gmm", "--extractor", work / "extractor", "--method"
    options += "magnitude_l2", "--recover-epochs", "3"
    prune(work, tmp_path / "whole", *options)
    steps, step = [], finetune._step

    def stopped(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    def full(*_):
        raise tap.InputError("No space left on device")

    options += "--checkpoints", tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(work, tmp_path / "small", *options)
        # Of three epochs, two steps each, two were kept; all three are when the model is written.
        patch.setattr(store, "save", full)
        with pytest.raises(tap.InputError, match="No space left"):
            prune(work, tmp_path / "small", *options)
    assert len(steps) == 5 + 2 and not (tmp_path / "small").exists()
    monkeypatch.setattr(finetune, "_step", lambda *_: pytest.fail("a step again"))
    prune(work, tmp_path / "small", *options)
    whole, small = (tap.load(tmp_path / name).params for name in ("whole", "small"))
    jax.tree.map(np.testing.assert_array_equal, whole, small)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(tap.InputError, match="lies in --out, which the model replaces"):
        prune(work, tmp_path / "small", *options[:-1], tmp_path / "small" / "kept")


def test_payload_can_be_given_instead_of_a_selection(work, tmp_path, capsys):
    prune(work, tmp_path / "small", "--payload", work / "device.gmm",
          "--extractor", work / "extractor", "--method", "magnitude_l2",
          "--recover", "mean", "--label-free")  # fmt: skip
    printed = capsys.readouterr().out
    assert "agreement with the dense model moved to the device's classes on" in printed
    small = tap.load(tmp_path / "small")
    assert small.name == "dense-pruned"
    assert (small.history["criterion"], small.history["recovery"]) == ("magnitude_l2", "mean")
    assert small.history["recovered"]["prior"] == "mixture"


def test_the_prior_is_the_mixtures_the_images_or_the_dense_models(work, tmp_path, capsys):
    found = {}
    for prior in ("mixture", "metric", "dense"):
        prune(work, tmp_path / prior, "--payload", work / "device.gmm", "--extractor",
              work / "extractor", "--method", "magnitude_l2", "--recover", "mean", "--prior",
              prior, "--recover-epochs", "0", "--label-free")  # fmt: skip
        small = tap.load(tmp_path / prior)
        assert (small.prior, small.history["recovered"]["prior"]) == (prior != "dense", prior)
        found[prior] = np.asarray(small.params["head"]["bias"])
    expected = tap.load(work / "dense").params["head"]["bias"]
    np.testing.assert_array_equal(found["dense"], expected)
    moved = {prior: found[prior] - found["dense"] for prior in ("mixture", "metric")}
    assert all(np.ptp(shift) > 0.05 for shift in moved.values())
    assert np.abs(moved["mixture"] - moved["metric"]).max() > 1e-3
    with pytest.raises(tap.InputError, match="--prior mixture needs --payload"):
        prune(work, tmp_path / "none", "--selection", "any.json", "--prior", "mixture")
    with pytest.raises(tap.InputError, match="--recover prior does nothing with --prior dense"):
        prune(
            work,
            tmp_path / "none",
            "--payload",
            "any.gmm",
            "--recover",
            "prior",
            "--prior",
            "dense",
        )
    with pytest.raises(tap.InputError, match="--prior mixture needs another --recover than none"):
        prune(work, tmp_path / "none", "--payload", work / "device.gmm", "--recover", "none",
              "--prior", "mixture")  # fmt: skip
    with pytest.raises(tap.InputError, match="--features needs --payload"):
        prune(work, tmp_path / "none", "--selection", "any.json", "--features", tmp_path / "f")
    # Also where it asks for what is the default.
    for option, value in (("--finetune-count", "100"), ("--count", "640")):
        with pytest.raises(tap.InputError, match=f"{option} needs --payload"):
            prune(work, tmp_path / "none", "--selection", "any.json", option, value)
    with pytest.raises(tap.InputError, match="--device is of a --selection file"):
        prune(work, tmp_path / "none", "--payload", work / "device.gmm", "--device", "0")
    with pytest.raises(tap.InputError, match="--payload, found neither"):
        prune(work, tmp_path / "none")


def test_labels_of_other_classes_are_not_used_and_that_is_said(work, tmp_path, capsys):
    dense = tap.load(work / "dense")
    head = {"kernel": np.zeros((16, 4), np.float32), "bias": np.zeros(4, np.float32)}
    config = dataclasses.replace(dense.config, num_classes=4)
    other = dense.replace(config=config, params=dense.params | {"head": head}, class_names=())
    cases = {
        "it has 3 classes, the model 4 without names": other,
        "folders 2 are not among the 3 classes": dense.replace(class_names=("0", "1", "yak")),
    }
    for message, model in cases.items():
        tap.save(model, tmp_path / "other")
        call("prune", "--model", tmp_path / "other", "--pool", work / "pool", "--payload",
             work / "device.gmm", "--extractor", work / "extractor", "--budget", "macs=0.5",
             "--count", "32", "--method", "magnitude_l2", "--recover", "none", "--recover-epochs",
             "0", "--out", tmp_path / "small")  # fmt: skip
        printed = capsys.readouterr()
        assert f"the labels of {work / 'pool'} are not used: " in printed.err
        assert message in printed.err
        assert "agreement with the dense model" in printed.out
        call("export", tmp_path / "other", "--format", "onnx", "--images", work / "private",
             "--out", tmp_path / "other.onnx")  # fmt: skip
        printed = capsys.readouterr()
        assert message in printed.err
        assert "top-1" not in printed.out and "same class on" in printed.out


def test_published_method_without_any_recovery(work, tmp_path, capsys):
    prune(work, tmp_path / "small", "--payload", work / "device.gmm",
          "--extractor", work / "extractor", "--method", "tap_published",
          "--recover", "none", "--recover-epochs", "0")  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("pruned") and "recovered in closed form" not in printed
    dense, small = tap.load(work / "dense"), tap.load(tmp_path / "small")
    found = small.params["head"]["kernel"]
    np.testing.assert_array_equal(found, dense.params["head"]["kernel"])


def test_whole_heads_and_branches_may_go(work, tmp_path):
    payload = ("--payload", work / "device.gmm", "--extractor", work / "extractor",
               "--recover", "none", "--recover-epochs", "0")  # fmt: skip
    prune(work, tmp_path / "heads", *payload, "--attention", "heads", budget="macs=0.6")
    prune(work, tmp_path / "depth", *payload, "--widths", "exact", "--branches",
          budget="macs=0.3")  # fmt: skip
    prune(work, tmp_path / "floors", *payload, "--widths", "local", "--min-keep", "0.4",
          "--min-dim", "5", budget="macs=0.8")  # fmt: skip
    blocks = tap.load(tmp_path / "heads").config.blocks
    assert min(block.num_heads for block in blocks) == 1
    assert all(block.qk_dim == block.v_dim == 8 for block in blocks)
    blocks = tap.load(tmp_path / "depth").config.blocks
    assert not all(block.attn and block.mlp for block in blocks)
    floors = tap.load(tmp_path / "floors")
    assert all(min(b.qk_dim, b.v_dim) >= 5 and b.mlp_dim >= 26 for b in floors.config.blocks)
    assert floors.history["widths"]["widths"] == "local"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--branches",), "branches needs widths 'greedy' or 'exact'"),
        (("--min-keep", "2"), "min_keep is 2"),
        (("--method", "tap_published", "--attention", "heads"), "heads' goes neither with ragged"),
    ],
)
def test_widths_that_do_not_go_together_are_refused(work, tmp_path, options, message):
    with pytest.raises(tap.InputError, match=message):
        prune(work, tmp_path / "small", "--payload", work / "device.gmm", *options, pool="nowhere")


def test_criteria_that_need_labels_are_refused_without_them(work, tmp_path):
    with pytest.raises(tap.InputError, match="--method fisher needs the labels of the pool, but"):
        prune(work, tmp_path / "small", "--payload", work / "device.gmm",
              "--extractor", work / "extractor", "--method", "fisher", "--label-free")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("finetune", "expected"), [(5, 10), (12, 12), (1000, 123)])
def test_the_fine_tuning_set_lies_between_the_metric_dataset_and_the_pool(
    work, tmp_path, finetune, expected
):
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm", "--pool",
         work / "pool", "--count", "10", "--finetune-count", finetune,
         "--out", tmp_path / "s.json")  # fmt: skip
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["metric_count"] == 10
    assert len(found["devices"][0]["indices"]) == expected


def test_the_metric_dataset_is_no_larger_than_the_pool_unless_asked_for(work, tmp_path, capsys):
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm", "--pool",
         work / "pool", "--out", tmp_path / "s.json")  # fmt: skip
    said = f"all 123 images of {work / 'pool'} are the metric dataset, which usually has 640"
    assert said in capsys.readouterr().err
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["metric_count"] == len(found["devices"][0]["indices"]) == 123
    call("prune", "--model", work / "dense", "--pool", work / "pool", "--payload",
         work / "device.gmm", "--extractor", work / "extractor", "--budget", "macs=0.5", "--method",
         "magnitude_l2", "--recover", "none", "--recover-epochs", "0",
         "--out", tmp_path / "small")  # fmt: skip
    assert said in capsys.readouterr().err


def test_selections_are_deterministic(work, tmp_path):
    for name in ("a.json", "b.json"):
        call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
             "--pool", work / "pool", "--count", "20", "--out", tmp_path / name)  # fmt: skip
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_features_of_the_pool_are_computed_once(work, tmp_path, monkeypatch):
    kept = "--features", tmp_path / "features"
    select = ["select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
              "--pool", work / "pool", "--count", "20"]  # fmt: skip
    call(*select, "--out", tmp_path / "without.json")
    call(*select, *kept, "--out", tmp_path / "first.json")

    def computed(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(tap.Extractor, "stream", computed)
    call(*select, *kept, "--out", tmp_path / "second.json")
    texts = {(tmp_path / f"{name}.json").read_text() for name in ("without", "first", "second")}
    assert len(texts) == 1
    prune(work, tmp_path / "small", "--extractor", work / "extractor", "--payload",
          work / "device.gmm", "--recover-epochs", "0", *kept)  # fmt: skip


def test_a_pool_is_the_same_whatever_its_classes_are_called(work, tmp_path, monkeypatch):
    tap.save(tap.load(work / "dense").replace(class_names=("2", "0", "1")), tmp_path / "dense")
    kept = "--features", tmp_path / "features"
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
         "--pool", work / "pool", "--count", "20", *kept, "--out", tmp_path / "s.json")  # fmt: skip

    def computed(*_, **__):
        raise AssertionError("computed again")

    def scored(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tap.Extractor, "stream", computed)
    monkeypatch.setattr("tapvit_jax.commands.prune.score", scored)
    payload = ["--payload", work / "device.gmm", "--extractor", work / "extractor", "--count", "20"]
    for chosen in (["--selection", tmp_path / "s.json"], [*payload, *kept]):
        with pytest.raises(KeyboardInterrupt):
            call("prune", "--model", tmp_path / "dense", "--pool", work / "pool", "--budget",
                 "macs=0.5", *chosen, "--out", tmp_path / "small")  # fmt: skip


def test_inspect_reads_everything(work, tmp_path, capsys):
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
         "--pool", work / "pool", "--count", "20", "--out", tmp_path / "s.json")  # fmt: skip
    (tmp_path / "s.txt").write_bytes((tmp_path / "s.json").read_bytes())
    history = {"weights": {"file": "a.pth"}, "budget": "macs=0.5", "kept": list(range(1000))}
    small = tap.load(work / "dense").replace(prior=True, history=history)
    tap.save(small, tmp_path / "small")
    for file, kind in (("renamed.bin", "onnx"), ("small.hlo", "stablehlo")):
        call("export", tmp_path / "small", "--format", kind, "--images", work / "private",
             "--out", tmp_path / file)  # fmt: skip
    (tmp_path / "alone").write_bytes((tmp_path / "small.hlo").read_bytes())
    config, preprocess = vit_preset()
    timm = Model(config, backbone.init(config, jax.random.key(3)), preprocess,
                 architecture="deit_tiny_patch16_224", name="a")  # fmt: skip
    tap.export_timm(timm, tmp_path / "timm")
    dense = small.config
    features = tuple(float(x) for x in latency.features(dense))
    LatencyModel(dense, (1.0,) * len(features), 2, 1, 0.1, 0.2, ((features, 3.0),), {}).save(
        tmp_path / "table.json"
    )
    expected = {
        work / "dense": ["block  1: 2 heads x (8 qk, 8 v)", "classes: 3, 0, 1, 2\n"],
        tmp_path / "small": ["images: 8 x 8 x 1, ", "mean [0.3]", '{"file": "a.pth"}',
                             "budget: macs=0.5", "device's prior: true"],
        work / "extractor": ["extractor: pooled, 4 features", "mean [0.3]"],
        work / "device.gmm": ["4 dimensions, diag covariance"],
        tmp_path / "s.json": ["device.gmm", "the first 20 of each"],
        tmp_path / "s.txt": ["device.gmm"],
        tmp_path / "renamed.bin": ["ONNX file: dense, ", "images: 8 x 8 x 1, ", "0, 1, 2\n"],
        tmp_path / "small.hlo": ["StableHLO file: ", ", for cpu, cuda, tpu\n", "mean [0.3]",
                                 "images: 8 x 8 x 1, ", "classes: 3, 0, 1, 2\n"],
        tmp_path / "alone": ["8 x 8 x 1, how they are prepared is not said", "3, without names"],
        tmp_path / "timm": ["deit_tiny_patch16_224", "block  0: 3 heads x (4 qk, 4 v)",
                            "images: 32 x 32 x 3, ", "classes: 2, "],
        tmp_path / "renamed.bin.json": ["beside it as renamed.bin", '"difference": '],
        tmp_path / "table.json": ["1 measurements, batch 2, 1 threads", "dense: 7,011 param"],
    }  # fmt: skip
    for path, texts in expected.items():
        capsys.readouterr()
        call("inspect", path)
        printed = capsys.readouterr().out
        assert "kept" not in printed
        for text in texts:
            assert text in printed
    (tmp_path / "notes.txt").write_text("years of work")
    (tmp_path / "other.json").write_text('{"format": ["tapvit-selection"]}')
    for path in (work / "pool", tmp_path / "notes.txt", tmp_path / "other.json"):
        with pytest.raises(
            tap.InputError, match="is nothing that inspect knows, expected a model, an"
        ):
            call("inspect", path)


def test_names_in_files_bring_no_terminal_commands(work, tmp_path, capsys):
    name, classes = "\x1b]0;a\x07\nb", ("\ud800", "\x1b[2J", "c")
    model = tap.load(work / "dense").replace(name=name, history={"\x1b[1m": "\x9b31m"})
    tap.save(model.replace(class_names=classes), tmp_path / "small")
    call("inspect", tmp_path / "small")
    printed = capsys.readouterr().out
    assert printed.startswith(r"\x1b]0;a\x07\nb: 7,011 parameters")
    assert r"classes: 3, \ud800, \x1b[2J, c" in printed
    assert r"\x1b[1m: \x9b31m" in printed
    assert all(line.isprintable() for line in printed.splitlines())


def test_inspect_refuses_what_is_damaged(work, tmp_path):
    path, spec = tmp_path / "a.hlo", tmp_path / "a.hlo.json"
    call("export", work / "dense", "--format", "stablehlo", "--images", work / "private",
         "--out", path)  # fmt: skip
    record = json.loads(spec.read_text())
    for change, message in (
        ({"class_names": 3}, r"a\.hlo\.json: class_names is 3, expected a list$"),
        ({"class_names": [3]}, r"a\.hlo\.json: class_names\[0\] is 3, expected str$"),
        ({"preprocess": {}}, r"a\.hlo\.json: preprocess"),
        ({"version": 9}, r"a\.hlo\.json"),
    ):
        spec.write_text(json.dumps(record | change))
        with pytest.raises(tap.InputError, match=message):
            call("inspect", path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(tap.InputError, match=r"a\.hlo: is no serialised StableHLO"):
        call("inspect", path)
    struct = jax.ShapeDtypeStruct((2,), "float32")
    path.write_bytes(jax.export.export(jax.jit(jax.numpy.sin))(struct).serialize())
    with pytest.raises(tap.InputError, match=r"a\.hlo: takes and gives .*expected images"):
        call("inspect", path)
    for text in ("[]", '{"model_type": "vit"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(tap.InputError, match=r"config\.json: names no architecture"):
            call("inspect", tmp_path)


def test_embedding_extractor(work, tmp_path, capsys):
    call("extractor", "--model", work / "dense", "--pool", work / "pool", "--kind", "embedding",
         "--epochs", "1", "--dim", "3", "--out", tmp_path / "extractor")  # fmt: skip
    printed = capsys.readouterr()
    assert "3 features" in printed.out
    # What takes long says so in between.
    ends = [line for line in printed.err.splitlines() if not line.endswith("...")]
    assert [line[:4] for line in ends] == [" 50%", "100%"]


def test_an_embedding_extractor_needs_labels(work, tmp_path):
    with pytest.raises(tap.InputError, match="trains on labels, which images of"):
        call("extractor", "--model", work / "dense", "--pool", work / "pool" / "0", "--kind",
             "embedding", "--out", tmp_path / "extractor")  # fmt: skip


def test_an_extractor_without_training_is_done_when_the_pca_is(work, tmp_path, capsys):
    call("extractor", "--model", work / "dense", "--pool", work / "pool", "--dim", "3",
         "--out", tmp_path / "extractor")  # fmt: skip
    assert [line[:4] for line in capsys.readouterr().err.splitlines()] == ["100%"]


def test_timm_weights_are_converted(work, tmp_path, capsys):
    config, _ = vit_preset()
    params = backbone.init(config, jax.random.key(3))
    save_timm(tmp_path / "weights.safetensors", config, params)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    call("convert", "--preset", "deit_tiny_patch16_224",
         "--weights", tmp_path / "weights.safetensors", *OVERRIDES,
         "--classes", tmp_path / "names.txt", "--out", tmp_path / "model")  # fmt: skip
    model = tap.load(tmp_path / "model")
    assert model.class_names == ("cat", "dog")
    assert model.preprocess.crop_pct == 0.9
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_arguments_that_are_no_json_are_text(tmp_path, value):
    config, _ = vit_preset()
    save_timm(tmp_path / "w.safetensors", config, backbone.init(config, jax.random.key(3)))
    with pytest.raises(tap.InputError, match=r"img_size is .*, expected"):
        call("convert", "--preset", "deit_tiny_patch16_224",
             "--weights", tmp_path / "w.safetensors", "--set", f"img_size={value}",
             "--out", tmp_path / "m")  # fmt: skip


OVERRIDES = [
    item
    for value in ("img_size=32", "depth=1", "embed_dim=12", "num_classes=2")
    for item in ("--set", value)
]


def vit_preset():
    from tapvit_jax.models.presets import create

    return create("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_classes=2)


def test_corrupt_images_are_named_or_skipped_and_counted(work, tmp_path, capsys):
    write_digits(tmp_path / "private", 400, 500)
    broken = tmp_path / "private" / "0" / "broken.png"
    broken.write_bytes(b"not an image")
    arguments = ["device-fit", "--extractor", work / "extractor", "--images", tmp_path / "private",
                 "--components", "1", "--out", tmp_path / "device.gmm"]  # fmt: skip
    with pytest.raises(
        tap.InputError, match=rf"^{broken} .*\(--skip-corrupt leaves such images out"
    ):
        call(*arguments)
    assert not (tmp_path / "device.gmm").exists()
    call(*arguments, "--skip-corrupt")
    assert "skipped 1 of" in capsys.readouterr().err
    assert tap.Gmm.load(tmp_path / "device.gmm").components == 1


def device_fit(work, out, *more):
    call("device-fit", "--extractor", work / "extractor", "--images", work / "private",
         "--out", out, *more)  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs=0", "more than 0"),
        ("macs=-1", "more than 0"),
        ("macs=1.5", "at most 1.0"),
        ("watts=0.5", "unit one of"),
        ("macs=0.0001", "smallest feasible"),
    ],
)
def test_bad_budgets_are_refused_before_any_work(work, tmp_path, budget, message):
    with pytest.raises(tap.InputError, match=message):
        # The pool does not even exist: the budget is looked at first.
        prune(work, tmp_path / "small", "--payload", work / "device.gmm",
              "--extractor", work / "extractor", budget=budget, pool="nowhere")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_ragged_heads_are_not_rounded(work, tmp_path):
    with pytest.raises(tap.InputError, match="ragged heads have no common width"):
        prune(work, tmp_path / "small", "--payload", work / "device.gmm",
              "--method", "tap_published", "--round-to", "8", pool="nowhere")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs_leave_nothing_behind(work, tmp_path):
    out = tmp_path / "out"
    payload = (work / "device.gmm").read_bytes()
    (work / "truncated.gmm").write_bytes(payload[:-10])
    foreign = tap.Gmm.load(work / "device.gmm")
    foreign.save(work / "foreign.gmm", extractor="ab" * 32)
    select = ["select", "--extractor", work / "extractor", "--pool", work / "pool", "--out", out]
    cases = {
        "truncated": [*select, "--count", "10", "--payload", work / "truncated.gmm"],
        "extractor": [*select, "--count", "10", "--payload", work / "foreign.gmm"],
        "99999": [*select, "--count", "99999", "--payload", work / "device.gmm"],
        "no such": [*select, "--count", "10", "--payload", work / "missing.gmm"],
    }
    for message, arguments in cases.items():
        with pytest.raises(tap.InputError, match=message):
            call(*arguments)
    with pytest.raises(tap.InputError, match="components"):
        device_fit(work, out, "--components", "200")
    with pytest.raises(tap.InputError, match="range such as"):
        device_fit(work, out, "--components", "many")
    with pytest.raises(tap.InputError, match="split"):
        device_fit(work, out, "--split", "dusk")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_contents_is_refused_before_any_work(work, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(tap.InputError, match=r"thesis\.tex.*would be lost"):
        prune(work, tmp_path, "--payload", work / "device.gmm", pool="nowhere")
    with pytest.raises(tap.InputError, match="below a file"):
        prune(work, tmp_path / "thesis.tex" / "small", pool="nowhere")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("option", ["--count", "--finetune-count"])
def test_no_images_are_refused_before_any_work(work, tmp_path, option):
    payload = ("--payload", work / "device.gmm", "--pool", "nowhere", option, "0")
    with pytest.raises(tap.InputError, match=f"{option} is 0, expected 1 or more"):
        call("select", "--extractor", "nowhere", *payload, "--out", tmp_path / "s.json")
    with pytest.raises(tap.InputError, match=f"{option} is 0, expected 1 or more"):
        call("prune", "--model", "nowhere", "--budget", "macs=0.5", *payload, "--out",
             tmp_path / "small")  # fmt: skip


def test_the_dense_model_is_not_replaced_by_the_pruned_one(work, tmp_path):
    (tmp_path / "link").symlink_to(work / "dense")
    for out in (work / "dense", tmp_path / "link", work / "pool" / ".." / "dense"):
        with pytest.raises(tap.InputError, match="is the dense model, which would be lost"):
            prune(work, out, "--payload", work / "device.gmm", pool="nowhere")


def test_outputs_and_options_are_checked_before_any_work(tmp_path):
    # Nothing of what these read exists.
    prune = ["prune", "--model", "no", "--payload", "no", "--pool", "no", "--budget", "macs=0.5"]
    bench = ["bench-latency", "--model", "no"]
    build = ["extractor", "--model", "no", "--pool", "no"]
    commands = [
        prune,
        build,
        ["convert", "--preset", "no", "--weights", "no"],
        ["device-fit", "--extractor", "no", "--images", "no"],
        ["select", "--extractor", "no", "--payload", "no", "--pool", "no"],
        ["export", "no", "--format", "onnx", "--images", "no"],
        ["export", "no", "--format", "timm", "--images", "no"],
        [*bench, "--fit", "3"],
    ]
    for command in commands:
        with pytest.raises(tap.InputError, match="/proc/x: cannot be written: "):
            call(*command, "--out", "/proc/x")
    cases = {
        "epochs is -1": [*prune, "--recover-epochs", "-1"],
        "learning_rate is -1": [*prune, "--learning-rate", "-1"],
        "epochs is -2": [*build, "--epochs", "-2"],
        "dim is 0": [*build, "--dim", "0"],
        "--repeats is 0": [*bench, "--repeats", "0"],
        "--batch is 0": [*bench, "--batch", "4", "--batch", "0"],
    }
    for message, command in cases.items():
        with pytest.raises(tap.InputError, match=message):
            call(*command, "--out", tmp_path / "out")


def test_a_selection_of_another_pool_is_refused(work, tmp_path):
    call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
         "--pool", work / "pool", "--count", "20", "--out", tmp_path / "s.json")  # fmt: skip
    with pytest.raises(tap.InputError, match="another pool"):
        prune(work, tmp_path / "small", "--selection", tmp_path / "s.json", pool="private")
    with pytest.raises(tap.InputError, match=r"--count is 1000, but .*pool has 123 images"):
        call("select", "--extractor", work / "extractor", "--payload", work / "device.gmm",
             "--pool", work / "pool", "--count", "1000", "--out", tmp_path / "s.json")  # fmt: skip
    with pytest.raises(tap.InputError, match="--device is 3"):
        prune(work, tmp_path / "small", "--selection", tmp_path / "s.json", "--device", "3")
    spec = json.loads((tmp_path / "s.json").read_text())
    spec["devices"][0]["indices"][0] = 10**9
    (tmp_path / "bad.json").write_text(json.dumps(spec))
    with pytest.raises(tap.InputError, match="must lie in"):
        call("inspect", tmp_path / "bad.json")


def test_what_is_no_selection_is_called_what_it_is(work):
    cases = {"device.gmm": "a payload", "extractor": "an extractor", "dense": "a model",
             "pool": "something else"}  # fmt: skip
    for name, kind in cases.items():
        with pytest.raises(tap.InputError, match=f"{name}: is {kind}, expected a selection"):
            prune(work, work / "none", "--selection", work / name)
    with pytest.raises(tap.InputError, match=r"missing\.json: no such file"):
        prune(work, work / "none", "--selection", work / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric_count": 1.5}, "metric_count is of type float, expected int"),
        ({"metric_count": True}, "metric_count is of type bool, expected int"),
        ({"metric_count": 3}, "metric_count is 3, expected 1 to 2"),
        ({"pool_size": "9"}, "pool_size is of type str, expected int"),
        ({"method": None}, "method is of type NoneType, expected str"),
        ({"devices": {}}, "devices is of type dict, expected list"),
        ({"devices": []}, "devices is empty"),
        ({"devices": [[1, 2]]}, "a device has no payload"),
        ({"devices": [{"payload": 1, "indices": [1, 2]}]}, "a device has no payload"),
        ({"devices": [{"payload": "a"}]}, "a: indices must be a list of whole numbers"),
        ({"devices": [{"payload": "a", "indices": [[1], [2]]}]}, "must be a list of whole"),
        ({"devices": [{"payload": "a", "indices": [1, 2.0]}]}, "must be a list of whole numbers"),
        ({"devices": [{"payload": "a", "indices": [1, 9]}]}, r"must lie in 0\.\.8"),
        ({"devices": [{"payload": "a", "indices": [1, 1]}]}, "a: indices repeat"),
        ({"devices": [{"payload": "a", "indices": []}]}, "must be a list of whole numbers"),
    ],
)
def test_broken_selections_are_refused(tmp_path, change, message):
    whole = {"format": "tapvit-selection", "version": 1, "pool": "ab", "pool_size": 9,
             "method": "top", "seed": 0, "metric_count": 1,
             "devices": [{"payload": "a", "indices": [1, 2]}]}  # fmt: skip
    path = tmp_path / "s.json"
    path.write_text(json.dumps(whole))
    call("inspect", path)
    path.write_text(json.dumps(whole | change))
    with pytest.raises(tap.InputError, match=message):
        call("inspect", path)


def test_labels_out_of_range_are_refused(work, tmp_path):
    (tmp_path / "images" / "9").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "images" / "9" / "a.png")
    with pytest.raises(tap.InputError, match="out of range"):
        call("evaluate", "--model", work / "dense", "--images", tmp_path / "images")


def test_results_do_not_depend_on_how_many_images_are_taken_at_a_time(work, tmp_path, capsys):
    printed = []
    for more in ((), ("--batch-size", "5")):
        call("evaluate", "--model", work / "dense", "--images", work / "private", *more)
        printed.append(capsys.readouterr().out)
        device_fit(work, tmp_path / f"{len(printed)}.gmm", *more)
        capsys.readouterr()
    assert printed[0] == printed[1]
    found = [tap.Gmm.load(tmp_path / f"{i}.gmm") for i in (1, 2)]
    np.testing.assert_allclose(found[0].means, found[1].means, atol=1e-4)
    with pytest.raises(tap.InputError, match="batch_size is 0, expected 1 or more"):
        call("evaluate", "--model", work / "dense", "--images", work / "private",
             "--batch-size", "0")  # fmt: skip


def test_pruning_takes_fewer_images_at_a_time_if_told(work, tmp_path, monkeypatch):
    taken = {}
    for name in ("score", "train"):
        original = getattr(commands.prune, name)

        def noted(*arguments, name=name, original=original, **others):
            taken[name] = arguments[3].batch_size
            return original(*arguments, **others)

        monkeypatch.setattr(commands.prune, name, noted)
    prune(work, tmp_path / "small", "--payload", work / "device.gmm", "--extractor",
          work / "extractor", "--batch-size", "16")  # fmt: skip
    assert taken == {"score": 16, "train": 16}
    with pytest.raises(tap.InputError, match="batch_size is 1, expected 2 or more"):
        prune(work, tmp_path / "one", "--payload", work / "device.gmm", "--batch-size", "1")


def test_a_model_of_nan_is_not_evaluated(work, tmp_path, capsys):
    dense = tap.load(work / "dense")
    head = {**dense.params["head"], "bias": np.full(3, np.nan, np.float32)}
    tap.save(dense.replace(params={**dense.params, "head": head}), tmp_path / "broken")
    with pytest.raises(tap.InputError, match="broken: its cross-entropy is nan, expected a finite"):
        call("evaluate", "--model", tmp_path / "broken", "--images", work / "private")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5", "one"])
def test_seeds_out_of_range_are_refused_before_any_work(capsys, seed):
    commands = {
        "extractor": ["--model", "m", "--pool", "p"],
        "device-fit": ["--extractor", "e", "--images", "p"],
        "select": ["--extractor", "e", "--payload", "d", "--pool", "p"],
        "prune": ["--model", "m", "--pool", "p", "--budget", "macs=0.5"],
        "bench-latency": ["--model", "m"],
    }
    for command, options in commands.items():
        with pytest.raises(SystemExit, match="2"):
            call(command, *options, "--out", "o", "--seed", seed)
        error = capsys.readouterr().err
        assert f"--seed: is '{seed}', expected a whole number from 0 to 2^32 - 1" in error


def test_exit_codes(capsys):
    assert run_program(lambda: main(["inspect", "missing.gmm"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: missing.gmm")
    assert error.count("\n") == 1


def test_one_process_of_several_is_refused(monkeypatch):
    monkeypatch.setattr("tapvit_jax.__main__.process_count", lambda: 2)
    with pytest.raises(InputError, match="one process, found 2"):
        main(["inspect", "somewhere"])


def test_a_fresh_process_prints_one_line_and_exits_with_2():
    found = subprocess.run(
        [sys.executable, "-m", "tapvit_jax", "inspect", "nothing.gmm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: nothing.gmm")
    assert "Traceback" not in found.stderr
