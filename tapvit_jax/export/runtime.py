"""Running ONNX files in ONNX Runtime: logits, and latencies side by side."""

import functools
import os
from collections.abc import Mapping

import numpy as np
import onnxruntime
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.timing import Latency, take_turns

INPUT, OUTPUT = "images", "logits"


class OnnxModel:
    """An ONNX file of ours, ready to run on the CPU.

    Args:
      path: the file.
      threads: of ONNX Runtime; all cores unless given.

    Raises:
      InputError: no ONNX file, or one with other inputs than images.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
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
            reason = str(error).split("\n")[0][:200]
            raise InputError(f"{path}: ONNX Runtime cannot load it ({reason})") from error
        inputs = self._session.get_inputs()
        if [found.name for found in inputs] != [INPUT]:
            names = ", ".join(found.name for found in inputs)
            raise InputError(f"{path}: takes {names}, expected one input {INPUT!r}")
        self.image_shape: tuple[int, int, int] = tuple(inputs[0].shape[1:])

    def __call__(self, images: Float[np.ndarray, "b s s ch"]) -> Float[np.ndarray, "b c"]:
        """Logits of preprocessed images."""
        return self._session.run([OUTPUT], {INPUT: np.asarray(images, np.float32)})[0]


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
