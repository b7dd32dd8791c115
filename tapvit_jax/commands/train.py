"""train: a dense model of one's own classes, from which devices' models are cut."""

import argparse
from typing import Any

from tapvit_jax.commands.common import (
    Command,
    add_checkpoints_option,
    add_image_options,
    add_model_options,
    check_labels,
    check_model_out,
    checkpoints_of,
    hold_out,
    load_preset,
    open_directory,
    open_images,
    open_model,
    print_costs,
    seed,
)
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.models import store
from tapvit_jax.models.backbone import check_prunable
from tapvit_jax.models.registry import Model, new_classifier, preprocess_of
from tapvit_jax.pipeline import evaluate_model
from tapvit_jax.progress import Progress
from tapvit_jax.prune.cost import cost
from tapvit_jax.structs import to_plain
from tapvit_jax.train.finetune import TrainConfig, TrainData, TrainResult
from tapvit_jax.train.finetune import train as run_training

# Fields of TrainConfig as options: the default here, and what to say of them.
_RECIPE: dict[str, tuple[Any, str]] = {
    "epochs": (10, "passes over the images"),
    "batch_size": (64, "images in a step"),
    "learning_rate": (1e-4, "peak of the cosine schedule"),
    "warmup_epochs": (1.0, "linear warm-up before it"),
    "layer_decay": (0.75, "factor of the rate from a layer to the one before it"),
    "weight_decay": (0.05, "decoupled, on kernels only"),
    "label_smoothing": (0.1, "share of a label that is spread over all classes"),
    "cutmix": (0.0, "parameter of its beta distribution, 0 for none"),
    "shift": (0, "random translation by up to so many pixels"),
}


def register(command: Command) -> None:
    """Add the command of this module."""
    c = command("train", train)
    add_model_options(c)
    c.add_argument("--images", required=True, metavar="IMAGES")
    c.add_argument(
        "--new-classifier",
        action="store_true",
        help="put one for the classes of IMAGES in the place of the model's, if it has one",
    )
    recipe = c.add_argument_group("recipe", "see TrainConfig in docs/methods.md")
    for name, (default, text) in _RECIPE.items():
        recipe.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{text}, {default} by default",
        )
    recipe.add_argument("--flip", action="store_true", help="mirror images at random")
    c.add_argument("--workers", type=int, default=0, help="processes that decode, 0 for threads")
    c.add_argument("--seed", type=seed, default=0)
    add_checkpoints_option(c, "training")
    c.add_argument("--out", required=True, help="directory of the trained model")
    add_image_options(c)


def train(args: argparse.Namespace) -> None:
    """Train a model on labelled images; a tenth of them chooses the epoch."""
    check_model_out(args)
    checkpoints = checkpoints_of(args)
    given = {name: getattr(args, name) for name in _RECIPE}
    recipe = TrainConfig(**given, flip=args.flip, checkpoint_epochs=1)
    model, source = _open(args)
    check_prunable(model.config)
    preprocess = preprocess_of(model)
    images = open_images(source, preprocess, split=args.split, skip_corrupt=args.skip_corrupt)
    check_labels(args.images, images, model)
    training, validation = hold_out(images.indices, args.seed)
    data = TrainData(source, preprocess, training, validation, args.workers)

    def trained(result: TrainResult) -> Model:
        return model.replace(
            params=result.params,
            # Of a model without names, whose classes were taken to be these.
            class_names=model.class_names or source.class_names,
            history={
                **model.history,
                "training": {
                    "images": source.images_fingerprint(),
                    "count": len(images.indices),
                    "recipe": to_plain(recipe),
                    "epoch": result.best_epoch,
                    "seed": args.seed,
                },
            },
        )

    progress = Progress(recipe.epochs + 1.2)
    with progress.step("train", recipe.epochs + 1) as step:
        result = run_training(
            model.config,
            model.params,
            data,
            recipe,
            seed=args.seed,
            checkpoints=checkpoints,
            on_share=step.advance,
            # While there are checkpoints: the disk may be full.
            on_result=lambda result: store.save(trained(result), args.out),
        )
    with progress.step("evaluate", 0.2) as step:
        before, after = (
            evaluate_model(
                found, source, validation, on_share=lambda share: step.advance(share / 2)
            )
            for found in (model, trained(result))
        )
    progress.close()
    print_costs({"model": cost(model.config)})
    print(
        f"top-1 on {len(validation)} images that were held out and chose the epoch: "
        f"{100 * before.top1:.1f} % before, {100 * after.top1:.1f} % after epoch "
        f"{result.best_epoch} of {recipe.epochs}"
    )


def _open(args: argparse.Namespace) -> tuple[Model, ImageSource]:
    """The model to start from, and the images with the labels that it is to learn."""
    if not args.new_classifier:
        model = open_model(args)
        if model.prior:
            raise InputError(
                f"{args.model}: has a device's prior in its logits, which labels would take out: "
                "expected a dense model"
            )
        return model, open_source(args.images, model.class_names or None)
    given = [item for item in args.set or [] if item.startswith("num_classes=")]
    if args.classes or given:
        raise InputError(
            f"{'--classes' if args.classes else f'--set {given[0]}'}: with --new-classifier, the "
            "classes are those of --images"
        )
    source = open_source(args.images)
    names = source.class_names
    if not names:
        raise InputError(f"{args.images}: has no classes, expected a folder of images per class")
    if args.weights is None:
        if args.set:
            raise InputError("--set describes --weights, which is not given")
        return new_classifier(open_directory(args.model), names), source
    model = load_preset(args.model, args, new_classifier=True, num_classes=len(names))
    return model.replace(class_names=names), source
