"""extractor, device-fit, select: from private images to a choice of public ones."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.commands.common import (
    SELECTION_FORMAT,
    Command,
    Images,
    add_batch_option,
    add_image_options,
    add_model_options,
    hold_out,
    open_images,
    open_model,
    seed,
    what_is,
)
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import check_directory, check_file, write_json
from tapvit_jax.models import convnet
from tapvit_jax.models.registry import preprocess_of
from tapvit_jax.models.store import read_spec
from tapvit_jax.progress import Progress
from tapvit_jax.proxy import features as extractors
from tapvit_jax.proxy.features import (
    Extractor,
    ExtractorConfig,
    build_extractor,
    embedding_network,
)
from tapvit_jax.proxy.gmm import Gmm, GmmConfig, fit_report
from tapvit_jax.proxy.payload import CovarianceType
from tapvit_jax.proxy.pool_features import pool_features
from tapvit_jax.proxy.select import Method as SelectMethod
from tapvit_jax.proxy.select import SelectConfig, select
from tapvit_jax.train.finetune import TrainConfig, TrainData, train

SELECTION_VERSION = 1

DEFAULT_EXTRACTOR = ExtractorConfig(kind="pooled", dim=16)
"""Follows from the model and the pool alone, so that both sides can build it."""

CHOICE = {
    "finetune_count": SelectConfig.finetune_count,
    "select_method": SelectConfig.method,
}
"""How images are chosen unless the options say otherwise."""

METRIC_COUNT = SelectConfig.metric_count
"""How many are, where the pool has as many."""


def register(command: Command) -> None:
    """Add the commands of this module."""
    c = command("extractor", build)
    add_model_options(c)
    c.add_argument("--pool", required=True, metavar="IMAGES")
    c.add_argument(
        "--new-classifier",
        action="store_true",
        help="the weights have no classifier, or one of any classes: features do without",
    )
    c.add_argument("--kind", choices=get_args(extractors.Kind), default=DEFAULT_EXTRACTOR.kind)
    c.add_argument(
        "--dim", type=int, default=DEFAULT_EXTRACTOR.dim, help="features that the PCA keeps"
    )
    c.add_argument(
        "--depth", type=int, default=DEFAULT_EXTRACTOR.depth, help="blocks run, for kind backbone"
    )
    c.add_argument("--epochs", type=int, default=20, help="training, for kind embedding")
    c.add_argument("--seed", type=seed, default=0)
    c.add_argument("--out", required=True)
    add_image_options(c)

    c = command("device-fit", device_fit)
    c.add_argument("--extractor", required=True)
    c.add_argument("--images", required=True, metavar="IMAGES", help="the private images")
    c.add_argument("--components", default="1-10", help="a number, or a range that BIC decides in")
    c.add_argument("--covariance", choices=get_args(CovarianceType), default="diag")
    c.add_argument("--variance-floor", type=float, default=GmmConfig.variance_floor)
    c.add_argument("--min-members", type=int, default=GmmConfig.min_members)
    c.add_argument("--seed", type=seed, default=0)
    c.add_argument("--out", required=True, help="the payload file")
    add_batch_option(c)
    add_image_options(c)

    c = command("select", choose)
    c.add_argument("--extractor", required=True)
    c.add_argument("--payload", required=True, action="append", help="repeatable, one a device")
    c.add_argument("--pool", required=True, metavar="IMAGES")
    add_selection_options(c)
    c.add_argument("--out", required=True, help="the selection file (.json)")
    add_image_options(c)


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add how many public images are chosen, and how; `fill_in_choice` gives the defaults."""
    parser.add_argument(
        "--count",
        type=int,
        help=f"images in the metric dataset; by default {METRIC_COUNT}, or all of a smaller pool",
    )
    parser.add_argument(
        "--finetune-count",
        type=int,
        help=f"images in the fine-tuning set, {CHOICE['finetune_count']} by default; never fewer "
        "than --count, never more than the pool has",
    )
    parser.add_argument(
        "--select-method",
        choices=get_args(SelectMethod),
        help=f"{CHOICE['select_method']} by default",
    )
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="where the pool's features, which payloads ask for, are kept and found again, so that "
        "no later command computes them; they need not fit into memory",
    )
    parser.add_argument("--seed", type=seed, default=0)


def fill_in_choice(args: argparse.Namespace) -> None:
    """Give the options of a choice that are not given their defaults, and check them.

    The default of --count needs the pool: see `select_images`.

    Raises:
      InputError: a count below one.
    """
    for name, usual in CHOICE.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    for name in ("count", "finetune_count"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(args, name)}, expected 1 or more")


def build(args: argparse.Namespace) -> None:
    """Build the feature extractor that devices run: fit it on the public pool."""
    check_directory(args.out, (extractors.SPEC_FILE, extractors.PARAMS_FILE))
    options = ExtractorConfig(kind=args.kind, dim=args.dim, depth=args.depth)
    recipe = TrainConfig(epochs=args.epochs)
    model = open_model(args)
    preprocess = preprocess_of(model)
    pool = open_images(
        open_source(args.pool), preprocess, split=args.split, skip_corrupt=args.skip_corrupt
    )
    if args.kind == "embedding" and (pool.source.labels[pool.indices] < 0).any():
        raise InputError(
            f"--kind embedding trains on labels, which images of {args.pool} lack: expected a "
            "folder of images per class, or --kind pooled or backbone"
        )
    network = params = None
    progress = Progress(1 + (args.epochs if args.kind == "embedding" else 0))
    if args.kind == "embedding":
        network = embedding_network(options, preprocess, len(pool.source.class_names))
        training, validation = hold_out(pool.indices, args.seed)
        with progress.step("train the embedding network", args.epochs) as step:
            params = train(
                network,
                convnet.init(network, jax.random.key(args.seed)),
                TrainData(pool.source, preprocess, training, validation),
                recipe,
                seed=args.seed,
                forward=convnet.apply,
                on_share=step.advance,
            ).params
    with progress.step("fit the PCA on the pool", 1) as step:
        extractor = build_extractor(
            options,
            pool.source,
            pool.indices,
            preprocess,
            model=model,
            network=network,
            params=params,
            on_share=step.advance,
        )
    progress.close()
    extractor.save(args.out)
    print(f"{extractor.dim} features, fingerprint {extractor.fingerprint[:16]}")


def device_fit(args: argparse.Namespace) -> None:
    """Fit the device's mixture on its private images and write the payload."""
    check_file(args.out)
    config = GmmConfig(
        components=_parse_range(args.components),
        covariance_type=args.covariance,
        variance_floor=args.variance_floor,
        min_members=args.min_members,
        seed=args.seed,
    )
    extractor = Extractor.load(args.extractor)
    images = open_images(
        open_source(args.images),
        extractor.preprocess,
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    progress = Progress(len(images.indices) * 1.1)
    with progress.step("features", len(images.indices)) as step:
        total = len(images.indices)
        found = extractor.features(
            images.source,
            images.indices,
            args.batch_size,
            on_batch=lambda n: step.advance(n / total),
        )
    with progress.step("mixture", len(images.indices) * 0.1):
        gmm, _ = fit_report(found, config)
    progress.close()
    gmm.save(args.out, extractor=extractor.fingerprint)
    print(
        f"{args.out}: {gmm.components} components in {gmm.dim} dimensions, "
        f"{gmm.num_parameters} numbers, {Path(args.out).stat().st_size} bytes"
    )


def choose(args: argparse.Namespace) -> None:
    """Choose every device's metric dataset and fine-tuning set from the public pool."""
    fill_in_choice(args)
    check_file(args.out)
    extractor = Extractor.load(args.extractor)
    gmms = [load_payload(path, extractor) for path in args.payload]
    pool = open_images(
        open_source(args.pool),
        extractor.preprocess,
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    progress = Progress(1.0)
    with progress.step("features and selection", 1) as step:
        chosen, _ = select_images(args, gmms, extractor, pool, step.advance)
    progress.close()
    write_json(args.out, _selection(args, pool.source, args.payload, chosen))
    print(f"{args.out}: {len(gmms)} devices, {chosen.shape[1]} of {len(pool.indices)} images each")


def load_payload(path: str, extractor: Extractor) -> Gmm:
    """Read a payload that was made with an extractor.

    Raises:
      InputError: no payload, or one of another extractor.
    """
    return Gmm.load(path, dim=extractor.dim, extractor=extractor.fingerprint)


def select_images(
    args: argparse.Namespace,
    gmms: list[Gmm],
    extractor: Extractor,
    pool: Images,
    on_share: Callable[[float], None],
) -> tuple[Int[np.ndarray, "v n"], Float[np.ndarray, "p d"]]:
    """Indices of the images chosen for each mixture, metric dataset first; the pool's features.

    Without --count, `args` gets the default: 640 images, or all of a smaller pool, which is said.

    Raises:
      InputError: a pool of fewer images than --count.
    """
    if args.count is None:
        args.count = min(METRIC_COUNT, len(pool.indices))
        if args.count < METRIC_COUNT:
            print(
                f"all {args.count} images of {args.pool} are the metric dataset, which usually has "
                f"{METRIC_COUNT}",
                file=sys.stderr,
            )
    if args.count > len(pool.indices):
        raise InputError(
            f"--count is {args.count}, but {args.pool} has {len(pool.indices)} images: expected as "
            "many at most"
        )

    def on_batch(images: int) -> None:
        on_share(images / len(pool.indices))

    if args.features is None:
        found = extractor.features(pool.source, pool.indices, on_batch=on_batch)
    else:
        found = pool_features(
            extractor, pool.source, pool.indices, args.features, on_batch=on_batch
        )
    # Small pools are used whole for fine-tuning; only the metric dataset's size is binding.
    finetune = min(max(args.finetune_count, args.count), len(pool.indices))
    positions = select(
        gmms,
        found,
        args.count,
        method=args.select_method,
        seed=args.seed,
        finetune_count=finetune,
    )
    return pool.indices[positions], found


def _selection(
    args: argparse.Namespace, source: ImageSource, payloads: list[str], chosen: np.ndarray
) -> dict[str, Any]:
    return {
        "format": SELECTION_FORMAT,
        "version": SELECTION_VERSION,
        "pool": source.images_fingerprint(),
        "pool_size": len(source),
        "method": args.select_method,
        "seed": args.seed,
        "metric_count": args.count,
        "devices": [
            {"payload": Path(path).name, "indices": row.tolist()}
            for path, row in zip(payloads, chosen, strict=True)
        ],
    }


def read_selection(path: Path) -> dict[str, Any]:
    """Read a selection file that `select` wrote.

    Raises:
      InputError: missing, damaged, or indices that repeat or lie outside the pool.
    """
    try:
        found = read_spec(path, SELECTION_FORMAT, SELECTION_VERSION)
    except InputError as error:
        kind = what_is(path)
        if not path.exists() or kind == "a selection":
            raise
        raise InputError(f"{path}: is {kind or 'something else'}, expected a selection") from error
    expected = {"pool": str, "pool_size": int, "method": str, "metric_count": int, "devices": list}
    for name, kind in expected.items():
        # By type, as True is an int too.
        if type(found.get(name)) is not kind:
            raise InputError(
                f"{path}: {name} is of type {type(found.get(name)).__name__}, expected "
                f"{kind.__name__}"
            )
    if not found["devices"]:
        raise InputError(f"{path}: devices is empty, expected one or more")
    for device in found["devices"]:
        _check_device(path, device, found["pool_size"])
    least = min(len(device["indices"]) for device in found["devices"])
    if not 0 < found["metric_count"] <= least:
        raise InputError(
            f"{path}: metric_count is {found['metric_count']}, expected 1 to {least}, the images "
            "that every device has"
        )
    return found


def _check_device(path: Path, device: Any, size: int) -> None:
    if not isinstance(device, dict) or not isinstance(device.get("payload"), str):
        raise InputError(f"{path}: a device has no payload, expected its file's name")
    indices = device.get("indices")
    if not isinstance(indices, list) or not indices or any(type(i) is not int for i in indices):
        raise InputError(f"{path}: {device['payload']}: indices must be a list of whole numbers")
    if min(indices) < 0 or max(indices) >= size:
        raise InputError(f"{path}: {device['payload']}: indices must lie in 0..{size - 1}")
    if len(set(indices)) < len(indices):
        raise InputError(f"{path}: {device['payload']}: indices repeat, expected distinct ones")


def _parse_range(text: str) -> tuple[int, ...]:
    first, dash, last = text.partition("-")
    try:
        found = tuple(range(int(first), int(last) + 1)) if dash else (int(first),)
    except ValueError:
        found = ()
    if not found:
        raise InputError(f"--components {text!r}: expected a number or a range such as 1-10")
    return found
