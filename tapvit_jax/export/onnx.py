"""Models as ONNX files, checked in ONNX Runtime before they get their name."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import onnx
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.export.check import Batches, Precision, Report, traced_model, write_artefact
from tapvit_jax.export.runtime import INPUT, OUTPUT, OnnxModel
from tapvit_jax.models.registry import Model
from tapvit_jax.structs import to_plain

OPSETS = range(20, 24)
"""What files may ask of the runtime: Gelu came with 20, and jax2onnx writes 23 at most."""
OPSET = OPSETS[0]
_HALVED = ("Conv", "Gemm", "MatMul")
# A protobuf message holds two GiB at most; some room for the graph.
_MOST_BYTES = 2**31 - 2**26


def export_onnx(
    model: Model,
    path: str | os.PathLike,
    *,
    images: Float[np.ndarray, "n s s ch"],
    precision: Precision = "float32",
    batches: Batches | None = None,
    tolerance: float | None = None,
    opset: int = OPSET,
) -> Report:
    """Write a model as ONNX with a symbolic batch, and PATH.json beside it.

    The graph is traced by jax2onnx; int8 quantises its matrix products' weights dynamically with
    ONNX Runtime's quantiser, channel by channel. The file is compared with the model in JAX on real
    images, in batches of 1, 3 and 16, before it gets its name.

    Args:
      model: what to export.
      path: the file; what stands there is replaced.
      images: preprocessed real images for the check.
      precision: of weights and matrix products.
      batches: makes batches of "image", "label" and "mask" to measure accuracy on.
      tolerance: largest difference of logits relative to their scale; by default 1e-4 in float32,
        2e-2 in float16, and anything finite in int8.
      opset: version of the operators, 20 to 23: older runtimes know lower ones, and the nodes are
        the same in all of them.

    Raises:
      InputError: another opset, a failed check, a model too large for one file, a path that cannot
        be written, or versions of JAX and Flax that do not go together; nothing is left behind.

    Source: jax2onnx and ONNX Runtime's quantiser; float16 and the checks are ours.
    """
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
    return write_artefact(
        model,
        Path(path),
        kind="onnx",
        write=lambda partial: write_onnx(model, partial, precision, opset),
        load=OnnxModel,
        images=images,
        precision=precision,
        batches=batches,
        tolerance=tolerance,
        opset=opset,
    )


def write_onnx(
    model: Model, path: Path, precision: Precision = "float32", opset: int = OPSET
) -> None:
    """Write a model as ONNX, unchecked.

    Raises:
      InputError: a model too large for one file.
    """
    graph = _trace(model, opset)
    if precision == "float16":
        graph = _halve(graph)
    if precision == "int8":
        _quantise(graph, path)
    else:
        onnx.save_model(graph, path)


def _trace(model: Model, opset: int) -> onnx.ModelProto:
    # Imported here: it patches Flax's layers and takes seconds.
    try:
        import flax.nnx  # noqa: F401, what jax2onnx patches
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"ONNX export needs flax.nnx, which flax {version('flax')} cannot import beside jax "
            f"{version('jax')} ({error}): another version of flax may go with it"
        ) from error
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise InputError(
            f"ONNX export needs jax2onnx, which cannot be imported beside jax {version('jax')}, "
            f"flax {version('flax')} and orbax-checkpoint {version('orbax-checkpoint')} ({error})"
        ) from error

    # One node for a softmax or GELU, which runtimes have kernels for.
    forward, params = traced_model(model, "float32", standard_ops=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > _MOST_BYTES:
        raise InputError(
            f"{model.name}: {size:,} bytes of parameters, expected at most {_MOST_BYTES:,} for "
            "one ONNX file: export it as StableHLO"
        )
    config = model.config
    shape = ("batch", config.image_size, config.image_size, config.in_channels)
    with _quiet():
        graph = to_onnx(
            forward,
            [shape],
            opset=opset,
            # One LayerNormalization node instead of nine: faster, and exact where values are large.
            normalization_mode="prefer_native",
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    # Older runtimes refuse a file format that is newer than its operators need.
    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import)
    # What running it takes also travels inside the file.
    carried = {"preprocess": model.preprocess, "class_names": model.class_names}
    carried = {key: json.dumps(to_plain(value)) for key, value in carried.items()}
    onnx.helper.set_model_props(graph, {"name": model.name, **carried})
    return graph


def _halve(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Matrix products and convolutions in float16, their weights stored so; all else in float32.

    Statistics and the residual stream, whose largest channels overflow first, keep their range.
    (ONNX Runtime's own converter passes them through float16 between any two nodes, and names its
    casts twice.)
    """
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes, halved = [], {}
    for node in graph.graph.node:
        if node.op_type not in _HALVED:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name not in halved:
                halved[name] = f"{name}_half"
                if name in weights:
                    array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                    graph.graph.initializer.append(
                        onnx.numpy_helper.from_array(array, halved[name])
                    )
                else:
                    nodes.append(onnx.helper.make_node("Cast", [name], [halved[name]], to=half))
            node.input[i] = halved[name]
        out = node.output[0]
        node.output[0] = f"{out}_of_half"
        nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [out], to=single)]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(kept)
    return graph


def _quantise(graph: onnx.ModelProto, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Seven bits: pairs of products of eight overflow 16-bit sums on CPUs without VNNI.
            reduce_range=True,
            # The patch embedding's convolution stays as it is: few weights, and sensitive ones.
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Both warn of what they do on purpose, such as shapes that stay symbolic.
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "jax2onnx", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
