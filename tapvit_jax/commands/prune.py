"""prune: the cloud's whole work for one device."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int

from tapvit_jax.commands.common import (
    Command,
    Images,
    add_image_options,
    add_model_options,
    hold_out,
    labels_fit,
    open_images,
    open_model,
    preprocess_of,
    print_costs,
)
from tapvit_jax.commands.devices import (
    DEFAULT_EXTRACTOR,
    add_selection_options,
    load_payload,
    read_selection,
    select_images,
)
from tapvit_jax.data.base import UNLABELLED, ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.errors import InputError
from tapvit_jax.export.latency import compare_latency
from tapvit_jax.files import check_directory
from tapvit_jax.importance.neurons import Method, NeuronConfig
from tapvit_jax.models import store
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import (
    PruneConfig,
    allocate_measured,
    evaluate_model,
    plan_masks,
    reshape_checked,
    score,
)
from tapvit_jax.progress import Progress
from tapvit_jax.proxy.features import Extractor, build_extractor
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.prune.allocate import RoundTo, allocate, check_budget
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train


def register(command: Command) -> None:
    """Add the command of this module."""
    c = command("prune", prune)
    add_model_options(c)
    c.add_argument("--pool", required=True, metavar="IMAGES")
    c.add_argument(
        "--budget",
        required=True,
        help="such as macs=0.5 or macs=2.3G,params=12M; units are params, macs, encoder_params, "
        "model_bytes, activation_bytes, latency (a fraction) and latency_ms",
    )
    c.add_argument("--selection", help="a selection file")
    c.add_argument("--device", type=int, default=0, help="which device of the selection file")
    c.add_argument("--payload", help="instead of --selection: choose for this payload")
    c.add_argument(
        "--extractor",
        help="what the payload was made with; by default the extractor command's, built anew "
        "from the model and the pool",
    )
    c.add_argument("--latency-table", help="what bench-latency wrote, for budgets on latency")
    c.add_argument("--method", choices=get_args(Method), default="tap")
    c.add_argument("--round-to", default="1", help="multiple of widths, such as 8 or mlp=64,qk=8")
    c.add_argument("--recover-epochs", type=int, default=5, help="fine-tuning; 0 for none")
    c.add_argument(
        "--label-free", action="store_true", help="ignore the pool's labels: distil only"
    )
    c.add_argument("--learning-rate", type=float, default=1e-4)
    add_selection_options(c)
    c.add_argument("--out", required=True, help="directory of the smaller model")
    add_image_options(c)


def prune(args: argparse.Namespace) -> None:
    """Choose images for a device, score, plan, reshape and recover its model."""
    check_directory(args.out, (store.SPEC_FILE, store.PARAMS_FILE))
    if (args.selection is None) == (args.payload is None):
        raise InputError("prune needs either --selection or --payload")
    model = open_model(args)
    preprocess = preprocess_of(model)
    budget = Budget.parse(args.budget)
    config = _prune_config(args)
    latency = None if args.latency_table is None else LatencyModel.load(args.latency_table)
    # Before any work: what cannot be met is refused now.
    check_budget(model, budget, config.allocate, latency)
    pool = open_images(
        args.pool,
        preprocess,
        class_names=None if args.label_free else model.class_names or None,
        split=args.split,
        skip_corrupt=args.skip_corrupt,
    )
    progress = Progress(4.0 + args.recover_epochs)
    with progress.step("select", 1):
        metric, finetune = _chosen_images(args, model, pool)
    with progress.step("score units and layers", 2) as step:
        units, layers = score(
            model, pool.source, metric, config, seed=args.seed, on_share=step.advance
        )
    with progress.step("plan", 0):
        if budget.needs_latency:
            plan, measured = allocate_measured(
                model,
                units,
                layers,
                budget,
                latency,
                config=config.allocate,
                measure=functools.partial(_measure, latency),
            )
        else:
            plan, measured = allocate(model, units, layers, budget, config=config.allocate), None
    training, validation = hold_out(finetune, args.seed)
    source, labelled = pool.source, not args.label_free and labels_fit(model, pool.source)
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
    history |= {} if measured is None else {"latency": measured}
    small = small.replace(name=f"{model.name}-pruned", history=history)
    store.save(small, args.out)
    print_costs({"dense": cost(model.config), "pruned": cost(small.config)})
    if measured is not None:
        print(
            f"ONNX Runtime, batch {latency.batch_size}, {latency.threads} threads: "
            f"{measured['dense_ms']:.2f} ms dense, {measured['pruned_ms']:.2f} ms pruned "
            f"(predicted {measured['predicted_ms']:.2f})"
        )
    print(f"largest difference between masked and reshaped logits: {difference:.1e} of the scale")
    before = evaluate_model(model, source, validation).top1
    after = evaluate_model(small, source, validation).top1
    compared = "top-1" if labelled else "agreement with the dense model"
    print(
        f"{compared} on {len(validation)} of the chosen public images, held out from fine-tuning: "
        f"{100 * before:.1f} % dense, {100 * after:.1f} % pruned"
    )


def _measure(latency: LatencyModel, dense: Model, pruned: Model) -> tuple[float, float]:
    found = compare_latency(
        {"dense": dense, "pruned": pruned}, batch_size=latency.batch_size, threads=latency.threads
    )
    return found["dense"].median, found["pruned"].median


def _prune_config(args: argparse.Namespace) -> PruneConfig:
    config = PruneConfig(neurons=NeuronConfig.of_method(args.method))
    if args.method == "tap_published":
        config = PruneConfig.as_published()
    steps = dataclasses.replace(config.allocate, round_to=RoundTo.parse(args.round_to))
    return dataclasses.replace(config, allocate=steps)


def _chosen_images(
    args: argparse.Namespace, model: Model, pool: Images
) -> tuple[np.ndarray, np.ndarray]:
    if args.payload is not None:
        Gmm.load(args.payload)  # what cannot be read is said before the pool is
        extractor = _extractor(args, model, pool)
        try:
            gmm = load_payload(args.payload, extractor)
        except InputError as error:
            if args.extractor is not None:
                raise
            raise InputError(
                f"{error}; without --extractor, the extractor is the default one of this model "
                "and pool"
            ) from error
        chosen = select_images(args, [gmm], extractor, pool)[0]
        return chosen[: args.count], chosen
    selection = read_selection(Path(args.selection))
    if selection["pool"] != pool.source.fingerprint():
        raise InputError(f"{args.selection}: was made for another pool than {args.pool}")
    devices = selection["devices"]
    if not 0 <= args.device < len(devices):
        raise InputError(f"--device is {args.device}, expected 0 to {len(devices) - 1}")
    chosen = np.asarray(devices[args.device]["indices"])
    return chosen[: selection["metric_count"]], chosen


def _extractor(args: argparse.Namespace, model: Model, pool: Images) -> Extractor:
    if args.extractor is not None:
        return Extractor.load(args.extractor)
    return build_extractor(
        DEFAULT_EXTRACTOR, pool.source, pool.indices, preprocess_of(model), model=model
    )


def _answers(model: Model, source: ImageSource, indices: np.ndarray) -> Int[np.ndarray, "n"]:
    """The model's classes for some images; -1 for all others."""
    labels = np.full(len(source), UNLABELLED, np.int32)
    for batch in batches(source, indices, preprocess_of(model), 256):
        answers = np.asarray(model.apply(batch["image"]).argmax(axis=-1))
        real = batch["mask"] > 0
        labels[batch["index"][real]] = answers[real]
    return labels
