"""Training: from scratch, and recovery of a masked or reshaped model by fine-tuning."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params, tree_hash
from tapvit_jax.structs import check_choices, to_plain
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.evaluate import Forward, Metrics, evaluate

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      epochs: passes over the training set; 0 trains nothing.
      images_per_epoch: length of a pass; None is the whole set. A shorter one takes other random
        images every time, so that sets of different sizes get the same number of steps.
      learning_rate: peak of the schedule.
      schedule: constant, or cosine to zero.
      warmup_epochs: linear warm-up before the schedule.
      weight_decay: decoupled, on kernels only.
      distill: weight of the teacher's soft labels against the true ones; 1 needs no labels.
      temperature: of the soft labels.
      shift: random translation of the training images by up to so many pixels.
      flip: random horizontal mirroring of the training images.
      clip_norm: largest norm of the gradient.
      checkpoint_epochs: a checkpoint is kept every so many epochs.
    """

    epochs: int = 10
    batch_size: int = 64
    images_per_epoch: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    shift: int = 0
    flip: bool = False
    clip_norm: float = 1.0
    checkpoint_epochs: int = 5

    def __post_init__(self):
        check_choices(self)
        images = self.images_per_epoch
        for field, fine, expected in (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("images_per_epoch", images is None or images >= 1, "1 or more, or None"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "more than 0"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
            ("distill", 0 <= self.distill <= 1, "0 to 1"),
            ("temperature", 0 < self.temperature < math.inf, "more than 0"),
            ("shift", self.shift >= 0, "0 or more"),
            ("clip_norm", self.clip_norm > 0, "more than 0"),
            ("checkpoint_epochs", self.checkpoint_epochs >= 1, "1 or more"),
        ):
            if not fine:
                raise InputError(f"{field} is {getattr(self, field)!r}, expected {expected}")

    @classmethod
    def as_published(cls) -> "TrainConfig":
        """Adam, 1e-5 constant, 50 epochs, batch 64, cross-entropy (TAP-ViTs, 2601.02437)."""
        return cls(epochs=50, batch_size=64, learning_rate=1e-5, schedule="constant")


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What to train on and what to choose the epoch by.

    Attributes:
      source: where the images come from.
      train: indices to train on.
      validation: indices that choose the epoch; never the ones that give the final score.
    """

    source: ImageSource
    preprocess: Preprocess
    train: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """Parameters of the best epoch, and what was measured after every epoch.

    Attributes:
      params: parameters after the epoch with the best validation accuracy (the start included).
      best_epoch: that epoch; 0 is the start.
      record: validation metrics of every epoch.
    """

    params: Params
    best_epoch: int
    record: list[Record]


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A fixed network whose soft labels the student learns."""

    config: Any
    params: Params
    forward: Forward = backbone.apply


def train(
    config: Any,
    params: Params,
    data: TrainData,
    options: TrainConfig,
    *,
    seed: int,
    forward: Forward = backbone.apply,
    masks: Params | None = None,
    teacher: Teacher | None = None,
    checkpoints: Path | None = None,
    on_epoch: Callable[[int, Metrics], None] | None = None,
) -> TrainResult:
    """Train a network and return the parameters of its best epoch.

    The epoch is chosen by validation accuracy, then loss; the start counts as epoch 0, so that
    training never returns something worse than it was given. With `checkpoints`, an interrupted
    run continues where it stopped and ends with the result of an uninterrupted one.

    Args:
      config: the network's config (hashable, it fixes all shapes).
      params: where to start.
      data: images and indices.
      options: the recipe.
      seed: for the order of the images and their augmentation.
      forward: logits from (config, params, images).
      masks: parameter masks (see `prune.mask.param_masks`); masked entries stay exactly zero.
      teacher: for `options.distill` > 0.
      checkpoints: directory of the run's checkpoints; emptied when the run is done.
      on_epoch: called after every epoch with its validation metrics.

    Raises:
      InputError: no images, distillation without a teacher, labels missing where needed, a loss
        that is no longer finite, or checkpoints of another run.
    """
    if options.distill > 0 and teacher is None:
        raise InputError("distill > 0 needs a teacher")
    if options.epochs > 0 and len(data.train) == 0:
        raise InputError("training needs at least one image")
    if options.distill < 1 and (data.source.labels[data.train] < 0).any():
        raise InputError("training on labels needs labels; without them set distill to 1.0")
    per_epoch = min(options.images_per_epoch or len(data.train), len(data.train))
    steps = max(1, math.ceil(per_epoch / options.batch_size))
    schedule = jnp.asarray(
        [steps * options.epochs, round(steps * options.warmup_epochs)], jnp.float32
    )
    masked = params if masks is None else jax.tree.map(lambda p, m: p * m, params, masks)
    optimizer = _optimizer(options)
    start = evaluate(config, masked, _validation_batches(data, options), forward)
    state = {
        "params": masked,
        "moments": optimizer.init(masked),
        "step": jnp.zeros((), jnp.int32),
        "best": masked,
    }
    record = [{"epoch": 0, "top1": start.top1, "loss": start.loss}]
    key = jax.random.key(seed)
    with contextlib.ExitStack() as stack:
        keeper, first = None, 1
        if checkpoints is not None:
            identity = {"options": to_plain(options), "config": to_plain(config), "seed": seed}
            identity |= _start_identity(params, data, masks, teacher)
            keeper = stack.enter_context(Checkpoints(checkpoints, identity))
            found = keeper.restore(state)
            if found is not None:
                epoch, state, kept = found
                record, first = kept["epochs"], epoch + 1
        for epoch in range(first, options.epochs + 1):
            losses = []
            for i, batch in enumerate(_train_batches(data, options, seed, epoch, per_epoch)):
                batch_key = jax.random.fold_in(jax.random.fold_in(key, epoch), i)
                state["params"], state["moments"], state["step"], loss = _step(
                    (forward, config, options, teacher and (teacher.forward, teacher.config)),
                    state["params"],
                    state["moments"],
                    state["step"],
                    batch,
                    masks,
                    teacher.params if teacher else None,
                    schedule,
                    batch_key,
                )
                losses.append(loss)
            mean_loss = float(jnp.stack(losses).mean())
            found = evaluate(config, state["params"], _validation_batches(data, options), forward)
            if not math.isfinite(mean_loss + found.loss):
                raise InputError(
                    f"the training loss became {mean_loss} and the validation loss {found.loss} "
                    f"in epoch {epoch}: lower learning_rate (now {options.learning_rate})"
                )
            record.append(
                {"epoch": epoch, "top1": found.top1, "loss": found.loss, "train_loss": mean_loss}
            )
            if _best(record) == epoch:
                state["best"] = state["params"]
            if keeper is not None and epoch % options.checkpoint_epochs == 0:
                keeper.save(epoch, state, {"epochs": record})
            if on_epoch is not None:
                on_epoch(epoch, found)
    return TrainResult(state["best"], _best(record), record)


def _start_identity(
    params: Params, data: TrainData, masks: Params | None, teacher: Teacher | None
) -> dict[str, Any]:
    return {
        "source": data.source.fingerprint(),
        "preprocess": to_plain(data.preprocess),
        "train": data.train.tolist(),
        "validation": data.validation.tolist(),
        "params": tree_hash(params),
        "masks": None if masks is None else tree_hash(masks),
        "teacher": teacher and [to_plain(teacher.config), tree_hash(teacher.params)],
    }


def _best(record: list[Record]) -> int:
    return max(record, key=lambda row: (row["top1"], -row["loss"], -row["epoch"]))["epoch"]


def _validation_batches(data: TrainData, options: TrainConfig):
    return batches(data.source, data.validation, data.preprocess, options.batch_size)


def _train_batches(data: TrainData, options: TrainConfig, seed: int, epoch: int, count: int):
    order = np.random.default_rng([seed, epoch]).permutation(data.train)[:count]
    return batches(data.source, order, data.preprocess, options.batch_size)


def _optimizer(options: TrainConfig) -> optax.GradientTransformation:
    def kernels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(options.weight_decay, mask=kernels),
    )


def learning_rate(
    options: TrainConfig, step: Array, schedule: Float[Array, "2"]
) -> Float[Array, ""]:
    """Learning rate at a step; `schedule` holds the total and the warm-up steps.

    The lengths are traced, so that runs of different lengths share one compiled step.
    """
    total, warmup = schedule
    step = step.astype(jnp.float32)
    rate = jnp.asarray(options.learning_rate, jnp.float32)
    if options.schedule == "cosine":
        progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return rate * jnp.clip((step + 1.0) / jnp.maximum(warmup, 1.0), 0.0, 1.0)


def augment(
    options: TrainConfig, images: Float[Array, "b s s ch"], key: Array
) -> Float[Array, "b s s ch"]:
    """Random translation (edges repeated) and mirroring, each image on its own."""
    flip_key, shift_key = jax.random.split(key)
    b, height, width, _ = images.shape
    if options.flip:
        flip = jax.random.bernoulli(flip_key, shape=(b, 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
    if options.shift:
        pad = options.shift
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
        offsets = jax.random.randint(shift_key, (b, 2), 0, 2 * pad + 1)

        def crop(image: Array, offset: Array) -> Array:
            return jax.lax.dynamic_slice(
                image, (offset[0], offset[1], 0), (height, width, image.shape[-1])
            )

        images = jax.vmap(crop)(padded, offsets)
    return images


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2,))
def _step(
    static: tuple,
    params: Params,
    moments: Any,
    step: Array,
    batch: Mapping[str, Array],
    masks: Params | None,
    teacher_params: Params | None,
    schedule: Array,
    key: Array,
) -> tuple[Params, Any, Array, Array]:
    forward, config, options, teacher = static
    images = augment(options, batch["image"], key)
    weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1.0)
    soft = None
    if options.distill > 0:
        logits = teacher[0](teacher[1], teacher_params, images)
        soft = jax.nn.softmax(logits.astype(jnp.float32) / options.temperature)

    def loss_fn(params: Params) -> Array:
        if masks is not None:
            # The mask inside the loss zeroes the gradients of pruned entries, so that neither they
            # nor their moments ever leave zero.
            params = jax.tree.map(lambda p, m: p * m, params, masks)
        logits = forward(config, params, images).astype(jnp.float32)
        loss = jnp.zeros(logits.shape[0])
        if options.distill < 1:
            hard = jax.nn.one_hot(batch["label"], logits.shape[-1])
            hard = optax.smooth_labels(hard, options.label_smoothing)
            loss += (1.0 - options.distill) * optax.softmax_cross_entropy(logits, hard)
        if soft is not None:
            soft_loss = optax.softmax_cross_entropy(logits / options.temperature, soft)
            loss += options.distill * options.temperature**2 * soft_loss
        return (loss * weight).sum()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, moments = _optimizer(options).update(gradients, moments, params)
    rate = learning_rate(options, step, schedule)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, moments, step + 1, loss
