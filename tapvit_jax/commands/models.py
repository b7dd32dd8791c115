"""convert, evaluate, inspect: models as files."""

import argparse
import math
from pathlib import Path

from tapvit_jax.commands.common import (
    Command,
    add_image_options,
    add_model_options,
    add_weights_options,
    labels_fit,
    load_preset,
    num_classes,
    open_images,
    open_runnable,
    print_costs,
)
from tapvit_jax.commands.devices import read_selection
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.export.runtime import OnnxModel, evaluate_onnx
from tapvit_jax.files import check_directory
from tapvit_jax.models import store
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.registry import preprocess_of
from tapvit_jax.pipeline import evaluate_model
from tapvit_jax.proxy import features as extractors
from tapvit_jax.proxy.features import Extractor
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.prune.cost import cost


def register(command: Command) -> None:
    """Add the commands of this module."""
    c = command("convert", convert)
    c.add_argument("--preset", required=True, help="timm's name, such as deit_small_patch16_224")
    add_weights_options(c, required=True)
    c.add_argument("--out", required=True)

    c = command("evaluate", evaluate)
    add_model_options(c, onnx=True)
    c.add_argument("--images", required=True, metavar="IMAGES")
    add_image_options(c)

    c = command("inspect", inspect)
    c.add_argument("path", help="a payload, model, extractor or selection")


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
    labels = images.source.labels[images.indices]
    if labels.max() < 0:
        raise InputError(f"{args.images}: evaluation needs labels: a folder of images per class")
    if labels.max() >= num_classes(model) or not labels_fit(model, images.source):
        raise InputError(
            f"{args.images}: has {len(images.source.class_names)} classes and labels up to "
            f"{labels.max()}, expected the model's {num_classes(model)} classes "
            "(convert --classes names them)"
        )
    run = evaluate_onnx if isinstance(model, OnnxModel) else evaluate_model
    found = run(model, images.source, images.indices)
    if not math.isfinite(found.loss):
        raise InputError(
            f"{args.model}: its cross-entropy is {found.loss}, expected a finite number: its "
            "weights may hold NaN or infinity"
        )
    print(f"top-1 {100 * found.top1:.2f} %, cross-entropy {found.loss:.4f}, {found.count} images")


def inspect(args: argparse.Namespace) -> None:
    """Say what a payload, model, extractor or selection holds, after checking all of it."""
    path = Path(args.path)
    if (path / store.SPEC_FILE).is_file():
        model = store.load(path)
        print_costs({model.name: cost(model.config)})
        if isinstance(model.config, TransformerConfig):
            _print_blocks(model.config)
    elif (path / extractors.SPEC_FILE).is_file():
        extractor = Extractor.load(path)
        print(f"extractor: {extractor.kind}, {extractor.dim} features")
        print(f"fingerprint {extractor.fingerprint}")
    elif path.suffix == ".json":
        selection = read_selection(path)
        print(
            f"selection by {selection['method']!r} from a pool of {selection['pool_size']} images"
        )
        for device in selection["devices"]:
            print(f"{device['payload']}: {len(device['indices'])} images")
    else:
        gmm = Gmm.load(path)
        print(f"payload: {path.stat().st_size} bytes, {gmm.num_parameters} numbers")
        print(
            f"{gmm.components} components, {gmm.dim} dimensions, {gmm.covariance_type} covariance"
        )
        print(f"weights: {', '.join(f'{weight:.3f}' for weight in gmm.weights)}")
        print(f"extractor {gmm.extractor or 'unknown'}")


def _print_blocks(config: TransformerConfig) -> None:
    for i, block in enumerate(config.blocks):
        attention = f"{block.num_heads} heads x ({block.qk_dim} qk, {block.v_dim} v)"
        print(
            f"block {i:2}: {attention if block.attn else 'no attention'}, "
            f"{f'{block.mlp_dim} MLP units' if block.mlp else 'no MLP'}"
        )
