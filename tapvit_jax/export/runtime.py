"""Running ONNX files in ONNX Runtime: logits, and latencies side by side."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Array, Float, Int

from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models.registry import preprocess_of
from tapvit_jax.structs import from_plain
from tapvit_jax.timing import Latency, take_turns
from tapvit_jax.train.evaluate import Metrics, evaluate

INPUT, OUTPUT = "images", "logits"


class OnnxModel:
    """An ONNX file of ours, ready to run on the CPU.

    Attributes:
      image_shape: side, side and channels of the images it takes.
      name, preprocess, class_names: the model's, which travel in the file.
      num_classes: how many logits it gives.

    Args:
      path: the file.
      threads: of ONNX Runtime; all cores unless given.

    Raises:
      InputError: no ONNX file, or one with other inputs than images, with other outputs than
        logits, or that prepares images of another size than it takes.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        if not os.path.isfile(path):  # noqa: PTH113 (as given)
            raise InputError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # Its threads would go on spinning after a run, and slow down whatever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # The runtime's own errors share no base class.
            raise InputError(f"{path}: ONNX Runtime cannot load it ({_brief(error)})") from error
        self._path = path
        self.image_shape: tuple[int, int, int] = _sizes(
            path, "takes", self._session.get_inputs(), INPUT, 4
        )
        (self.num_classes,) = _sizes(path, "gives", self._session.get_outputs(), OUTPUT, 2)
        if self.image_shape[0] != self.image_shape[1]:
            raise InputError(f"{path}: takes images of shape {self.image_shape}, expected squares")
        carried = self._session.get_modelmeta().custom_metadata_map
        self.name: str = carried.get("name", os.fspath(path))
        self.preprocess: Preprocess | None = _carried(
            path, carried, "preprocess", Preprocess | None, None
        )
        self.class_names: tuple[str, ...] = _carried(
            path, carried, "class_names", tuple[str, ...], []
        )
        prepared = self.preprocess
        if prepared and (*(prepared.image_size,) * 2, prepared.channels) != self.image_shape:
            raise InputError(
                f"{path}: prepares images of {prepared.image_size} pixels and {prepared.channels} "
                f"channels, expected the {self.image_shape} that it takes"
            )

    def __call__(self, images: Float[np.ndarray, "b s s ch"]) -> Float[np.ndarray, "b c"]:
        """Logits of preprocessed images.

        Raises:
          InputError: images of another shape, or a file that cannot be computed after all.
        """
        try:
            return self._session.run([OUTPUT], {INPUT: np.asarray(images, np.float32)})[0]
        except Exception as error:
            raise InputError(
                f"{self._path}: ONNX Runtime cannot run it ({_brief(error)})"
            ) from error


def _brief(error: Exception) -> str:
    return str(error).split("\n")[0][:200]


def _sizes(
    path: str | os.PathLike, verb: str, found: list[Any], name: str, rank: int
) -> tuple[int, ...]:
    """Sizes behind the batch of the only input or output, which must be floats."""
    if [each.name for each in found] == [name] and found[0].type == "tensor(float)":
        sizes = found[0].shape[1:]
        if len(sizes) == rank - 1 and all(type(size) is int and size > 0 for size in sizes):
            return tuple(sizes)
    text = ", ".join(f"{each.name} {each.type} {each.shape}" for each in found)
    raise InputError(
        f"{path}: {verb} {text}, expected {name} in float32, a batch and {rank - 1} sizes"
    )


def _carried(
    path: str | os.PathLike, carried: Mapping[str, str], name: str, kind: Any, missing: Any
) -> Any:
    where = f"{path}: {name}"
    try:
        value = json.loads(carried[name]) if name in carried else missing
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON ({error})") from error
    return from_plain(kind, value, where)


def evaluate_onnx(
    model: OnnxModel,
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    batch_size: int = 32,
    *,
    on_share: Callable[[float], None] = lambda share: None,
) -> Metrics:
    """Top-1 and cross-entropy of an ONNX file on some images of a source.

    `on_share` is called with every share of the work that is done.

    Raises:
      InputError: no images, images without labels, or a file that does not say how they are
        prepared.

    Source: ours.
    """
    preprocess = preprocess_of(model)
    found = batches(source, indices, preprocess, batch_size)
    logits = ({**batch, "image": model(batch["image"])} for batch in found)
    return evaluate(
        None, None, logits, _given, on_batch=lambda count: on_share(count / len(indices))
    )


def _given(config: None, params: None, logits: Float[Array, "b c"]) -> Float[Array, "b c"]:
    return logits


def measure_latency(
    models: Mapping[str, OnnxModel], *, batch_size: int = 1, repeats: int = 40
) -> dict[str, Latency]:
    """Time forward passes of several models side by side, see `take_turns`.

    Raises:
      InputError: no repetition, or an empty batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    rng = np.random.default_rng(0)
    runs = {}
    for name, model in models.items():
        images = rng.standard_normal((batch_size, *model.image_shape)).astype(np.float32)
        runs[name] = functools.partial(model, images)
    return take_turns(runs, repeats=repeats)
