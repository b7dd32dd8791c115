"""convert, evaluate, inspect: models as files."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapvit_jax.commands.common import (
    Command,
    add_batch_option,
    add_image_options,
    add_model_options,
    add_weights_options,
    check_labels,
    load_preset,
    open_images,
    open_runnable,
    print_costs,
    say,
    what_is,
)
from tapvit_jax.commands.devices import read_selection
from tapvit_jax.convert.timm import load_timm
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.export import check
from tapvit_jax.export.runtime import OnnxModel, evaluate_onnx
from tapvit_jax.export.stablehlo import read_stablehlo
from tapvit_jax.export.timm import CONFIG_FILE, WEIGHTS_FILE
from tapvit_jax.files import check_directory, read_json
from tapvit_jax.models import store
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.registry import Model, preprocess_of
from tapvit_jax.models.store import read_spec
from tapvit_jax.pipeline import evaluate_model
from tapvit_jax.progress import Progress
from tapvit_jax.proxy.features import Extractor
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.structs import from_plain, to_plain

# What is for programs: indices, configs, and versions.
_UNREAD = {"kept", "dense_config", "config", "libraries", "format", "version"}
_MOST_NAMES, _LONGEST = 10, 400


def register(command: Command) -> None:
    """Add the commands of this module."""
    c = command("convert", convert)
    c.add_argument("--preset", required=True, help="timm's name, such as deit_small_patch16_224")
    add_weights_options(c, required=True)
    c.add_argument("--out", required=True)

    c = command("evaluate", evaluate)
    add_model_options(c, onnx=True)
    c.add_argument("--images", required=True, metavar="IMAGES")
    add_batch_option(c)
    add_image_options(c)

    c = command("inspect", inspect)
    c.add_argument(
        "path",
        help="any folder or file that tapvit wrote",
    )


def convert(args: argparse.Namespace) -> None:
    """Turn a timm checkpoint into a model directory."""
    check_directory(args.out, (store.SPEC_FILE, store.PARAMS_FILE))
    model = load_preset(args.preset, args)
    store.save(model, args.out)
    print_costs({"model": cost(model.config)})


def evaluate(args: argparse.Namespace) -> None:
    """Top-1 of a model on labelled images."""
    model = open_runnable(args)
    images = open_images(
        open_source(args.images, model.class_names or None),
        preprocess_of(model),
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    check_labels(args.images, images, model)
    run = evaluate_onnx if isinstance(model, OnnxModel) else evaluate_model
    size = {} if args.batch_size is None else {"batch_size": args.batch_size}
    progress = Progress(1.0, lines=False)
    with progress.step("evaluate", 1) as step:
        found = run(model, images.source, images.indices, **size, on_share=step.advance)
    progress.close()
    if not math.isfinite(found.loss):
        raise InputError(
            f"{args.model}: its cross-entropy is {found.loss}, expected a finite number: its "
            "weights may hold NaN or infinity"
        )
    say(f"top-1 {100 * found.top1:.2f} %, cross-entropy {found.loss:.4f}, {found.count} images")


def inspect(args: argparse.Namespace) -> None:
    """Say what a file or folder of tapvit's holds, after checking all of it."""
    path = Path(args.path)
    kind = what_is(path)
    if kind is None:
        found = "is nothing that inspect knows" if path.exists() else "no such file or folder"
        raise InputError(f"{path}: {found}, expected {', '.join(_INSPECT)}")
    _INSPECT[kind](path)


def _inspect_model(path: Path) -> None:
    _print_model(store.load(path))


def _inspect_foreign(path: Path) -> None:
    record = read_json(path / CONFIG_FILE)
    name = record.get("architecture") if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{path / CONFIG_FILE}: names no architecture, expected a model of timm's")
    _print_model(load_timm(name, path / WEIGHTS_FILE))


def _print_model(model: Model) -> None:
    config = model.config
    print_costs({model.name: cost(config)})
    _print_use(
        (config.image_size, config.image_size, config.in_channels),
        model.preprocess,
        model.class_names,
        config.num_classes,
    )
    record = {"architecture": model.architecture, "device's prior": model.prior, **model.history}
    _print_record(record)
    if isinstance(config, TransformerConfig):
        _print_blocks(config)


def _inspect_extractor(path: Path) -> None:
    extractor = Extractor.load(path)
    say(f"extractor: {extractor.kind}, {extractor.dim} features")
    say(f"images: {_prepared(extractor.preprocess)}")
    say(f"fingerprint {extractor.fingerprint}")


def _inspect_selection(path: Path) -> None:
    selection = read_selection(path)
    say(f"selection by {selection['method']!r} from a pool of {selection['pool_size']} images")
    say(f"the first {selection['metric_count']} of each are the metric dataset")
    for device in selection["devices"]:
        say(f"{device['payload']}: {len(device['indices'])} images")


def _inspect_payload(path: Path) -> None:
    gmm = Gmm.load(path)
    say(f"payload: {path.stat().st_size} bytes, {gmm.num_parameters} numbers")
    say(f"{gmm.components} components, {gmm.dim} dimensions, {gmm.covariance_type} covariance")
    say(f"weights: {', '.join(f'{weight:.3f}' for weight in gmm.weights)}")
    say(f"extractor {gmm.extractor or 'unknown'}")


def _inspect_latency(path: Path) -> None:
    table = LatencyModel.load(path)
    say(
        f"latency table: {len(table.measured)} measurements, batch {table.batch_size}, "
        f"{table.threads} threads; predictions of left-out ones are off by "
        f"{100 * table.error_median:.1f} % in the median, {100 * table.error_max:.1f} % at most"
    )
    print_costs({"dense": cost(table.dense)})
    _print_record(table.machine)


def _inspect_onnx(path: Path) -> None:
    model = OnnxModel(path)
    say(f"ONNX file: {model.name}, {path.stat().st_size:,} bytes")
    _print_use(model.image_shape, model.preprocess, model.class_names, model.num_classes)


def _inspect_stablehlo(path: Path) -> None:
    found, spec = read_stablehlo(path), check.spec_path(path)
    shapes = [aval.shape for aval in (*found.in_avals, *found.out_avals)]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise InputError(f"{path}: takes and gives {shapes}, expected images and logits")
    say(f"StableHLO file: {path.stat().st_size:,} bytes, for {', '.join(found.platforms)}")
    record = read_spec(spec, check.FORMAT, check.VERSION) if spec.is_file() else {}
    prepared = from_plain(Preprocess | None, record.get("preprocess"), f"{spec}: preprocess")
    names = from_plain(tuple[str, ...], record.get("class_names", []), f"{spec}: class_names")
    _print_use(shapes[0][1:], prepared, names, shapes[1][1])


def _inspect_artefact(path: Path) -> None:
    found = read_spec(path, check.FORMAT, check.VERSION)
    say(f"record of an artefact, which is to stand beside it as {found.get('file')}")
    _print_record(found)


_INSPECT = {
    "a model": _inspect_model,
    "an extractor": _inspect_extractor,
    "a payload": _inspect_payload,
    "a selection": _inspect_selection,
    "a latency table": _inspect_latency,
    "an ONNX file": _inspect_onnx,
    "a StableHLO file": _inspect_stablehlo,
    "an artefact's record": _inspect_artefact,
    store.FOREIGN: _inspect_foreign,
}


def _print_use(
    shape: tuple[int, int, int],
    preprocess: Preprocess | None,
    class_names: tuple[str, ...],
    classes: int,
) -> None:
    prepared = "how they are prepared is not said" if preprocess is None else _prepared(preprocess)
    say(f"images: {' x '.join(map(str, shape))}, {prepared}")
    names = ", ".join(class_names[:_MOST_NAMES]) or "without names"
    say(f"classes: {classes}, {names}{', ...' if len(class_names) > _MOST_NAMES else ''}")


def _prepared(preprocess: Preprocess) -> str:
    return ", ".join(f"{name} {value}" for name, value in to_plain(preprocess).items())


def _print_record(record: Mapping[str, Any]) -> None:
    """A line for every entry, as far as people read them."""
    for name, value in record.items():
        if name not in _UNREAD and value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            say(f"{name}: {text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...'}")


def _print_blocks(config: TransformerConfig) -> None:
    for i, block in enumerate(config.blocks):
        attention = f"{block.num_heads} heads x ({block.qk_dim} qk, {block.v_dim} v)"
        say(
            f"block {i:2}: {attention if block.attn else 'no attention'}, "
            f"{f'{block.mlp_dim} MLP units' if block.mlp else 'no MLP'}"
        )
