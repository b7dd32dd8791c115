"""Models as serialised StableHLO (jax.export): one file that JAX runs on CPU, GPU and TPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.export.check import Batches, Precision, Report, traced_model, write_artefact
from tapvit_jax.models.registry import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    model: Model,
    path: str | os.PathLike,
    *,
    images: Float[np.ndarray, "n s s ch"],
    precision: Precision = "float32",
    batches: Batches | None = None,
    tolerance: float | None = None,
) -> Report:
    """Write a model, parameters included, as StableHLO with a symbolic batch, and PATH.json.

    Args:
      model: what to export.
      path: the file; what stands there is replaced.
      images: preprocessed real images for the check.
      precision: float32 or float16.
      batches: makes batches of "image", "label" and "mask" to measure accuracy on.
      tolerance: see `export_onnx`.

    Raises:
      InputError: int8, a failed check, or a path that cannot be written; nothing is left behind.

    Source: jax.export; the checks are ours.
    """
    if precision == "int8":
        raise InputError("int8 is for ONNX, expected float32 or float16")
    forward, _ = traced_model(model, precision)
    config = model.config
    size, side = jax.export.symbolic_shape("b")[0], config.image_size
    struct = jax.ShapeDtypeStruct((size, side, side, config.in_channels), jnp.float32)
    limit = jax.config.jax_traceback_in_locations_limit
    # Else the file names every source line of this machine that it was traced from.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        # Else accelerators round what float32 products multiply to fewer digits.
        with jax.default_matmul_precision("highest" if precision == "float32" else None):
            exported = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(struct)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    return write_artefact(
        model,
        Path(path),
        kind="stablehlo",
        write=lambda partial: partial.write_bytes(exported.serialize()),
        load=load_stablehlo,
        images=images,
        precision=precision,
        batches=batches,
        tolerance=tolerance,
        platforms=list(PLATFORMS),
        calling_convention=exported.calling_convention_version,
    )


def load_stablehlo(path: str | os.PathLike) -> Callable[[Any], Any]:
    """Read a file of `export_stablehlo`; the result maps images (b, s, s, ch) to logits (b, c).

    Raises:
      InputError: missing, or no serialised StableHLO.

    Source: jax.export.
    """
    return jax.jit(read_stablehlo(path).call)


def read_stablehlo(path: str | os.PathLike) -> jax.export.Exported:
    """What `load_stablehlo` calls, with the shapes and platforms that it is for.

    Raises:
      InputError: missing, or no serialised StableHLO.

    Source: jax.export.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        found = jax.export.deserialize(bytearray(path.read_bytes()))
        # Its module is only read where it is called.
        sizes = [[d if type(d) is int else 1 for d in aval.shape] for aval in found.in_avals]
        structs = map(jax.ShapeDtypeStruct, sizes, [aval.dtype for aval in found.in_avals])
        jax.jit(found.call).trace(*structs).lower(lowering_platforms=found.platforms[:1])
        return found
    except Exception as error:
        # A damaged buffer makes the reader raise nearly anything.
        raise InputError(f"{path}: is no serialised StableHLO ({type(error).__name__})") from error
