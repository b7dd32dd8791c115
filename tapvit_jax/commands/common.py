"""What several commands share: models and images as arguments, and what is printed of them."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tapvit_jax.convert.timm import load_timm
from tapvit_jax.data.base import UNLABELLED, ImageSource, find_corrupt
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.export import check
from tapvit_jax.export.runtime import OnnxModel
from tapvit_jax.files import check_directory, read_json
from tapvit_jax.models import store
from tapvit_jax.models.registry import Model
from tapvit_jax.progress import Progress
from tapvit_jax.prune import latency
from tapvit_jax.prune.cost import Cost
from tapvit_jax.runtime import one_line

VALIDATION_SHARE = 0.1

SELECTION_FORMAT = "tapvit-selection"

_FORMATS = {
    SELECTION_FORMAT: "a selection",
    latency.FORMAT: "a latency table",
    check.FORMAT: "an artefact's record",
}

# As budgets call them, as far as that can be read.
_COSTS = {
    "params": "parameters",
    "macs": "MACs",
    "encoder_params": "encoder parameters",
    "model_bytes": "model bytes",
    "activation_bytes": "activation bytes",
}

Command = Callable[..., argparse.ArgumentParser]
"""Adds a command: (name, function) to its parser."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A source, and those of its images that a command uses."""

    source: ImageSource
    indices: Int[np.ndarray, "n"]


def open_images(
    source: ImageSource,
    preprocess: Preprocess,
    *,
    split: str | None = None,
    skip_corrupt: bool = False,
) -> Images:
    """The images to use; with `skip_corrupt`, leave out and name those that cannot be read.

    Raises:
      InputError: no image left, or a split that the source does not have.
    """
    indices = np.arange(len(source))
    if split is not None:
        indices = indices[source.splits == split]
        if len(indices) == 0:
            known = ", ".join(sorted(set(source.splits)))
            raise InputError(f"{source.name}: has no split {split!r}, found {known}")
    if skip_corrupt:
        progress = Progress(1.0, lines=False)
        with progress.step(f"look for images of {source.name} that cannot be read", 1) as step:
            bad = find_corrupt(source, indices, preprocess, step.advance)
        progress.close()
        for _, message in bad[:10]:
            print(f"skipped: {one_line(message)}", file=sys.stderr)
        if bad:
            print(f"skipped {len(bad)} of {len(indices)} images", file=sys.stderr)
        indices = np.setdiff1d(indices, [index for index, _ in bad])
        if len(indices) == 0:
            raise InputError(f"{source.name}: no image can be read")
    return Images(source, indices)


def seed(text: str) -> int:
    """A seed, as argparse's type of an option.

    Raises:
      argparse.ArgumentTypeError: not a whole number from 0 to 2^32 - 1.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number from 0 to 2^32 - 1")
    return int(text)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that reads images understands."""
    parser.add_argument("--split", help="use only this split of the images (train, val)")
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out images that cannot be read, and count them",
    )


def add_batch_option(parser: argparse.ArgumentParser) -> None:
    """Add how many images a forward pass takes; None is the function's own choice."""
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images at a time, by default as many as take a few GiB, 256 at most; changes no "
        "result but for rounding",
    )


def add_weights_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options that describe a checkpoint under timm's names."""
    parser.add_argument(
        "--weights",
        required=required,
        help="a .safetensors, .pth or .bin under timm's names, or hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="timm argument, repeatable; lists as 1,2",
    )
    parser.add_argument("--classes", help="a text file with a class name a line")


def add_model_options(parser: argparse.ArgumentParser, *, onnx: bool = False) -> None:
    """Add a model: a directory of ours, or a preset with weights; with `onnx`, or an ONNX file."""
    parser.add_argument(
        "--model",
        required=True,
        help=f"a model's directory, {'an exported .onnx file, ' if onnx else ''}or with --weights "
        "timm's name, such as deit_small_patch16_224",
    )
    add_weights_options(parser)


def open_model(args: argparse.Namespace) -> Model:
    """Load the model that the options name.

    Raises:
      InputError: as `store.load` and `load_timm`, or options that do not belong together.
    """
    if args.weights is not None:
        # Of the commands that know it.
        new = getattr(args, "new_classifier", False)
        return load_preset(args.model, args, new_classifier=new)
    _check_not_described(args)
    return open_directory(args.model)


def open_directory(path: str) -> Model:
    """Load a model's directory.

    Raises:
      InputError: as `store.load`, or the name of a preset.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such directory; a preset's name needs --weights too")
    return store.load(path)


def open_runnable(args: argparse.Namespace, threads: int | None = None) -> Model | OnnxModel:
    """Load the model that the options name, or the ONNX file.

    Raises:
      InputError: as `open_model` and `OnnxModel`.
    """
    if args.weights is not None or not is_onnx(args.model):
        return open_model(args)
    _check_not_described(args)
    return OnnxModel(args.model, threads)


def is_onnx(name: str) -> bool:
    """Whether a name is an ONNX file's."""
    return name.lower().endswith(".onnx")


def _check_not_described(args: argparse.Namespace) -> None:
    if args.set or args.classes:
        raise InputError("--set and --classes describe --weights, which is not given")
    if getattr(args, "new_classifier", False):
        raise InputError("--new-classifier is for --weights, which is not given")


def load_preset(
    name: str, args: argparse.Namespace, *, new_classifier: bool = False, **arguments: Any
) -> Model:
    """Load weights under timm's names into a preset, with more of timm's arguments.

    Raises:
      InputError: as `load_timm`, an option that is no NAME=VALUE, or another number of class names.
    """
    overrides = dict(arguments)
    for item in args.set or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item!r}: expected NAME=VALUE, such as num_classes=40")
        # JSON, a list with or without brackets, or as Python spells constants; else it is text.
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        if key in ("name", "weights", "new_classifier"):
            raise InputError(
                f"--set {item}: is no argument of timm's, expected one such as num_classes=40"
            )
        overrides[key] = value
        for text in (value, f"[{value}]") if "," in value else (value,):
            # Also of too many digits, or nested too deeply.
            with contextlib.suppress(ValueError, RecursionError):
                overrides[key] = json.loads(text)
                break
    model = load_timm(name, args.weights, new_classifier=new_classifier, **overrides)
    if not args.classes:
        return model
    names = [line.strip() for line in read_text(args.classes).splitlines() if line.strip()]
    if len(names) != model.config.num_classes:
        raise InputError(
            f"{args.classes}: {len(names)} names, expected {model.config.num_classes}, "
            "one a class of the model"
        )
    return model.replace(class_names=tuple(names))


def labels_fit(model: Model | OnnxModel, source: ImageSource) -> bool:
    """Whether a source's labels are classes of the model.

    Without names, as many classes as the model has are taken to be the same ones in their order.
    """
    if model.class_names:
        return True
    return len(source.class_names) == num_classes(model)


def check_labels(spec: str, images: Images, model: Model | OnnxModel) -> None:
    """Refuse images whose labels do not say which of the model's classes they are of.

    Raises:
      InputError: images without labels, or of other classes.
    """
    labels = images.source.labels[images.indices]
    if labels.min() < 0:
        raise InputError(
            f"{spec}: has images without labels, expected a folder of images per class"
        )
    if labels.max() >= num_classes(model) or not labels_fit(model, images.source):
        raise InputError(
            f"{spec}: has {len(images.source.class_names)} classes and labels up to "
            f"{labels.max()}, expected the model's {num_classes(model)} classes "
            "(convert --classes names them)"
        )


def check_model_out(args: argparse.Namespace) -> None:
    """Refuse a directory that a model cannot be written to, and that of the model itself.

    Raises:
      InputError: names it.
    """
    check_directory(args.out, (store.SPEC_FILE, store.PARAMS_FILE))
    # With weights, --model is a preset's name.
    if args.weights is None and os.path.realpath(args.out) == os.path.realpath(args.model):
        raise InputError(
            f"--out {args.out} is the dense model, which would be lost: choose another directory"
        )


def add_checkpoints_option(parser: argparse.ArgumentParser, what: str) -> None:
    """The directory that an interrupted training goes on from."""
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help=f"where an interrupted {what} goes on from when the same command is given again",
    )


def checkpoints_of(args: argparse.Namespace) -> Path | None:
    """The directory of --checkpoints, if it is given.

    Raises:
      InputError: it would go with the directory that the model is written to.
    """
    if args.checkpoints is None:
        return None
    kept, out = Path(args.checkpoints).resolve(), Path(args.out).resolve()
    if out in (kept, *kept.parents):
        raise InputError(
            f"--checkpoints {args.checkpoints}: lies in --out, which the model replaces, "
            "expected another directory"
        )
    return Path(args.checkpoints)


def num_classes(model: Model | OnnxModel) -> int:
    """How many classes a model has."""
    return model.num_classes if isinstance(model, OnnxModel) else model.config.num_classes


def open_labelled(spec: str, model: Model) -> ImageSource:
    """Open a source; labels that are not the model's classes are dropped, and that is said.

    Raises:
      InputError: nothing there, or not in a known layout.
    """
    try:
        source = open_source(spec, model.class_names or None)
        why = (
            f"it has {len(source.class_names)} classes, the model {model.config.num_classes} "
            "without names (convert --classes names them)"
        )
        if labels_fit(model, source):
            return source
    except InputError as error:
        # Whatever else is wrong with it is so without names too.
        source, why = open_source(spec), str(error)
    if (source.labels >= 0).any():
        print(one_line(f"the labels of {spec} are not used: {why}"), file=sys.stderr)
    return source.with_labels(np.full(len(source), UNLABELLED, np.int32))


def hold_out(indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share for choosing the epoch.

    Raises:
      InputError: fewer than two images.
    """
    if len(indices) < 2:
        raise InputError(
            f"{len(indices)} images were chosen, expected two or more, of which one is held out"
        )
    order = np.random.default_rng(seed).permutation(indices)
    count = max(1, round(VALIDATION_SHARE * len(indices)))
    return np.sort(order[count:]), np.sort(order[:count])


def what_is(path: str | os.PathLike) -> str | None:
    """What of ours stands at a path, by its content; None where it is nothing of ours.

    Raises:
      InputError: a file that begins as JSON and is not.
    """
    path = Path(path)
    if path.is_dir():
        return store.kind_of(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(4096)
    # safetensors: the header's length in eight bytes, then the header.
    if b"\0" in head[:8] and head[8:9] == b"{":
        return "a payload"
    # protobuf: the version of the format is an ONNX file's first field.
    if head[:1] == b"\x08":
        return "an ONNX file"
    # MLIR's bytecode: its mark, a version, and who wrote it.
    if re.search(rb"ML\xefR.StableHLO", head, re.DOTALL):
        return "a StableHLO file"
    if head.lstrip()[:1] != b"{":
        return None
    found = read_json(path)
    return _FORMATS.get(found.get("format")) if isinstance(found.get("format"), str) else None


def read_text(path: str) -> str:
    """Read a text file.

    Raises:
      InputError: no such file, or not UTF-8.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        # Editors on Windows begin a file with a mark.
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file in UTF-8 ({error})") from error


def print_costs(costs: dict[str, Cost]) -> None:
    """Print what budgets bound; of all but the first also as shares of the first."""
    first = next(iter(costs.values()))
    for name, found in costs.items():
        parts = []
        for unit, label in _COSTS.items():
            value, whole = getattr(found, unit), getattr(first, unit)
            if whole:  # a ResNet has no encoder
                share = "" if found is first else f" ({100 * value / whole:.1f} %)"
                parts.append(f"{value:,} {label}{share}")
        say(f"{name}: {', '.join(parts)}")


def say(text: str) -> None:
    """Print a line that may hold names from files of others."""
    print(one_line(text))
