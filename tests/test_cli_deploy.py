"""The command line around checkpoints and deployment: timm weights in, artefacts out."""

import json

import jax
import numpy as np
import pytest

import tapvit_jax as tap
from tapvit_jax.convert.timm import save_timm
from tapvit_jax.export.runtime import OnnxModel
from tapvit_jax.export.stablehlo import load_stablehlo
from tapvit_jax.models.backbone import init
from tapvit_jax.progress import Step
from tapvit_jax.prune.latency import LatencyModel
from tests.test_cli import call, work  # noqa: F401 (a fixture)

ARGUMENTS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 3,
    "depth": 2,
    "num_heads": 2,
    "embed_dim": 16,
    "crop_pct": 1.0,
    "mean": [0.3],
    "std": [0.4],
}


@pytest.fixture(scope="module")
def preset(work, tmp_path_factory):  # noqa: F811
    """Options that name the dense model as a preset with weights."""
    folder = tmp_path_factory.mktemp("weights")
    dense = tap.load(work / "dense")
    save_timm(folder / "model.safetensors", dense.config, dense.params)
    (folder / "classes.txt").write_text("0\n1\n2\n")
    options = ["--model", "vit_tiny_patch16_224", "--weights", folder / "model.safetensors"]
    options += ["--classes", folder / "classes.txt"]
    for name, value in ARGUMENTS.items():
        options += ["--set", f"{name}={json.dumps(value)}"]
    return options


def test_the_whole_cloud_side_from_weights(work, preset, tmp_path, capsys):  # noqa: F811
    call("extractor", *preset, "--pool", work / "pool", "--out", tmp_path / "extractor")
    call("device-fit", "--extractor", tmp_path / "extractor", "--images", work / "private",
         "--components", "1-3", "--out", tmp_path / "device.gmm")  # fmt: skip
    # No extractor is given: the payload's is the default one of this model and pool.
    call("prune", *preset, "--payload", tmp_path / "device.gmm", "--pool", work / "pool",
         "--budget", "macs=0.6,activation_bytes=0.9", "--round-to", "mlp=8,qk=2,vo=2",
         "--count", "32", "--recover-epochs", "1", "--out", tmp_path / "small")  # fmt: skip
    captured = capsys.readouterr()
    assert "score units and layers" in captured.err
    assert "% dense," in captured.out
    assert "% pruned" in captured.out
    small, dense = tap.load(tmp_path / "small"), tap.load(work / "dense")
    found, full = tap.cost(small.config), tap.cost(dense.config)
    assert found.macs <= 0.6 * full.macs
    assert found.activation_bytes <= 0.9 * full.activation_bytes
    assert all(block.mlp_dim % 8 == 0 for block in small.config.blocks)
    assert small.history["weights"]["file"] == "model.safetensors"
    with pytest.raises(tap.InputError, match="without --extractor, the extractor is the default"):
        call("prune", *preset, "--payload", work / "device.gmm", "--pool", work / "pool",
             "--budget", "macs=0.6", "--out", tmp_path / "other")  # fmt: skip


def test_evaluating_a_preset(work, preset, capsys):  # noqa: F811
    call("evaluate", *preset, "--images", work / "private")
    from_weights = capsys.readouterr().out
    call("evaluate", "--model", work / "dense", "--images", work / "private")
    assert capsys.readouterr().out == from_weights


@pytest.mark.parametrize("shown", ["1,2", "[1, 2]"])
def test_lists_are_arguments_with_or_without_brackets(tmp_path, shown):
    from tapvit_jax.models.presets import create

    arguments = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8,
                 "num_classes": 3}  # fmt: skip
    config, _ = create("swin_tiny_patch4_window7_224", **arguments, depths=(1, 2), num_heads=(1, 2))
    save_timm(tmp_path / "swin.safetensors", config, init(config, jax.random.key(0)))
    sets = [f"{name}={value}" for name, value in arguments.items()]
    sets += [f"depths={shown}", f"num_heads={shown}"]
    call("convert", "--preset", "swin_tiny_patch4_window7_224", "--weights",
         tmp_path / "swin.safetensors", "--out", tmp_path / "swin",
         *(part for text in sets for part in ("--set", text)))  # fmt: skip
    assert tap.load(tmp_path / "swin").config == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_tiny_patch16_224"], "no such directory; a preset's name needs --weights"),
        (["--model", "{dense}", "--set", "depth=2"], "describe --weights, which is not given"),
        (["--model", "vit_tiny", "--weights", "x.safetensors"], "unknown model 'vit_tiny'"),
        (["--model", "vit_tiny_patch16_224", "--weights", "x.npz"], "ends in '.npz'"),
    ],
)
def test_bad_models_are_refused(work, options, message):  # noqa: F811
    options = [option.format(dense=work / "dense") for option in options]
    if "x.npz" in options:
        (work / "x.npz").write_bytes(b"PK")
        options = [str(work / "x.npz") if option == "x.npz" else option for option in options]
    elif "x.safetensors" in options:
        (work / "x.safetensors").write_bytes(b"0")
        options = [o.replace("x.safetensors", str(work / "x.safetensors")) for o in options]
    with pytest.raises(tap.InputError, match=message):
        call("evaluate", *options, "--images", work / "private")


def test_bad_class_names_are_refused(work, preset, tmp_path):  # noqa: F811
    cases = {
        b"0\n1\n": "2 names, expected 3",
        b"0\n1\n\xe9\n": "is not a text file in UTF-8",
    }
    for content, message in cases.items():
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(tap.InputError, match=rf"classes\.txt: {message}"):
            call("evaluate", *preset, "--classes", tmp_path / "classes.txt",
                 "--images", work / "private")  # fmt: skip
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbf0\n1\n2\n")
    call("evaluate", *preset, "--classes", tmp_path / "classes.txt",
         "--images", work / "private")  # fmt: skip


def test_exports(work, tmp_path, capsys):  # noqa: F811
    dense = tap.load(work / "dense")
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype(np.float32)
    for precision in ("float32", "float16", "int8"):
        path = tmp_path / f"{precision}.onnx"
        call("export", work / "dense", "--format", "onnx", "--precision", precision,
             "--images", work / "private", "--out", path)  # fmt: skip
        assert "top-1 on" in capsys.readouterr().out
        call("evaluate", "--model", path, "--images", work / "private")
        top1 = json.loads(path.with_name(path.name + ".json").read_text())["check"]["accuracy"]
        assert f"top-1 {100 * top1['artefact']:.2f} %," in capsys.readouterr().out
        difference = np.abs(OnnxModel(path)(images) - dense.apply(images)).max()
        assert difference < {"float32": 1e-4, "float16": 0.05, "int8": np.inf}[precision]
        spec = json.loads(path.with_name(path.name + ".json").read_text())
        accuracy = spec["check"]["accuracy"]
        assert accuracy["model"] is not None
        assert accuracy["agreement"] > {"float32": 0.999, "float16": 0.98, "int8": 0.6}[precision]
    call("export", work / "dense", "--format", "stablehlo", "--images", work / "private",
         "--out", tmp_path / "model.hlo")  # fmt: skip
    run = load_stablehlo(tmp_path / "model.hlo")
    np.testing.assert_allclose(run(images), dense.apply(images), atol=1e-5)
    call("export", work / "dense", "--format", "timm", "--images", work / "private",
         "--out", tmp_path / "timm")  # fmt: skip
    assert "local-dir:" in capsys.readouterr().out
    assert (tmp_path / "timm" / "config.json").is_file()


def test_bad_exports_leave_nothing(work, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    with pytest.raises(tap.InputError, match="checked on real images: give --images"):
        call("export", work / "dense", "--format", "onnx", "--out", out)
    cases = {
        ("stablehlo", "int8"): "int8 is for onnx, --format is stablehlo",
        ("timm", "int8"): "int8 is for onnx, --format is timm",
        ("timm", "float16"): "float16 is for onnx and stablehlo, --format is timm",
    }
    for (format, precision), message in cases.items():
        with pytest.raises(tap.InputError, match=message):
            call("export", work / "dense", "--format", format, "--precision", precision,
                 "--images", "nowhere", "--out", out)  # fmt: skip
    with pytest.raises(tap.InputError, match="--opset is for onnx, --format is stablehlo"):
        call("export", work / "dense", "--format", "stablehlo", "--opset", "21", "--out", out)
    with pytest.raises(tap.InputError, match="no such file"):
        call("export", tmp_path / "nothing", "--format", "timm", "--images", "nowhere",
             "--out", out)  # fmt: skip
    with pytest.raises(tap.InputError, match="give --images"):
        call("export", tmp_path / "nothing", "--format", "timm", "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_latency_is_measured_fitted_and_kept(work, tmp_path, capsys):  # noqa: F811
    table = tmp_path / "latency.json"
    call("bench-latency", "--model", work / "dense", "--batch", "2", "--repeats", "3",
         "--threads", "1", "--fit", "5", "--out", table)  # fmt: skip
    printed = capsys.readouterr().out
    assert "ratio 1.000" in printed
    assert "6 measurements; predictions of left-out ones are off by" in printed
    assert LatencyModel.load(table).batch_size == 2
    # Twice the dense time is always met, whatever the machine does meanwhile.
    slow = 2 * max(time for _, time in LatencyModel.load(table).measured)
    call("prune", "--model", work / "dense", "--payload", work / "device.gmm", "--extractor",
         work / "extractor", "--pool", work / "pool", "--latency-table", table, "--budget",
         f"latency_ms={100 * slow},macs=0.6", "--count", "32", "--recover-epochs", "0",
         "--prior", "dense", "--out", tmp_path / "small")  # fmt: skip
    assert tap.load(tmp_path / "small").history["recovered"]["prior"] == "dense"
    assert "ONNX Runtime, batch 2, 1 threads:" in capsys.readouterr().out
    measured = tap.load(tmp_path / "small").history["latency"]
    assert measured["pruned_ms"] <= measured["limit_ms"]
    with pytest.raises(tap.InputError, match="needs a latency model"):
        call("prune", "--model", work / "dense", "--payload", work / "device.gmm", "--pool",
             "nowhere", "--budget", "latency=0.5", "--out", tmp_path / "other")  # fmt: skip
    with pytest.raises(tap.InputError, match="--fit needs --out"):
        call("bench-latency", "--model", work / "dense", "--fit", "5")


def test_exported_files_are_evaluated_and_timed_as_their_models(
    work,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    path, printed, shares = tmp_path / "dense.onnx", [], []
    with monkeypatch.context() as patch:
        patch.setattr(Step, "advance", lambda step, share: shares.append(share))
        call("export", work / "dense", "--format", "onnx", "--images", work / "private",
             "--out", path)  # fmt: skip
        np.testing.assert_allclose(sum(shares), 1.0)
        shares.clear()
        for model in (work / "dense", path):
            capsys.readouterr()
            call("evaluate", "--model", model, "--images", work / "private")
            printed.append(capsys.readouterr().out)
            np.testing.assert_allclose(sum(shares), len(printed))
    assert printed[0] == printed[1]
    call("bench-latency", "--model", path, "--pruned", work / "dense", "--batch", "1",
         "--repeats", "3", "--threads", "1")  # fmt: skip
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"batch 1, 1 threads, {name}" for name in (path, work / "dense")
    ]
    with pytest.raises(tap.InputError, match="--fit prunes the model"):
        call("bench-latency", "--model", path, "--fit", "3", "--out", tmp_path / "table.json")
    with pytest.raises(tap.InputError, match=r"nothing\.onnx: no such file"):
        call("bench-latency", "--model", path, "--pruned", tmp_path / "nothing.onnx")


def test_threads_are_as_many_as_machines_have(work):  # noqa: F811
    for threads in (0, 10**12):
        with pytest.raises(tap.InputError, match=f"--threads is {threads}, expected 1 to 1024"):
            call("bench-latency", "--model", work / "dense", "--threads", threads)
    with pytest.raises(tap.InputError, match="--round-to is 0, expected 1 or more"):
        call("bench-latency", "--model", work / "dense", "--round-to", "0")
