"""What every artefact must pass before it gets its name, and the record that stands beside it."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file, file_hash, write_json
from tapvit_jax.models.backbone import (
    CLASSIFIERS,
    Config,
    TransformerConfig,
    apply,
    family,
    param_shapes,
)
from tapvit_jax.models.layers import check_images
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.structs import to_plain
from tapvit_jax.versions import library_versions

FORMAT = "tapvit-artefact"
VERSION = 1
BATCH_SIZES = (1, 3, 16)

Precision = Literal["float32", "float16", "int8"]
Run = Callable[[Float[np.ndarray, "b s s ch"]], Float[np.ndarray, "b c"]]
Batches = Callable[[], Iterable[dict[str, np.ndarray]]]

# Relative to the logits' scale. What int8 does to accuracy is measured, not bounded.
TOLERANCES: dict[str, float | None] = {"float32": 1e-4, "float16": 2e-2, "int8": None}


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often the model and its artefact are right, and how often they agree.

    Attributes:
      images: how many were looked at.
      model: top-1 of the model in JAX; None without labels.
      artefact: top-1 of the artefact; None without labels.
      agreement: share of images that both give the same class.
    """

    images: int
    model: float | None
    artefact: float | None
    agreement: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written, and how far it is from the model in JAX.

    Attributes:
      file: name of the artefact.
      bytes: its size.
      difference: largest absolute difference of logits.
      scale: largest absolute logit, at least 1.
      tolerance: what the difference was allowed to be, relative to the scale; None if anything.
      images: real images it was checked on, in batches of 1, 3 and 16.
      accuracy: on the images given for it; None without any.
    """

    file: str
    bytes: int
    difference: float
    scale: float
    tolerance: float | None
    images: int
    accuracy: Accuracy | None

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.bytes:,} bytes, logits differ by {self.difference:.1e} at most "
            f"({self.difference / self.scale:.1e} of their scale) on {self.images} images"
        ]
        found = self.accuracy
        if found is not None and found.model is not None:
            lines.append(
                f"top-1 on {found.images} images: {100 * found.model:.2f} % in JAX, "
                f"{100 * found.artefact:.2f} % as exported"
            )
        if found is not None:
            lines.append(f"same class on {100 * found.agreement:.2f} % of {found.images} images")
        return "\n".join(lines)


def traced_model(
    model: Model, precision: Precision, *, standard_ops: bool = False
) -> tuple[Callable, Params]:
    """The function to export and its parameters, at the artefact's precision.

    In float16 the matrix products and their parameters are float16; the residual stream,
    normalisation, softmax and the classifier stay in float32.
    """
    config, params = _without_empty_widths(model.config, model.params)
    if precision != "float16":
        config = dataclasses.replace(config, dtype="float32")
    else:
        config, params = dataclasses.replace(config, dtype="float16"), _halved(params)
    # A copy on the host: exporters turn parameters into constants one by one.
    params = jax.tree.map(np.asarray, params)
    return (lambda images: apply(config, params, images, standard_ops=standard_ops)), params


def _without_empty_widths(config: Config, params: Params) -> tuple[Config, Params]:
    """The same network with one unit of zeros wherever a branch has none.

    ONNX Runtime refuses matrices without entries. A branch without units still adds its bias.
    """
    if not isinstance(config, TransformerConfig):
        return config, params
    blocks = []
    for block in config.blocks:
        widths = ("num_heads", "qk_dim", "v_dim") if block.attn else ()
        widths += ("mlp_dim",) if block.mlp else ()
        blocks.append(
            dataclasses.replace(block, **{name: max(1, getattr(block, name)) for name in widths})
        )
    padded = dataclasses.replace(config, blocks=tuple(blocks))
    if padded == config:
        return config, params
    leaves = flatten(params)
    for path, wanted in flatten(param_shapes(padded)).items():
        missing = [(0, n - m) for n, m in zip(wanted.shape, leaves[path].shape, strict=True)]
        leaves[path] = np.pad(np.asarray(leaves[path]), missing)
    return padded, unflatten(leaves)


def _halved(params: Params) -> Params:
    leaves = flatten(params)
    layers = {path[:-1] for path in leaves if path[-1] == "kernel" and path[0] not in CLASSIFIERS}
    return unflatten(
        {
            path: leaf.astype(jnp.float16) if path[:-1] in layers else leaf
            for path, leaf in leaves.items()
        }
    )


def write_artefact(
    model: Model,
    path: Path,
    *,
    kind: str,
    write: Callable[[Path], None],
    load: Callable[[Path], Run],
    images: Float[np.ndarray, "n s s ch"],
    precision: Precision,
    batches: Batches | None,
    tolerance: float | None,
    **more: Any,
) -> Report:
    """Write an artefact and its record under temporary names, check it, then give both their names.

    Args:
      model: what is exported.
      path: name of the artefact; its record stands at `spec_path(path)`.
      kind: "onnx" or "stablehlo".
      write: writes the artefact to a path.
      load: makes it ready to run, from a path.
      images: see `check_artefact`.
      precision: of the weights.
      batches: makes batches to measure accuracy on, see `measure_accuracy`.
      tolerance: see `check_artefact`; None for the precision's usual one.
      **more: what only this kind of artefact records.

    Raises:
      InputError: a failed check, or a path that cannot be written; nothing is left behind.
    """
    images = check_export(model, images, precision, tolerance)
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    with atomic_file(path) as partial, atomic_file(spec_path(path)) as partial_spec:
        write(partial)
        run = load(partial)
        difference, scale = check_artefact(model, run, images, tolerance, str(path))
        report = Report(
            file=path.name,
            bytes=partial.stat().st_size,
            difference=difference,
            scale=scale,
            tolerance=tolerance,
            images=min(len(images), max(BATCH_SIZES)),
            accuracy=None if batches is None else measure_accuracy(model, run, batches()),
        )
        spec = artefact_spec(model, kind, precision, report, partial, **more)
        write_json(partial_spec, spec)
    return report


def check_export(
    model: Model,
    images: Float[np.ndarray, "n s s ch"],
    precision: Precision,
    tolerance: float | None,
) -> Float[np.ndarray, "n s s ch"]:
    """Refuse, before anything takes time, what an export cannot be checked with.

    Returns:
      The images in float32.

    Raises:
      InputError: an unknown precision, a tolerance that is no number, or no images of the model's.
    """
    if precision not in TOLERANCES:
        raise InputError(f"precision is {precision!r}, expected one of {', '.join(TOLERANCES)}")
    if tolerance is not None and not math.isfinite(tolerance):
        raise InputError(f"tolerance is {tolerance}, expected a finite number, or None")
    images = np.asarray(images)
    if len(images):
        check_images(model.config, images)
    return images.astype(np.float32)


def check_artefact(
    model: Model,
    run: Run,
    images: Float[np.ndarray, "n s s ch"],
    tolerance: float | None,
    name: str,
) -> tuple[float, float]:
    """Compare an artefact with the model in float32 on real images, in batches of several sizes.

    Returns:
      The largest absolute difference of logits, and the logits' scale.

    Raises:
      InputError: no images, logits that are not finite, or a difference above the tolerance.
    """
    if len(images) == 0:
        raise InputError(f"{name}: no images to check it on")
    difference, scale = 0.0, 1.0
    for size in BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        expected, found = exact_logits(model, batch), np.asarray(run(batch))
        if not np.isfinite(expected).all():
            raise InputError(f"{name}: not written: the model's logits are not all of them finite")
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise InputError(
                f"{name}: not written: the exported model gives {found.shape} logits"
                f"{'' if np.isfinite(found).all() else ', not all of them finite'}"
            )
        difference = max(difference, float(np.abs(found - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    if tolerance is not None and not difference <= tolerance * scale:
        raise InputError(
            f"{name}: not written: its logits differ from the model's by {difference:.2e}, "
            f"expected at most {tolerance:g} of their scale {scale:.3g}"
        )
    return difference, scale


def exact_logits(model: Model, images: Float[Array, "b s s ch"]) -> Float[np.ndarray, "b c"]:
    """Logits of a model in float32, in whatever precision it computes otherwise."""
    config = dataclasses.replace(model.config, dtype="float32")
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.replace(config=config).apply(images))


def measure_accuracy(model: Model, run: Run, batches: Iterable[dict[str, np.ndarray]]) -> Accuracy:
    """Compare classes on batches of "image", "label" and "mask"; padding rows do not count.

    Raises:
      InputError: no images.
    """
    count = agree = right = exported_right = 0
    labelled = True
    for batch in batches:
        real = np.asarray(batch["mask"]) > 0
        classes = np.asarray(model.apply(batch["image"])).argmax(axis=-1)[real]
        exported = np.asarray(run(batch["image"])).argmax(axis=-1)[real]
        labels = np.asarray(batch["label"])[real]
        count += int(real.sum())
        agree += int((classes == exported).sum())
        right += int((classes == labels).sum())
        exported_right += int((exported == labels).sum())
        labelled = labelled and bool((labels >= 0).all())
    if count == 0:
        raise InputError("no images to measure accuracy on")
    return Accuracy(
        images=count,
        model=right / count if labelled else None,
        artefact=exported_right / count if labelled else None,
        agreement=agree / count,
    )


def artefact_spec(
    model: Model, kind: str, precision: Precision, report: Report, written: Path, **more: Any
) -> dict[str, Any]:
    """What an engineer must know to use an artefact, as JSON values.

    Args:
      model: what was exported.
      kind: "onnx" or "stablehlo".
      precision: of the weights.
      report: how it was checked.
      written: where the artefact stands now, for its checksum.
      **more: what only this kind of artefact has to say.
    """
    config, history = model.config, to_plain(model.history, f"{model.name}: history")
    side = config.image_size
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "precision": precision,
        "file": report.file,
        "sha256": file_hash(written),
        "bytes": report.bytes,
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", side, side, config.in_channels],
            "layout": "NHWC",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", config.num_classes]},
        "preprocess": to_plain(model.preprocess),
        "class_names": list(model.class_names),
        "model": model.name,
        "architecture": model.architecture,
        "prior": model.prior,
        "family": family(config),
        "config": to_plain(config),
        "kept": history.pop("kept", None),
        "source": history.pop("weights", None),
        "history": history,
        "gelu": "exact (erf)",
        "check": dataclasses.asdict(report),
        "libraries": library_versions(),
        **more,
    }


def spec_path(path: str | os.PathLike) -> Path:
    """Where an artefact's record stands."""
    path = Path(path)
    return path.with_name(path.name + ".json")
