"""prune: the cloud's whole work for one device."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from tapvit_jax.commands.common import (
    Command,
    Images,
    add_checkpoints_option,
    add_image_options,
    add_model_options,
    check_model_out,
    checkpoints_of,
    hold_out,
    open_images,
    open_labelled,
    open_model,
    print_costs,
)
from tapvit_jax.commands.devices import (
    CHOICE,
    DEFAULT_EXTRACTOR,
    add_selection_options,
    fill_in_choice,
    load_payload,
    read_selection,
    select_images,
)
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.export.latency import compare_latency
from tapvit_jax.importance.criteria import CRITERIA
from tapvit_jax.models import store
from tapvit_jax.models.registry import Model, preprocess_of
from tapvit_jax.pipeline import (
    PruneConfig,
    allocate_measured,
    even_batch_size,
    plan_masks,
    reshape_checked,
    score,
    scoring_batches,
)
from tapvit_jax.progress import Progress, Step
from tapvit_jax.proxy.features import Extractor, build_extractor
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.shares import fit_classes, mixture_shares, rows_for_classes
from tapvit_jax.prune.allocate import RoundTo, Widths, allocate, check_budget
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost, images_at_once
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.prune.mask import apply_masks
from tapvit_jax.prune.recover import Method as RecoverMethod
from tapvit_jax.prune.recover import RecoverConfig, recover
from tapvit_jax.structs import to_plain
from tapvit_jax.train.classes import class_weights, prior_weights
from tapvit_jax.train.evaluate import evaluate_indices, predict
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, TrainResult, train

# Of so many images one is two points.
_FEW = 50


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
    c.add_argument("--device", type=int, help="which device of the selection file, the first is 0")
    c.add_argument("--payload", help="instead of --selection: choose for this payload")
    c.add_argument(
        "--extractor",
        help="what the payload was made with; by default the extractor command's, built anew "
        "from the model and the pool",
    )
    c.add_argument("--latency-table", help="what bench-latency wrote, for budgets on latency")
    labels = ", ".join(name for name, found in CRITERIA.items() if found.needs_labels)
    c.add_argument(
        "--method",
        choices=tuple(CRITERIA),
        default="tap",
        help=f"criterion that ranks the units, tap by default; with a labelled pool only: {labels}",
    )
    widths = c.add_argument_group("widths", "see AllocateConfig in docs/methods.md")
    widths.add_argument(
        "--widths",
        choices=get_args(Widths),
        help="how they follow from the scores, sensitivity by default",
    )
    widths.add_argument(
        "--attention",
        choices=("dims", "heads"),
        help="attention loses dims of every head (the default) or whole heads",
    )
    widths.add_argument(
        "--branches",
        action="store_true",
        default=None,
        help="whole MLPs and attentions may go, with --widths exact or greedy",
    )
    widths.add_argument(
        "--min-keep",
        type=float,
        help="least share of units that a branch keeps, 0.1 by default",
    )
    widths.add_argument("--min-dim", type=int, help="least number of them, 1 by default")
    widths.add_argument(
        "--round-to", default="1", help="multiple of widths, such as 8 or mlp=64,qk=8"
    )
    c.add_argument(
        "--recover",
        choices=get_args(RecoverMethod),
        default="ridge",
        help="closed-form recovery before any fine-tuning: least squares in the layers behind what "
        "is pruned (ridge, the default), its mean folded into their biases (mean), the device's "
        "prior alone (prior), or none",
    )
    c.add_argument(
        "--prior",
        choices=("mixture", "metric", "dense"),
        help="unless --recover is none: move the classifier's bias to the classes that the "
        "payload's mixture tells of (mixture, the default with --payload), to those that the "
        "chosen images show (metric, the default with --selection), or leave it as it is (dense)",
    )
    c.add_argument(
        "--recover-epochs", type=int, default=5, help="fine-tuning after that; 0 for none"
    )
    c.add_argument(
        "--label-free", action="store_true", help="ignore the pool's labels: distil only"
    )
    c.add_argument("--learning-rate", type=float, default=1e-4, help="of the fine-tuning")
    c.add_argument(
        "--batch-size",
        type=int,
        help="images that are scored together, and of a step of the fine-tuning, 64 by default; "
        "fewer take less memory",
    )
    add_selection_options(c)
    add_checkpoints_option(c, "fine-tuning")
    c.add_argument("--out", required=True, help="directory of the smaller model")
    add_image_options(c)


def prune(args: argparse.Namespace) -> None:
    """Choose images for a device, score, plan, recover, fine-tune and reshape its model."""
    check_model_out(args)
    _check_choice(args)
    checkpoints = checkpoints_of(args)
    recipe = TrainConfig(
        epochs=args.recover_epochs, learning_rate=args.learning_rate, checkpoint_epochs=1
    )
    if args.batch_size is not None:
        recipe = dataclasses.replace(recipe, batch_size=args.batch_size)
    if args.prior is None:
        args.prior = "metric" if args.payload is None else "mixture"
    budget = Budget.parse(args.budget)
    config = _prune_config(args)
    model = open_model(args)
    preprocess = preprocess_of(model)
    latency = None if args.latency_table is None else LatencyModel.load(args.latency_table)
    # Before any work: what cannot be met is refused now.
    check_budget(model, budget, config.allocate, latency)
    opened = open_source(args.pool) if args.label_free else open_labelled(args.pool, model)
    pool = open_images(opened, preprocess, split=args.split, skip_corrupt=args.skip_corrupt)
    progress = Progress(6.5 + args.recover_epochs)
    with progress.step("select", 1) as step:
        if args.payload is None:
            (metric, finetune), device = _read_selection(args, pool), None
        else:
            metric, finetune, device = _select(args, model, pool, step.advance)
    source = pool.source
    labelled = not args.label_free and bool((source.labels[finetune] >= 0).all())
    if CRITERIA[args.method].needs_labels and not labelled:
        why = "--label-free is given" if args.label_free else f"{args.pool} has none that fit"
        raise InputError(f"--method {args.method} needs the labels of the pool, but {why}")
    scored = "units and layers" if config.allocate.reads_layers else "units"
    with progress.step(f"score {scored}", 2) as step:
        units, layers = score(model, source, metric, config, seed=args.seed, on_share=step.advance)
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
    options = RecoverConfig(args.recover, prior=args.prior)
    # What is printed at the end is of images that no weights were fitted to.
    fitted, prior = metric[~np.isin(metric, validation)], None
    if options.moves_prior and not model.prior:
        with progress.step("predict public images", 1) as step:
            told = device if options.prior == "mixture" else None
            seen = _class_shares(told, model, pool, fitted, step.advance)
            prior = prior_weights(seen, len(fitted))
    with progress.step("recover in closed form", 1) as step:
        size = even_batch_size(len(fitted), config.batch_size)
        solved = recover(
            model,
            plan,
            scoring_batches(source, fitted, preprocess, size),
            config=options,
            prior=prior,
            on_share=step.advance,
        )
    small: Model
    difference: float

    def finish(tuned: TrainResult) -> None:
        # While there are checkpoints: the disk may be full.
        nonlocal small, difference
        small, difference = reshape_checked(
            solved.replace(params=tuned.params), plan, source.load(metric[:32], preprocess)
        )
        history = {**small.history, "budget": str(budget), "criterion": args.method}
        history["widths"] = to_plain(config.allocate)
        history |= {"recovery": args.recover, "recover_epochs": args.recover_epochs}
        history |= {"seed": args.seed}
        history |= {} if measured is None else {"latency": measured}
        small = small.replace(name=f"{model.name}-pruned", history=history)
        store.save(small, args.out)

    teacher = Teacher(model.config, model.params)
    with progress.step("fine-tune", args.recover_epochs + 1) as step:
        # A model that has the prior since it was last pruned teaches it; labels would not.
        by_labels = labelled and not model.prior
        recipe = dataclasses.replace(
            recipe,
            distill=0.5 if by_labels else 1.0,
            choose="labels" if by_labels else "teacher",
        )
        train(
            model.config,
            solved.params,
            TrainData(source, preprocess, training, validation),
            recipe,
            seed=args.seed,
            masks=plan_masks(plan),
            teacher=teacher,
            prior=prior,
            checkpoints=checkpoints,
            on_share=step.advance,
            on_result=finish,
        )
    models = {"dense": model, "pruned": apply_masks(model, plan)}
    if args.recover != "none":
        models["recovered in closed form"] = solved
    if args.recover_epochs:
        models["fine-tuned"] = small
    reference = {} if labelled else {"teacher": teacher}
    if prior is not None:
        seen = source.labels[validation] if labelled else None
        reference["weights"] = class_weights(None, prior, len(prior), None, seen)
    with progress.step("evaluate", 0.5) as step:
        shares = [
            f"{100 * _top1(found, source, validation, step, len(models), **reference):.1f} % {name}"
            for name, found in models.items()
        ]
    progress.close()
    print_costs({"dense": cost(model.config), "pruned": cost(small.config)})
    if measured is not None:
        print(
            f"ONNX Runtime, batch {latency.batch_size}, {latency.threads} threads: "
            f"{measured['dense_ms']:.2f} ms dense, {measured['pruned_ms']:.2f} ms pruned "
            f"(predicted {measured['predicted_ms']:.2f})"
        )
    print(f"largest difference between masked and reshaped logits: {difference:.1e} of the scale")
    compared = "top-1" if labelled else "agreement with the dense model"
    if "weights" in reference:
        # With which the dense model as it is does not wholly agree.
        compared += (
            " (weighted by the device's classes)" if labelled else " moved to the device's classes"
        )
    print(
        f"{compared} on {len(validation)} of the chosen public images, to which no weights were "
        f"fitted{', but which chose the epoch' if args.recover_epochs else ''}: {', '.join(shares)}"
    )
    if len(validation) < _FEW:
        print(f"{len(validation)} images tell little, expected {_FEW} or more", file=sys.stderr)


def _check_choice(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing beside a selection file or a payload.

    Raises:
      InputError: such an option, or a count below one.
    """
    if (args.selection is None) == (args.payload is None):
        found = "neither" if args.payload is None else "both"
        raise InputError(f"prune needs either --selection or --payload, found {found}")
    if args.recover == "none" and args.prior is not None:
        raise InputError(f"--prior {args.prior} needs another --recover than none")
    if args.recover == "prior" and args.prior == "dense":
        raise InputError("--recover prior does nothing with --prior dense")
    if args.payload is not None:
        if args.device is not None:
            raise InputError("--device is of a --selection file, a --payload is one device's")
        fill_in_choice(args)
        return
    if args.prior == "mixture":
        raise InputError("--prior mixture needs --payload, a selection file holds no mixture")
    for name in ("extractor", "features", "count", *CHOICE):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise InputError(f"--{option} needs --payload, in a selection file the choice is made")


def _top1(
    model: Model,
    source: ImageSource,
    indices: np.ndarray,
    step: Step,
    models: int,
    **reference: Any,
) -> float:
    """Accuracy of one of several models; with a teacher, how often its answer is given."""
    preprocess = preprocess_of(model)
    found = evaluate_indices(
        model.config,
        model.params,
        source,
        indices,
        preprocess,
        images_at_once(model.config, len(indices)),
        on_share=lambda share: step.advance(share / models),
        **reference,
    )
    return found.top1


def _measure(latency: LatencyModel, dense: Model, pruned: Model) -> tuple[float, float]:
    found = compare_latency(
        {"dense": dense, "pruned": pruned}, batch_size=latency.batch_size, threads=latency.threads
    )
    return found["dense"].median, found["pruned"].median


def _prune_config(args: argparse.Namespace) -> PruneConfig:
    published = args.method == "tap_published"
    config = PruneConfig.as_published() if published else PruneConfig()
    config = dataclasses.replace(config, **config.ranked_by(args.method))
    names = ("widths", "attention", "branches", "min_keep", "min_dim")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    allocate = dataclasses.replace(config.allocate, round_to=RoundTo.parse(args.round_to), **given)
    layers = dataclasses.replace(config.layers, attention=allocate.attention)
    if allocate.branches:
        layers = dataclasses.replace(layers, sparsity=(*layers.sparsity, 1.0))
    size = config.batch_size if args.batch_size is None else args.batch_size
    return dataclasses.replace(config, allocate=allocate, layers=layers, batch_size=size)


def _select(
    args: argparse.Namespace, model: Model, pool: Images, on_share: Callable[[float], None]
) -> tuple[np.ndarray, np.ndarray, tuple[Gmm, np.ndarray]]:
    """The images chosen for a payload, its mixture and the pool's features."""
    Gmm.load(args.payload)  # what cannot be read is said before the pool is
    # Without an extractor, the images go through the network twice.
    part = 0.5 if args.extractor is None else 1.0

    def on_part(share: float) -> None:
        on_share(part * share)

    extractor = _extractor(args, model, pool, on_part)
    try:
        gmm = load_payload(args.payload, extractor)
    except InputError as error:
        if args.extractor is not None:
            raise
        raise InputError(
            f"{error}; without --extractor, the extractor is the default one of this model and pool"
        ) from error
    (chosen,), features = select_images(args, [gmm], extractor, pool, on_part)
    return chosen[: args.count], chosen, (gmm, features)


def _read_selection(args: argparse.Namespace, pool: Images) -> tuple[np.ndarray, np.ndarray]:
    selection = read_selection(Path(args.selection))
    if selection["pool"] != pool.source.images_fingerprint():
        raise InputError(f"{args.selection}: was made for another pool than {args.pool}")
    devices = selection["devices"]
    device = args.device or 0
    if not 0 <= device < len(devices):
        raise InputError(
            f"--device is {device}, expected 0 to {len(devices) - 1}, the devices of "
            f"{args.selection}"
        )
    chosen = np.asarray(devices[device]["indices"])
    return chosen[: selection["metric_count"]], chosen


def _class_shares(
    device: tuple[Gmm, np.ndarray] | None,
    model: Model,
    pool: Images,
    metric: np.ndarray,
    on_share: Callable[[float], None],
) -> Float[np.ndarray, "c"]:
    """How often the device sees each class: by its mixture, else by the metric dataset."""

    def predicted(images: np.ndarray) -> Float[np.ndarray, "n c"]:
        teacher = Teacher(model.config, model.params)
        return predict(
            teacher,
            pool.source,
            images,
            preprocess_of(model),
            images_at_once(model.config, len(images)),
            on_share=on_share,
        )

    if device is None:
        return predicted(metric).mean(axis=0)
    gmm, features = device
    rows = rows_for_classes(len(features), model.config.num_classes)
    return mixture_shares(gmm, fit_classes(features[rows], predicted(pool.indices[rows])))


def _extractor(
    args: argparse.Namespace, model: Model, pool: Images, on_share: Callable[[float], None]
) -> Extractor:
    if args.extractor is not None:
        return Extractor.load(args.extractor)
    return build_extractor(
        DEFAULT_EXTRACTOR,
        pool.source,
        pool.indices,
        preprocess_of(model),
        model=model,
        on_share=on_share,
    )
