"""Command line: tapvit convert | extractor | device-fit | select | prune | evaluate | inspect.

IMAGES is a folder with a folder of images per class, a flat folder of images, Tiny-ImageNet in its
own layout, "digits", or "tfds:NAME". Bad input ends with one line and exit code 2.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Int

from tapvit_jax.convert.timm import load_timm
from tapvit_jax.data.base import UNLABELLED, ImageSource, find_corrupt
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import check_directory, write_json
from tapvit_jax.importance.neurons import Method, NeuronConfig
from tapvit_jax.models import convnet, store
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import (
    PruneConfig,
    evaluate_model,
    plan_masks,
    reshape_checked,
    score,
)
from tapvit_jax.progress import Progress
from tapvit_jax.proxy import features as extractors
from tapvit_jax.proxy.features import (
    Extractor,
    ExtractorConfig,
    build_extractor,
    embedding_network,
)
from tapvit_jax.proxy.gmm import CovarianceType, Gmm, GmmConfig, fit_report
from tapvit_jax.proxy.select import Method as SelectMethod
from tapvit_jax.proxy.select import select
from tapvit_jax.prune.allocate import AllocateConfig, allocate, check_budget
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import Cost, cost
from tapvit_jax.runtime import run_program, set_up_jax
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train

SELECTION_FORMAT = "tapvit-selection"
SELECTION_VERSION = 1
_VALIDATION_SHARE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A source, and those of its images that a command uses."""

    source: ImageSource
    indices: Int[np.ndarray, "n"]


def open_images(
    spec: str,
    preprocess: Preprocess,
    *,
    class_names: Sequence[str] | None = None,
    split: str | None = None,
    skip_corrupt: bool = False,
) -> Images:
    """Open a source; with `skip_corrupt`, leave out and name the images that cannot be read.

    Raises:
      InputError: nothing there, no image left, or a split that the source does not have.
    """
    source = open_source(spec, class_names)
    indices = np.arange(len(source))
    if split is not None:
        indices = indices[source.splits == split]
        if len(indices) == 0:
            known = ", ".join(sorted(set(source.splits)))
            raise InputError(f"{spec}: has no split {split!r}, found {known}")
    if skip_corrupt:
        bad = find_corrupt(source, indices, preprocess)
        for _, message in bad[:10]:
            print(f"skipped: {message}", file=sys.stderr)
        if bad:
            print(f"skipped {len(bad)} of {len(indices)} images", file=sys.stderr)
        indices = np.setdiff1d(indices, [index for index, _ in bad])
        if len(indices) == 0:
            raise InputError(f"{spec}: no image can be read")
    return Images(source, indices)


def convert(args: argparse.Namespace) -> None:
    """Turn a timm checkpoint into a model directory."""
    overrides = {}
    for item in args.set or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item!r}: expected NAME=VALUE, such as num_classes=40")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    model = load_timm(args.preset, args.weights, **overrides)
    if args.classes:
        names = [line.strip() for line in _read_text(args.classes).splitlines() if line.strip()]
        if len(names) != model.config.num_classes:
            raise InputError(
                f"{args.classes}: {len(names)} names, expected {model.config.num_classes}, "
                "one a class of the model"
            )
        model = model.replace(class_names=tuple(names))
    store.save(model, args.out)
    _print_costs({"model": cost(model.config)})


def build(args: argparse.Namespace) -> None:
    """Build the feature extractor that devices run: fit it on the public pool."""
    check_directory(args.out, (extractors.SPEC_FILE, extractors.PARAMS_FILE))
    model = store.load(args.model)
    preprocess = _preprocess_of(model)
    pool = open_images(args.pool, preprocess, split=args.split, skip_corrupt=args.skip_corrupt)
    options = ExtractorConfig(kind=args.kind, dim=args.dim, depth=args.depth)
    network = params = None
    progress = Progress(max(args.epochs, 1) + 1)
    if args.kind == "embedding":
        network = embedding_network(options, preprocess, len(pool.source.class_names))
        training, validation = _hold_out(pool.indices, args.seed)
        with progress.step("train the embedding network", args.epochs) as step:
            params = train(
                network,
                convnet.init(network, jax.random.key(args.seed)),
                TrainData(pool.source, preprocess, training, validation),
                TrainConfig(epochs=args.epochs),
                seed=args.seed,
                forward=convnet.apply,
                on_epoch=lambda *_: step.advance(1.0 / args.epochs),
            ).params
    with progress.step("fit the PCA on the pool", 1):
        extractor = build_extractor(
            options,
            pool.source,
            pool.indices,
            preprocess,
            model=model,
            network=network,
            params=params,
        )
    progress.close()
    extractor.save(args.out)
    print(f"{extractor.dim} features, fingerprint {extractor.fingerprint[:16]}")


def device_fit(args: argparse.Namespace) -> None:
    """Fit the device's mixture on its private images and write the payload."""
    extractor = Extractor.load(args.extractor)
    images = open_images(
        args.images, extractor.preprocess, split=args.split, skip_corrupt=args.skip_corrupt
    )
    config = GmmConfig(
        components=_parse_range(args.components),
        covariance_type=args.covariance,
        variance_floor=args.variance_floor,
        min_members=args.min_members,
        seed=args.seed,
    )
    progress = Progress(len(images.indices) * 1.1)
    with progress.step("features", len(images.indices)) as step:
        total = len(images.indices)
        found = extractor.features(
            images.source, images.indices, on_batch=lambda n: step.advance(n / total)
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
    extractor = Extractor.load(args.extractor)
    gmms = [_load_payload(path, extractor) for path in args.payload]
    pool = open_images(
        args.pool, extractor.preprocess, split=args.split, skip_corrupt=args.skip_corrupt
    )
    chosen = _select(args, gmms, extractor, pool)
    write_json(args.out, _selection(args, pool.source, args.payload, chosen))
    print(f"{args.out}: {len(gmms)} devices, {chosen.shape[1]} of {len(pool.indices)} images each")


def prune(args: argparse.Namespace) -> None:
    """Score, plan, reshape and recover one device's model."""
    check_directory(args.out, (store.SPEC_FILE, store.PARAMS_FILE))
    model = store.load(args.model)
    preprocess = _preprocess_of(model)
    budget = Budget.parse(args.budget)
    config = PruneConfig(neurons=NeuronConfig.of_method(args.method))
    if args.method == "tap_published":
        config = PruneConfig.as_published()
    config = dataclasses.replace(
        config, allocate=dataclasses.replace(config.allocate, round_to=args.round_to)
    )
    # Before any work: what cannot be met is refused now.
    check_budget(model, budget, config.allocate)
    if (args.selection is None) == (args.payload is None):
        raise InputError("prune needs either --selection, or --payload and --extractor")
    if args.payload is not None and args.extractor is None:
        raise InputError("--payload needs --extractor")
    pool = open_images(
        args.pool,
        preprocess,
        class_names=None if args.label_free else model.class_names or None,
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    progress = Progress(4.0 + args.recover_epochs)
    with progress.step("select", 1):
        metric, finetune = _chosen_images(args, pool)
    with progress.step("score units and layers", 2):
        units, layers = score(model, pool.source, metric, config, seed=args.seed)
        plan = allocate(model, units, layers, budget, config=config.allocate)
    training, validation = _hold_out(finetune, args.seed)
    source, labelled = pool.source, not args.label_free
    labelled = labelled and bool((source.labels[finetune] >= 0).all())
    if not labelled:
        # The dense model's answers stand in for labels: it teaches, and it chooses the epoch.
        source = source.with_labels(_answers(model, source, validation))
    with progress.step("recover", args.recover_epochs + 1) as step:
        options = TrainConfig(
            epochs=args.recover_epochs,
            learning_rate=args.learning_rate,
            distill=0.5 if labelled else 1.0,
        )
        recovered = train(
            model.config,
            model.params,
            TrainData(source, preprocess, training, validation),
            options,
            seed=args.seed,
            masks=plan_masks(plan),
            teacher=Teacher(model.config, model.params),
            on_epoch=lambda *_: step.advance(1.0 / options.epochs),
        )
    progress.close()
    small, difference = reshape_checked(
        model.replace(params=recovered.params), plan, source.load(metric[:32], preprocess)
    )
    history = {**small.history, "budget": str(budget), "method": args.method, "seed": args.seed}
    small = small.replace(name=f"{model.name}-pruned", history=history)
    store.save(small, args.out)
    _print_costs({"dense": cost(model.config), "pruned": cost(small.config)})
    print(f"largest difference between masked and reshaped logits: {difference:.1e} of the scale")
    before = evaluate_model(model, source, validation).top1
    after = evaluate_model(small, source, validation).top1
    compared = "top-1" if labelled else "agreement with the dense model"
    print(
        f"{compared} on {len(validation)} of the chosen public images, held out from fine-tuning: "
        f"{100 * before:.1f} % dense, {100 * after:.1f} % pruned"
    )


def _answers(model: Model, source: ImageSource, indices: np.ndarray) -> Int[np.ndarray, "n"]:
    """The model's classes for some images; -1 for all others."""
    labels = np.full(len(source), UNLABELLED, np.int32)
    for batch in batches(source, indices, _preprocess_of(model), 256):
        answers = np.asarray(model.apply(batch["image"]).argmax(axis=-1))
        real = batch["mask"] > 0
        labels[batch["index"][real]] = answers[real]
    return labels


def evaluate(args: argparse.Namespace) -> None:
    """Top-1 of a model on labelled images."""
    model = store.load(args.model)
    images = open_images(
        args.images,
        _preprocess_of(model),
        class_names=model.class_names or None,
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    labels = images.source.labels[images.indices]
    if labels.max() >= model.config.num_classes:
        raise InputError(
            f"{args.images}: labels out of range: class {labels.max()}, "
            f"the model has {model.config.num_classes} classes"
        )
    found = evaluate_model(model, images.source, images.indices)
    print(f"top-1 {100 * found.top1:.2f} %, cross-entropy {found.loss:.4f}, {found.count} images")


def inspect(args: argparse.Namespace) -> None:
    """Say what a payload, model, extractor or selection holds, after checking all of it."""
    path = Path(args.path)
    if (path / store.SPEC_FILE).is_file():
        model = store.load(path)
        _print_costs({model.name: cost(model.config)})
        for i, block in enumerate(model.config.blocks):
            attention = f"{block.num_heads} heads x ({block.qk_dim} qk, {block.v_dim} v)"
            print(
                f"block {i:2}: {attention if block.attn else 'no attention'}, "
                f"{f'{block.mlp_dim} MLP units' if block.mlp else 'no MLP'}"
            )
    elif (path / extractors.SPEC_FILE).is_file():
        extractor = Extractor.load(path)
        print(f"extractor: {extractor.kind}, {extractor.dim} features")
        print(f"fingerprint {extractor.fingerprint}")
    elif path.suffix == ".json":
        selection = _read_selection(path)
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


def _chosen_images(args: argparse.Namespace, pool: Images) -> tuple[np.ndarray, np.ndarray]:
    if args.payload is not None:
        extractor = Extractor.load(args.extractor)
        chosen = _select(args, [_load_payload(args.payload, extractor)], extractor, pool)[0]
        return chosen[: args.count], chosen
    selection = _read_selection(Path(args.selection))
    if selection["pool"] != pool.source.fingerprint():
        raise InputError(f"{args.selection}: was made for another pool than {args.pool}")
    devices = selection["devices"]
    if not 0 <= args.device < len(devices):
        raise InputError(f"--device is {args.device}, expected 0 to {len(devices) - 1}")
    chosen = np.asarray(devices[args.device]["indices"])
    return chosen[: selection["metric_count"]], chosen


def _select(
    args: argparse.Namespace, gmms: list[Gmm], extractor: Extractor, pool: Images
) -> Int[np.ndarray, "v n"]:
    found = extractor.features(pool.source, pool.indices)
    # Small pools are used whole for fine-tuning; only the metric dataset's size is binding.
    finetune = min(max(args.finetune_count, args.count), len(pool.indices))
    positions = select(
        gmms,
        found,
        args.count,
        method=args.select_method,
        seed=args.seed,
        finetune_count=max(finetune, args.count),
    )
    return pool.indices[positions]


def _selection(
    args: argparse.Namespace, source: ImageSource, payloads: list[str], chosen: np.ndarray
) -> dict[str, Any]:
    return {
        "format": SELECTION_FORMAT,
        "version": SELECTION_VERSION,
        "pool": source.fingerprint(),
        "pool_size": len(source),
        "method": args.select_method,
        "seed": args.seed,
        "metric_count": args.count,
        "devices": [
            {"payload": Path(path).name, "indices": row.tolist()}
            for path, row in zip(payloads, chosen, strict=True)
        ],
    }


def _read_selection(path: Path) -> dict[str, Any]:
    found = store.read_spec(path, SELECTION_FORMAT, SELECTION_VERSION)
    size = found.get("pool_size")
    try:
        for device in found["devices"]:
            indices = np.asarray(device["indices"])
            if indices.dtype.kind != "i" or indices.min() < 0 or indices.max() >= size:
                raise InputError(f"{path}: indices must lie in 0..{size - 1}")
        if not 0 < found["metric_count"] <= min(len(d["indices"]) for d in found["devices"]):
            raise InputError(f"{path}: metric_count does not fit the lists")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is not a whole selection file") from error
    return found


def _load_payload(path: str, extractor: Extractor) -> Gmm:
    return Gmm.load(path, dim=extractor.dim, extractor=extractor.fingerprint)


def _hold_out(indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a share for choosing the epoch."""
    if len(indices) < 2:
        raise InputError(f"{len(indices)} images: expected at least two, one is held out")
    order = np.random.default_rng(seed).permutation(indices)
    count = max(1, round(_VALIDATION_SHARE * len(indices)))
    return np.sort(order[count:]), np.sort(order[:count])


def _preprocess_of(model: Model) -> Preprocess:
    if model.preprocess is None:
        raise InputError(f"{model.name}: does not say how its images are prepared")
    return model.preprocess


def _parse_range(text: str) -> tuple[int, ...]:
    first, dash, last = text.partition("-")
    try:
        found = tuple(range(int(first), int(last) + 1)) if dash else (int(first),)
    except ValueError:
        found = ()
    if not found:
        raise InputError(f"--components {text!r}: expected a number or a range such as 1-10")
    return found


def _read_text(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    return Path(path).read_text(encoding="utf-8")


def _print_costs(costs: dict[str, Cost]) -> None:
    first = next(iter(costs.values()))
    for name, found in costs.items():
        shares = "" if found is first else f"  ({100 * found.params / first.params:.1f} %"
        shares += "" if found is first else f" and {100 * found.macs / first.macs:.1f} %)"
        print(f"{name}: {found.params:,} parameters, {found.macs:,} MACs{shares}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapvit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function, *, images: bool = True) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        found.set_defaults(function=function)
        if images:
            found.add_argument("--split", help="use only this split of the images (train, val)")
            found.add_argument(
                "--skip-corrupt",
                action="store_true",
                help="leave out images that cannot be read, and count them",
            )
        return found

    def selecting(found: argparse.ArgumentParser) -> None:
        found.add_argument("--count", type=int, default=640, help="images in the metric dataset")
        found.add_argument(
            "--finetune-count", type=int, default=6400, help="images in the fine-tuning set"
        )
        found.add_argument("--select-method", choices=get_args(SelectMethod), default="importance")
        found.add_argument("--seed", type=int, default=0)

    c = command("convert", convert, images=False)
    c.add_argument("--preset", required=True, help="timm's name, such as deit_small_patch16_224")
    c.add_argument("--weights", required=True, help="a .safetensors file under timm's names")
    c.add_argument("--set", action="append", metavar="NAME=VALUE", help="timm argument, repeatable")
    c.add_argument("--classes", help="a text file with a class name a line")
    c.add_argument("--out", required=True)

    c = command("extractor", build)
    c.add_argument("--model", required=True, help="the dense model's directory")
    c.add_argument("--pool", required=True, metavar="IMAGES")
    c.add_argument("--kind", choices=get_args(extractors.Kind), default="backbone")
    c.add_argument("--dim", type=int, default=16, help="features that the PCA keeps")
    c.add_argument("--depth", type=int, default=2, help="blocks run, for kind backbone")
    c.add_argument("--epochs", type=int, default=20, help="training, for kind embedding")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", required=True)

    c = command("device-fit", device_fit)
    c.add_argument("--extractor", required=True)
    c.add_argument("--images", required=True, metavar="IMAGES", help="the private images")
    c.add_argument("--components", default="1-10", help="a number, or a range that BIC decides in")
    c.add_argument("--covariance", choices=get_args(CovarianceType), default="diag")
    c.add_argument("--variance-floor", type=float, default=GmmConfig.variance_floor)
    c.add_argument("--min-members", type=int, default=GmmConfig.min_members)
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--out", required=True, help="the payload file")

    c = command("select", choose)
    c.add_argument("--extractor", required=True)
    c.add_argument("--payload", required=True, action="append", help="repeatable, one a device")
    c.add_argument("--pool", required=True, metavar="IMAGES")
    selecting(c)
    c.add_argument("--out", required=True, help="the selection file (.json)")

    c = command("prune", prune)
    c.add_argument("--model", required=True, help="the dense model's directory")
    c.add_argument("--pool", required=True, metavar="IMAGES")
    c.add_argument("--budget", required=True, help="such as macs=0.5 or macs=2.3G,params=12M")
    c.add_argument("--selection", help="a selection file")
    c.add_argument("--device", type=int, default=0, help="which device of the selection file")
    c.add_argument("--payload", help="instead of --selection: choose for this payload")
    c.add_argument("--extractor", help="needed with --payload")
    c.add_argument("--method", choices=get_args(Method), default="tap")
    c.add_argument("--round-to", type=int, default=AllocateConfig.round_to)
    c.add_argument("--recover-epochs", type=int, default=5, help="fine-tuning; 0 for none")
    c.add_argument(
        "--label-free", action="store_true", help="ignore the pool's labels: distil only"
    )
    c.add_argument("--learning-rate", type=float, default=1e-4)
    selecting(c)
    c.add_argument("--out", required=True, help="directory of the smaller model")

    c = command("evaluate", evaluate)
    c.add_argument("--model", required=True)
    c.add_argument("--images", required=True, metavar="IMAGES")

    c = command("inspect", inspect, images=False)
    c.add_argument("path", help="a payload, model, extractor or selection")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    args = _parser().parse_args(argv)
    set_up_jax()
    args.function(args)


def run() -> int:
    """Entry point of the console script."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
