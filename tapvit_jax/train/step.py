"""One step of training: the recipe, the schedule, augmentation, the loss and the update."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params
from tapvit_jax.structs import check_fields, to_plain
from tapvit_jax.train.classes import ClassWeights, class_logits, teacher_logits
from tapvit_jax.train.evaluate import Forward, Teacher
from tapvit_jax.train.features import apply_with_features, feature_loss

_LAST = ("norm", "fc_norm", "head", "head_dist")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      epochs: passes over the training set; 0 trains nothing.
      batch_size: images in a step, of all devices together; the last of an epoch may have fewer.
      images_per_epoch: length of a pass; None is the whole set. A shorter one takes other random
        images every time, so that sets of different sizes get the same number of steps.
      learning_rate: peak of the schedule.
      schedule: constant, or cosine to `min_rate`.
      min_rate: where the cosine ends, as a share of the peak.
      warmup_epochs: linear warm-up before the schedule.
      layer_decay: factor of the learning rate from a layer to the one before it: the head has 1,
        the last block `layer_decay`, the embedding the least (see `layer_factors`).
      weight_decay: decoupled, on kernels only.
      label_smoothing: share of a true label that is spread evenly over all classes.
      distill: weight of the teacher's soft labels against the true ones; 1 needs no labels.
      temperature: of the soft labels.
      feature_distill: weight of `features.feature_loss` beside the labels' loss.
      feature_blocks: blocks whose outputs are matched to the teacher's, negative ones from the end;
        None is what the classifier sees.
      ema: decay of the moving average of the parameters, which then is what is evaluated and
        kept as best (see `update`); None evaluates the parameters themselves.
      choose: what the best epoch is measured by: the validation labels, or agreement with and KL
        to the teacher, which needs no labels.
      shift: random translation of the training images by up to so many pixels.
      flip: random horizontal mirroring of the training images.
      cutmix: parameter of the beta distribution of how much of an image another one covers, see
        `cut_and_mix`; 0 covers nothing.
      clip_norm: largest norm of the gradient; None leaves it as it is.
      patience: epochs without a better one after which training stops; None never stops early.
      checkpoint_epochs: a checkpoint is kept every so many epochs.
      checkpoint_steps: and every so many steps, within epochs; None keeps none there.
    """

    epochs: int = 10
    batch_size: int = 64
    images_per_epoch: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    min_rate: float = 0.0
    warmup_epochs: float = 0.0
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    feature_distill: float = 0.0
    feature_blocks: tuple[int, ...] | None = None
    ema: float | None = None
    choose: Literal["labels", "teacher"] = "labels"
    shift: int = 0
    flip: bool = False
    cutmix: float = 0.0
    clip_norm: float | None = 1.0
    patience: int | None = None
    checkpoint_epochs: int = 5
    checkpoint_steps: int | None = None

    def __post_init__(self):
        check_fields(self)
        images, patience, every = self.images_per_epoch, self.patience, self.checkpoint_steps
        blocks, norm = self.feature_blocks, self.clip_norm
        for field, fine, expected in (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("images_per_epoch", images is None or images >= 1, "1 or more, or None"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "more than 0"),
            ("min_rate", 0 <= self.min_rate <= 1, "0 to 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "more than 0, at most 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and less than 1"),
            ("distill", 0 <= self.distill <= 1, "0 to 1"),
            ("temperature", 0 < self.temperature < math.inf, "more than 0"),
            ("feature_distill", 0 <= self.feature_distill < math.inf, "0 or more"),
            ("feature_blocks", blocks != (), "block numbers, or None"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or None"),
            ("shift", self.shift >= 0, "0 or more"),
            ("cutmix", 0 <= self.cutmix < math.inf, "0 or more"),
            ("clip_norm", norm is None or norm > 0, "more than 0, or None"),
            ("patience", patience is None or patience >= 1, "1 or more, or None"),
            ("checkpoint_epochs", self.checkpoint_epochs >= 1, "1 or more"),
            ("checkpoint_steps", every is None or every >= 1, "1 or more, or None"),
        ):
            if not fine:
                raise InputError(f"{field} is {getattr(self, field)!r}, expected {expected}")

    def identity(self) -> dict[str, Any]:
        """The fields as JSON values, without those that change no result."""
        plain = to_plain(self)
        del plain["checkpoint_epochs"], plain["checkpoint_steps"]
        return plain

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher's predictions count: in the loss, or in the choice of the epoch."""
        return self.distill > 0 or self.choose == "teacher"

    @classmethod
    def as_published(cls) -> "TrainConfig":
        """Adam, 1e-5 constant, 50 epochs, batch 64, cross-entropy (TAP-ViTs, 2601.02437)."""
        return cls(
            epochs=50, batch_size=64, learning_rate=1e-5, schedule="constant", clip_norm=None
        )

    def steps_per_epoch(self, images: int) -> int:
        """Batches of an epoch over a training set of so many images."""
        return max(1, math.ceil(self.images_in_epoch(images) / self.batch_size))

    def images_in_epoch(self, images: int) -> int:
        """How many images of a training set an epoch takes."""
        return min(self.images_per_epoch or images, images)

    def schedule_steps(self, images: int) -> tuple[float, float]:
        """Total and warm-up steps for a training set of so many images."""
        steps = self.steps_per_epoch(images)
        return float(steps * self.epochs), float(round(steps * self.warmup_epochs))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is fixed when a step is compiled.

    Attributes:
      forward: the student's logits from (config, params, images).
      teacher: the teacher's forward and config, if there is one.
    """

    forward: Forward
    config: Any
    options: TrainConfig
    teacher: tuple[Forward, Any] | None = None

    @classmethod
    def of(
        cls, forward: Forward, config: Any, options: TrainConfig, teacher: Teacher | None
    ) -> "Recipe":
        """A recipe from a teacher with its parameters."""
        return cls(forward, config, options, teacher and (teacher.forward, teacher.config))


def optimizer(options: TrainConfig) -> optax.GradientTransformation:
    """Clipping, Adam and decay of kernels; the learning rate is applied by `update`."""

    def kernels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    norm = options.clip_norm
    return optax.chain(
        optax.identity() if norm is None else optax.clip_by_global_norm(norm),
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
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        rate = rate * (options.min_rate + (1.0 - options.min_rate) * fall)
    return rate * jnp.clip((step + 1.0) / jnp.maximum(warmup, 1.0), 0.0, 1.0)


def layer_factors(config: Any, params: Params, decay: float) -> Params:
    """Factor of the learning rate for every parameter: decay^(L + 1 - depth).

    Of L blocks, block i has depth i + 1 (Swin's patch merging belongs to the block behind it), what
    comes before them 0, and the last normalisation and the heads L + 1.

    Raises:
      InputError: a network other than a ViT or a Swin, which has no such depths.

    Source: BEiT (2106.08254), as in timm.
    """
    if not isinstance(config, backbone.TransformerConfig):
        raise InputError(
            f"layer_decay: the network is a {type(config).__name__}, expected a ViT or a Swin"
        )
    # Not from the names: a block whose branches are all pruned away has no parameters.
    last = len(config.blocks) + 1

    def factor(path: Any, _: Any) -> float:
        name = path[0].key
        if name.startswith("blocks_"):
            return decay ** (last - 1 - int(name.removeprefix("blocks_")))
        return 1.0 if name in _LAST else decay**last

    return jax.tree_util.tree_map_with_path(factor, params)


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


def cut_and_mix(
    alpha: float,
    images: Float[Array, "b s s ch"],
    real: Float[Array, "b"],
    key: Array,
) -> tuple[Float[Array, "b s s ch"], Float[Array, "b"], Int[Array, "b"]]:
    """Cover a random box of every image by the same box of its partner.

    The box has a share lambda of the area, drawn from Beta(alpha, alpha) for every image, and a
    centre anywhere, so that it may be cut off at the border. The partner of the first image is the
    last one and so on; one in the middle covers itself, and so does padding.

    Args:
      alpha: of the distribution.
      images: a batch.
      real: 0 for padding.
      key: random key.

    Returns:
      images, the share of each that is still its own, and which one covers the rest.

    Source: CutMix (Yun et al., 1905.04899); a box for every image, ours.
    """
    share_key, centre_key = jax.random.split(key)
    b, side = images.shape[:2]
    share = jax.random.beta(share_key, alpha, alpha, (b,))
    # Wherever padding lies, images are counted without it.
    place, order = jnp.cumsum(real > 0) - 1, jnp.argsort(real <= 0, stable=True)
    partner = jnp.where(real > 0, order[(real > 0).sum() - 1 - place], jnp.arange(b))
    half = jnp.sqrt(share)[:, None, None] * side / 2
    centre = jax.random.uniform(centre_key, (b, 2, 1)) * side
    inside = jnp.abs(jnp.arange(side) + 0.5 - centre) < half
    box = inside[:, 0, :, None] & inside[:, 1, None, :]
    mixed = jnp.where(box[..., None], images[partner], images)
    return mixed, 1.0 - box.mean(axis=(1, 2)), partner


def initial_rest(options: TrainConfig, params: Params, steps: int) -> dict[str, Any]:
    """What a run carries from step to step beside its parameters.

    Keys: moments (the optimizer's), step (taken so far), losses (of the epoch's steps so far), and
    with `options.ema` the average (see `update`).
    """
    rest = {
        "moments": optimizer(options).init(params),
        "step": jnp.zeros((), jnp.int32),
        "losses": jnp.zeros(steps, jnp.float32),
    }
    if options.ema is not None:
        # A copy: the step takes what it is given of `rest` for its results.
        rest["ema"] = jax.tree.map(jnp.copy, params)
    return rest


def evaluated(state: dict[str, Any]) -> Params:
    """The parameters that a run is judged by: the average where one is kept."""
    return state["rest"].get("ema", state["params"])


def update(
    recipe: Recipe,
    params: Params,
    rest: dict[str, Any],
    batch: Mapping[str, Array],
    masks: Params | None,
    teacher_params: Params | None,
    weights: ClassWeights | None,
    schedule: Float[Array, "2"],
    key: UInt32[Array, "2"],
    epoch: Int[Array, ""],
    i: Int[Array, ""],
) -> tuple[Params, dict[str, Any]]:
    """One optimizer step: the only one there is, for one run and under vmap for many.

    With `ema` = d, step t (from 1) moves the average by 1 - min(d, (1 + t) / (10 + t)) of its
    distance to the new parameters: short runs average over their last tenth instead of their start.

    Args:
      recipe: what is fixed when this is compiled.
      params: the student's parameters.
      rest: see `initial_rest`.
      batch: "image", "label" and "mask" (0 for padding).
      masks: parameter masks; masked entries stay zero.
      teacher_params: for distillation.
      weights: of the classes; None is one for each.
      schedule: total and warm-up steps.
      key: data of the run's random key.
      epoch: from 1.
      i: step within the epoch, from 0.

    Returns:
      parameters and rest after the step.
    """
    options = recipe.options
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), epoch), i)
    images, own, partner = augment(options, batch["image"], key), None, None
    if options.cutmix > 0:
        # Not 0 or 1: those are the keys that `augment` splits it into.
        mix_key = jax.random.fold_in(key, 2)
        images, own, partner = cut_and_mix(options.cutmix, images, batch["mask"], mix_key)
    share = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1.0)
    soft, wanted = None, None
    if options.distill > 0 or options.feature_distill > 0:
        logits, wanted = _forward(options, *recipe.teacher, teacher_params, images)
        if options.distill > 0:
            soft = jax.nn.softmax(teacher_logits(logits, weights, options.temperature))

    def loss_fn(params: Params) -> Array:
        if masks is not None:
            # The mask inside the loss zeroes the gradients of pruned entries, so that neither they
            # nor their moments ever leave zero.
            params = jax.tree.map(lambda p, m: p * m, params, masks)
        logits, features = _forward(options, recipe.forward, recipe.config, params, images)
        logits = logits.astype(jnp.float32)
        loss = jnp.zeros(logits.shape[0])
        if options.distill < 1:
            hard = jax.nn.one_hot(batch["label"], logits.shape[-1])
            if own is not None:
                hard = own[:, None] * hard + (1.0 - own[:, None]) * hard[partner]
            hard = optax.smooth_labels(hard, options.label_smoothing)
            seen = class_logits(logits, weights and weights.labels)
            loss += (1.0 - options.distill) * optax.softmax_cross_entropy(seen, hard)
        if soft is not None:
            restricted = class_logits(logits, weights and weights.classes, options.temperature)
            soft_loss = optax.softmax_cross_entropy(restricted, soft)
            loss += options.distill * options.temperature**2 * soft_loss
        if wanted:
            loss += options.feature_distill * feature_loss(features, wanted)
        return (loss * share).sum()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, moments = optimizer(options).update(gradients, rest["moments"], params)
    rate = learning_rate(options, rest["step"], schedule)
    if options.layer_decay < 1:
        factors = layer_factors(recipe.config, params, options.layer_decay)
        updates = jax.tree.map(lambda u, factor: factor * u, updates, factors)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    losses = rest["losses"].at[i].set(loss)
    after = {"moments": moments, "step": rest["step"] + 1, "losses": losses}
    if options.ema is not None:
        t = after["step"].astype(jnp.float32)
        moved = 1.0 - jnp.minimum(options.ema, (1.0 + t) / (10.0 + t))
        after["ema"] = jax.tree.map(lambda e, p: e + moved * (p - e), rest["ema"], params)
    return params, after


def _forward(
    options: TrainConfig,
    forward: Forward,
    config: Any,
    params: Params,
    images: Float[Array, "b s s ch"],
) -> tuple[Float[Array, "b c"], list[Array]]:
    """Logits, and in the same pass the features that are matched, if any."""
    if options.feature_distill > 0:
        return apply_with_features(config, params, images, options.feature_blocks)
    return forward(config, params, images), []
