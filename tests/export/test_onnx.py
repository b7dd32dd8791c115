"""ONNX files give the model's logits, without JAX, and only whole files get a name."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import onnx
import pytest

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.export import check, latency
from tapvit_jax.export import onnx as exporter
from tapvit_jax.export.onnx import export_onnx, write_onnx
from tapvit_jax.export.runtime import OnnxModel, evaluate_onnx, measure_latency
from tapvit_jax.files import file_hash
from tapvit_jax.models import backbone
from tapvit_jax.models.registry import Model
from tapvit_jax.models.resnet import ResNetConfig, init
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.mask import Plan
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.prune.units import unit_table
from tests.conftest import realistic

PREPROCESS = Preprocess(8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def random_pruning(model, seed):
    """Uneven widths, whole heads and branches gone, queries and values of different widths."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in unit_table(model.config):
        if group.kind.endswith("branch"):
            keep[group.key] = np.array(rng.random() < 0.85)
        elif group.kind == "head":
            keep[group.key] = rng.permutation(group.size) < rng.integers(1, group.size + 1)
        else:
            count = rng.integers(1, group.shape[-1] + 1)
            rows = [rng.permutation(group.shape[-1]) < count for _ in range(group.size)]
            mask = np.array(rows[: group.shape[0]]) if group.kind != "mlp" else rows[0]
            keep[group.key] = mask
    return reshape(model, Plan(model.config, keep))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", ["tiny_model", "swin_model"])
def test_random_pruned_shapes(request, images, tmp_path, family, seed):
    small = random_pruning(request.getfixturevalue(family), seed)
    report = export_onnx(small, tmp_path / "model.onnx", images=images)
    assert report.difference <= 1e-4
    run = OnnxModel(tmp_path / "model.onnx")
    for size in (1, 3, 16):
        batch = np.random.default_rng(size).standard_normal((size, 8, 8, 3)).astype(np.float32)
        np.testing.assert_allclose(run(batch), small.apply(batch), atol=1e-4)


@pytest.mark.parametrize("family", ["tiny_model", "swin_model"])
def test_branches_without_units_still_add_their_bias(request, images, tmp_path, family):
    model = request.getfixturevalue(family)
    nothing = {
        group.key: np.zeros(group.shape, bool)
        for group in unit_table(model.config)
        if (group.block, group.kind) in ((0, "mlp"), (0, "qk"), (1, "vo"))
    }
    small = reshape(model, Plan(model.config, nothing))
    assert small.config.blocks[0].mlp_dim == small.config.blocks[1].num_heads == 0
    for precision in ("float32", "float16"):
        path = tmp_path / "model.onnx"
        report = export_onnx(small, path, images=images, precision=precision)
        assert report.difference <= {"float32": 1e-4, "float16": 0.02 * report.scale}[precision]


@pytest.mark.parametrize("fields", [{"pool": "mean"}, {"distilled": True}, {"layer_scale": True}])
def test_other_heads(tiny_config, images, tmp_path, fields):
    config = dataclasses.replace(tiny_config, **fields)
    model = Model(config, realistic(backbone.init(config, jax.random.key(0))))
    assert export_onnx(model, tmp_path / "model.onnx", images=images).difference <= 1e-4


def test_a_resnet(tmp_path):
    config = ResNetConfig(image_size=32, num_classes=4, bottleneck=True, depths=(1, 1), width=4)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    model = Model(config, init(config, jax.random.key(0)))
    assert export_onnx(model, tmp_path / "model.onnx", images=images).difference <= 1e-4


def test_it_runs_where_there_is_no_jax(tiny_model, images, tmp_path):
    export_onnx(tiny_model, tmp_path / "model.onnx", images=images)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import sys\n"
        "for name in ('jax', 'flax', 'tapvit_jax'): sys.modules[name] = None\n"
        "import numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession('model.onnx')\n"
        "logits = session.run(['logits'], {'images': np.load('images.npy')})[0]\n"
        "np.save('logits.npy', logits)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), tiny_model.apply(images), atol=1e-4
    )


def batches_of(images, labels):
    # The last row is padding, with a label that would count as wrong.
    mask = np.ones(len(images), np.float32)
    mask[-1] = 0
    return [{"image": images, "label": labels, "mask": mask}] * 2


def test_the_record_says_what_an_engineer_needs(tiny_model, images, tmp_path):
    labels = np.asarray(tiny_model.apply(images)).argmax(axis=1)
    labels[0], labels[-1] = (labels[0] + 1) % 5, -1
    small = random_pruning(tiny_model, 3).replace(
        preprocess=PREPROCESS,
        class_names=tuple("abcde"),
        name="small",
    )
    labelled = np.asarray(small.apply(images)).argmax(axis=1)
    labelled[0], labelled[-1] = (labelled[0] + 1) % 5, 0
    history = {**small.history, "weights": {"sha256": "0" * 64}}
    path = tmp_path / "model.onnx"
    report = export_onnx(
        small.replace(history=history),
        path,
        images=images,
        batches=lambda: batches_of(images, labelled),
    )
    spec = json.loads((tmp_path / "model.onnx.json").read_text())
    assert spec["sha256"] == file_hash(path)
    assert spec["bytes"] == path.stat().st_size == report.bytes
    assert spec["input"]["shape"] == ["batch", 8, 8, 3]
    assert spec["preprocess"]["mean"] == [0.1, 0.2, 0.3]
    assert spec["class_names"] == list("abcde")
    assert spec["kept"] == small.history["kept"]
    assert spec["source"] == {"sha256": "0" * 64}
    assert [b["mlp_dim"] for b in spec["config"]["blocks"]] == [
        block.mlp_dim for block in small.config.blocks
    ]
    assert {"jax", "onnxruntime", "jax2onnx"} <= spec["libraries"].keys()
    accuracy = spec["check"]["accuracy"]
    assert accuracy == {"images": 10, "model": 0.8, "artefact": 0.8, "agreement": 1.0}
    assert "top-1 on 10 images: 80.00 % in JAX, 80.00 % as exported" in str(report)
    carried = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(carried["class_names"]) == list("abcde")
    assert json.loads(carried["preprocess"])["std"] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_files_ask_no_more_of_the_runtime_than_they_need(tiny_model, images, tmp_path, precision):
    asked, logits = {}, []
    for opset, options in {20: {}, 23: {"opset": 23}}.items():
        path = tmp_path / f"{opset}.onnx"
        export_onnx(tiny_model, path, images=images, precision=precision, **options)
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
        asked[graph.opset_import[0].version] = graph.ir_version
        assert json.loads(path.with_name(path.name + ".json").read_text())["opset"] == opset
        logits.append(OnnxModel(path)(images))
    # ONNX Runtime 1.17, the first that knows Gelu, reads files of version 9 at most.
    assert asked == {20: 9, 23: 11}
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("family", ["tiny_model", "swin_model"])
def test_softmax_and_gelu_are_nodes_that_runtimes_know(request, images, tmp_path, family):
    model = request.getfixturevalue(family)
    export_onnx(model, tmp_path / "model.onnx", images=images)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    found = [kinds.count(kind) for kind in ("Softmax", "Gelu", "Exp", "Erf")]
    assert found == [len(model.config.blocks), len(model.config.blocks), 0, 0]


@pytest.mark.parametrize("opset", [19, 24])
def test_other_opsets_are_refused(tiny_model, images, tmp_path, opset):
    with pytest.raises(InputError, match=f"opset is {opset}, expected 20 to 23"):
        export_onnx(tiny_model, tmp_path / "model.onnx", images=images, opset=opset)
    assert_nothing_left(tmp_path)


@pytest.fixture(scope="module")
def wide_model():
    """Wide enough that weights outweigh the graph."""
    config = vit_config(
        image_size=8, patch_size=4, num_classes=5, depth=1, num_heads=4, embed_dim=128
    )
    return Model(config, realistic(backbone.init(config, jax.random.key(0))))


def test_float16_is_half_the_size_and_close(wide_model, images, tmp_path):
    full = export_onnx(wide_model, tmp_path / "full.onnx", images=images)
    half = export_onnx(wide_model, tmp_path / "half.onnx", images=images, precision="float16")
    assert 0.45 * full.bytes < half.bytes < 0.6 * full.bytes
    assert 0 < half.difference < 0.02 * half.scale
    graph = onnx.load(tmp_path / "half.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Gemm", "Conv")]
    assert all(kinds[node.input[1]] == onnx.TensorProto.FLOAT16 for node in products)
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert norms
    assert all(kinds[node.input[1]] == onnx.TensorProto.FLOAT for node in norms)


def test_int8_is_a_third_of_the_size_and_its_agreement_is_measured(wide_model, images, tmp_path):
    unknown = np.full(len(images), -1)
    full = export_onnx(wide_model, tmp_path / "full.onnx", images=images)
    report = export_onnx(
        wide_model,
        tmp_path / "int8.onnx",
        images=images,
        precision="int8",
        batches=lambda: batches_of(images, unknown),
    )
    assert report.bytes < 0.4 * full.bytes
    assert report.tolerance is None
    assert report.accuracy.model is None
    assert report.accuracy.agreement > 0.7
    assert 0 < report.difference < 0.5 * report.scale
    assert "same class on" in str(report)


def assert_nothing_left(folder):
    assert list(folder.iterdir()) == []


def test_a_failed_check_leaves_nothing(tiny_model, images, tmp_path, monkeypatch):
    other = random_pruning(tiny_model, 1)
    compare = check.check_artefact
    monkeypatch.setattr(check, "check_artefact", lambda m, *rest: compare(other, *rest))
    with pytest.raises(InputError, match=r"model.onnx: not written: its logits differ"):
        export_onnx(tiny_model, tmp_path / "model.onnx", images=images)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "float64"},
            "precision is 'float64', expected one of float32, float16, int8",
        ),
        ({"tolerance": np.inf}, "tolerance is inf, expected a finite number"),
        ({"images": np.zeros((2, 9, 9, 3), np.float32)}, r"images have shape \(2, 9, 9, 3\)"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "images have dtype uint8, expected floats"),
        ({"images": []}, "no images to check it on"),
    ],
)
def test_what_an_export_cannot_be_checked_with_is_refused(tiny_model, tmp_path, changes, message):
    options = {"images": np.zeros((2, 8, 8, 3), np.float32)} | changes
    with pytest.raises(InputError, match=message):
        export_onnx(tiny_model, tmp_path / "model.onnx", **options)
    assert_nothing_left(tmp_path)


def test_images_may_be_a_list(tiny_model, images, tmp_path):
    report = export_onnx(tiny_model, tmp_path / "model.onnx", images=list(images))
    assert report.images == len(images)


def test_a_failed_check_keeps_what_stood_there(tiny_model, images, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(tiny_model, path, images=images)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="expected at most -1 of their scale"):
        export_onnx(random_pruning(tiny_model, 0), path, images=images, tolerance=-1.0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_logits_that_are_not_finite_are_refused(tiny_model, images, tmp_path):
    params = {**tiny_model.params, "head": {"kernel": np.full((16, 5), np.inf, np.float32),
                                            "bias": np.zeros(5, np.float32)}}  # fmt: skip
    with pytest.raises(InputError, match="not all of them finite"):
        export_onnx(tiny_model.replace(params=params), tmp_path / "model.onnx", images=images)
    assert_nothing_left(tmp_path)


def test_what_cannot_be_exported_is_said(tiny_model, images, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no images to check it on"):
        export_onnx(tiny_model, tmp_path / "model.onnx", images=images[:0])
    monkeypatch.setattr(exporter, "_MOST_BYTES", 1000)
    with pytest.raises(InputError, match="bytes of parameters, expected at most 1,000"):
        export_onnx(tiny_model, tmp_path / "model.onnx", images=images)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("flax.nnx", r"needs flax.nnx, which flax [\d.]+ cannot import beside jax [\d.]+"),
        ("jax2onnx", r"needs jax2onnx, which cannot be imported beside jax [\d.]+, flax .*orbax"),
    ],
)
def test_versions_that_do_not_go_together_are_named(
    tiny_model, images, tmp_path, monkeypatch, module, message
):
    # As when its import fails because what it is built on has moved on.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=message):
        export_onnx(tiny_model, tmp_path / "model.onnx", images=images)
    assert_nothing_left(tmp_path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"model.onnx: ONNX Runtime cannot load it"):
        OnnxModel(path)


def foreign(path, **changes):
    """A file that says of its one node what an exporter would, but for the changes."""
    found = {
        "inputs": [("images", onnx.TensorProto.FLOAT, ["b", 8, 8, 3])],
        "outputs": [("logits", onnx.TensorProto.FLOAT, ["b", 5])],
        "axes": [1, 2],
        "weights": np.ones((3, 5), np.float32),
    } | changes
    values = [
        [onnx.helper.make_tensor_value_info(*each) for each in found[kind]]
        for kind in ("inputs", "outputs")
    ]
    first, last = found["inputs"][0][0], found["outputs"][0][0]
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("ReduceMean", [first, "axes"], ["mean"], keepdims=0),
            node("MatMul", ["mean", "weights"], [last]),
        ],
        "g",
        *values,
        initializer=[
            onnx.numpy_helper.from_array(np.array(found["axes"], np.int64), "axes"),
            onnx.numpy_helper.from_array(found["weights"], "weights"),
        ],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [("x", 1, ["b", 8, 8, 3])]}, r"takes x tensor\(float\) .*, expected images in"),
        ({"inputs": [("images", 1, ["b", 8, 8, "c"])]}, "takes images .*'c'.*, expected images in"),
        ({"inputs": [("images", 1, ["b", 8, 3])]}, "takes images .*, a batch and 3 sizes"),
        (
            {
                "inputs": [("images", 11, ["b", 8, 8, 3])],
                "outputs": [("logits", 11, ["b", 5])],
                "weights": np.ones((3, 5)),
            },
            r"takes images tensor\(double\)",
        ),
        ({"inputs": [("images", 1, ["b", 8, 9, 3])]}, r"takes images of shape \(8, 9, 3\), expect"),
        ({"outputs": [("y", 1, ["b", 5])]}, r"gives y tensor\(float\) .*, expected logits in"),
    ],
)
def test_files_of_other_inputs_or_outputs_are_refused(tmp_path, changes, message):
    path = foreign(tmp_path / "model.onnx", **changes)
    with pytest.raises(InputError, match=rf"model\.onnx: {message}"):
        OnnxModel(path)


def test_files_that_fail_when_they_run_are_named(tmp_path):
    model = OnnxModel(foreign(tmp_path / "model.onnx"))
    assert (model.image_shape, model.num_classes) == ((8, 8, 3), 5)
    np.testing.assert_allclose(model(np.ones((2, 8, 8, 3))), np.full((2, 5), 3.0))
    with pytest.raises(InputError, match=r"model\.onnx: ONNX Runtime cannot run it"):
        model(np.ones((2, 9, 9, 3)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "preprocess",
            '{"image_size": 9, "mean": [0], "std": [1], "channels": 1}',
            "prepares .* 9",
        ),
        ("preprocess", "{", "preprocess: is not valid JSON"),
        ("preprocess", "[8]", "preprocess is .*, expected a mapping"),
        ("class_names", '"abc"', "class_names is 'abc', expected a list"),
    ],
)
def test_what_travels_in_a_file_is_checked(tiny_model, tmp_path, key, value, message):
    write_onnx(tiny_model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    carried = {prop.key: prop.value for prop in graph.metadata_props}
    onnx.helper.set_model_props(graph, carried | {key: value})
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=rf"model\.onnx: {message}"):
        OnnxModel(tmp_path / "model.onnx")


def test_a_file_that_does_not_say_how_images_are_prepared_is_not_evaluated(tiny_model, tmp_path):
    write_onnx(tiny_model.replace(preprocess=None, name="small"), tmp_path / "model.onnx")
    source = MemorySource(np.zeros((2, 8, 8, 3)), np.array([0, 1]), tuple("abcde"))
    with pytest.raises(InputError, match="small: does not say how its images are prepared"):
        evaluate_onnx(OnnxModel(tmp_path / "model.onnx"), source, np.arange(2))


def test_latencies_are_measured(tiny_model, images, tmp_path):
    export_onnx(tiny_model, tmp_path / "model.onnx", images=images)
    model = OnnxModel(tmp_path / "model.onnx", threads=1)
    found = measure_latency({"a": model, "b": model}, batch_size=2, repeats=3)
    assert found.keys() == {"a", "b"}
    assert all(0 < x.low <= x.median <= x.high for x in found.values())
    with pytest.raises(InputError, match="repeats is 0"):
        measure_latency({"a": model}, repeats=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2}, "count is 2, expected 3 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"round_to": 0}, "round_to is 0"),
        ({"dense": ResNetConfig(32, 4, True, (1, 1))}, "expected a ViT or a Swin"),
    ],
)
def test_a_latency_model_is_refused_before_anything_is_measured(
    tiny_config, monkeypatch, change, message
):
    # The first thing that takes time.
    monkeypatch.delattr(latency, "load_models")
    options = {"dense": tiny_config, "count": 3, "batch_size": 1, "threads": 1}
    with pytest.raises(InputError, match=message):
        latency.measure_latency_model(**options | change)
