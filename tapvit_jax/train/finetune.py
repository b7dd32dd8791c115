"""Training: from scratch, and recovery of a masked or reshaped model by fine-tuning."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped

from tapvit_jax import distributed
from tapvit_jax.data.base import ImageSource, check_indices
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash
from tapvit_jax.models import backbone, convnet
from tapvit_jax.models.params import Params, check_masks, check_params, tree_hash
from tapvit_jax.sharding import AXIS, accelerator_mesh, data_mesh
from tapvit_jax.stages import Scratch
from tapvit_jax.structs import to_plain
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.classes import ClassWeights, class_weights
from tapvit_jax.train.evaluate import KEYS, Forward, Metrics, Teacher, evaluate_indices
from tapvit_jax.train.features import check_features
from tapvit_jax.train.loop import Program, State, TrainResult, best_epoch, run_epochs
from tapvit_jax.train.step import (
    Recipe,
    TrainConfig,
    evaluated,
    initial_rest,
    layer_factors,
    update,
)

_step = jax.jit(update, static_argnums=0, donate_argnums=2)


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What to train on and what to choose the epoch by.

    Attributes:
      source: where the images come from.
      preprocess: how they become the network's input.
      train: indices to train on.
      validation: indices that choose the epoch; never the ones that give the final score.
      workers: processes that decode images (see `data.pipeline.batches`).
    """

    source: ImageSource
    preprocess: Preprocess
    train: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "m"]
    workers: int = 0


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
    classes: Shaped[np.ndarray, "c"] | None = None,
    prior: Float[np.ndarray, "c"] | None = None,
    mesh: Mesh | None = None,
    checkpoints: Path | Scratch | None = None,
    on_epoch: Callable[[int, Metrics], None] | None = None,
    on_share: Callable[[float], None] = lambda share: None,
    on_result: Callable[[TrainResult], None] | None = None,
) -> TrainResult:
    """Train a network and return the parameters of its best epoch.

    The epoch is chosen by validation accuracy, then loss (`options.choose="teacher"`: agreement
    with the teacher, then KL to it); the start counts as epoch 0, so that training never returns
    something worse than it was given. With `checkpoints`, an interrupted
    run continues where it stopped and ends with the result of an uninterrupted one.

    Args:
      config: the network's config (hashable, it fixes all shapes).
      params: where to start.
      data: images and indices.
      options: the recipe.
      seed: for the order of the images and their augmentation.
      forward: logits from (config, params, images).
      masks: parameter masks (see `prune.mask.param_masks`); masked entries stay exactly zero.
      teacher: for `options.distill` or `feature_distill` > 0, or `choose="teacher"`.
      classes: a mask or weights of the device's likely classes (see `classes.likely_classes`):
        soft labels and the comparison with the teacher are restricted to them. None is all.
      prior: how much likelier each class is on the device (see `classes.prior_weights`): the
        teacher's predictions take it into account, and labels are learned and validated as those of
        images with other classes than the device's. None leaves all of them as they are.
      mesh: devices over which every batch is spread, of all processes; each process reads only its
        own rows. None is as many accelerators of every process as divide a batch; of one process
        on a CPU, one device.
      checkpoints: directory of the run's checkpoints, which go when the run is done, and it with
        them if nothing else is in it. In a stage's `Scratch` those of another run are deleted, and
        the stage empties it.
      on_epoch: called after every epoch with its validation metrics.
      on_share: called with every share of the work that is done, after every step.
      on_result: called with the result while the checkpoints are still there, which stay if it
        raises: to save it.

    Raises:
      InputError: no images or ones that the source does not have, a recipe that needs a teacher
        without one, labels missing or beyond the network's classes where they are read, parameters
        or masks of another network, networks without the features or layers that the recipe names,
        a shift by as much as an image's side, classes or a prior that are not the network's, a loss
        that is no longer finite, a batch or mesh that cannot be spread, or a checkpoint
        directory that is another run's or holds something else under a checkpoint's name.
    """
    recipe = Recipe.of(forward, config, options, teacher)
    check_run(recipe, params, data, masks, teacher)
    weights = None
    if classes is not None or prior is not None:
        count = class_count(recipe, params, data.preprocess)
        weights = run_weights(options, data, classes, prior, count)
    devices = _devices(mesh, options.batch_size)
    with contextlib.ExitStack() as stack:
        keeper = None
        if checkpoints is not None:
            identity = {"options": options.identity(), "config": to_plain(config), "seed": seed}
            identity |= {"source": data.source.fingerprint()}
            identity |= {"preprocess": to_plain(data.preprocess)}
            identity |= run_identity(params, data.train, data.validation, masks)
            identity |= {"teacher": teacher_identity(teacher)}
            identity |= {"classes": weights_identity(weights)}
            keeper = stack.enter_context(Checkpoints(checkpoints, identity))
        program = _OneRun(recipe, params, data, seed, masks, teacher, weights, devices)
        report = None if on_epoch is None else lambda _, epoch, found: on_epoch(epoch, found)
        state, (record,), (failure,) = run_epochs(program, options, keeper, report, on_share)
        if failure is not None:
            raise InputError(failure)
        best = state["best"] if devices is None else jax.device_get(state["best"])
        result = TrainResult(best, best_epoch(record), record)
        if on_result is not None:
            on_result(result)
    return result


# Of networks that are the user's own, only their forward knows what it takes.
_SHAPES = {backbone.apply: backbone.param_shapes, convnet.apply: convnet.param_shapes}


def check_run(
    recipe: Recipe,
    params: Params,
    data: TrainData,
    masks: Params | None,
    teacher: Teacher | None,
) -> None:
    """Refuse what a recipe cannot be trained on.

    Raises:
      InputError: no images or ones that the source does not have, no teacher to distil, labels
        missing or beyond the network's classes where they are read, parameters or masks of another
        network, networks without the features or layers that the recipe names, or a shift by as
        much as an image's side.
    """
    options, source = recipe.options, data.source
    for use, wanted in (
        ("distill > 0", options.distill > 0),
        ("feature_distill > 0", options.feature_distill > 0),
        ("choose='teacher'", options.choose == "teacher"),
    ):
        if wanted and teacher is None:
            raise InputError(f"{use} needs a teacher")
    if recipe.forward in _SHAPES:
        shapes = _SHAPES[recipe.forward](recipe.config)
        check_params(shapes, params)
        if masks is not None:
            check_masks(shapes, masks)
    if teacher is not None and teacher.forward in _SHAPES:
        check_params(_SHAPES[teacher.forward](teacher.config), teacher.params, "teacher")
    if options.feature_distill > 0:
        check_features(recipe.forward, recipe.config, teacher, options.feature_blocks)
    if options.shift >= data.preprocess.image_size:
        raise InputError(
            f"shift is {options.shift}, expected less than the images' side of "
            f"{data.preprocess.image_size}"
        )
    if options.layer_decay < 1:
        layer_factors(recipe.config, params, options.layer_decay)
    learned, chosen = (check_indices(found, source) for found in (data.train, data.validation))
    if options.epochs > 0 and len(learned) == 0:
        raise InputError("training needs at least one image")
    if len(chosen) == 0:
        raise InputError("evaluation needs at least one example")
    count = class_count(recipe, params, data.preprocess)
    if options.distill < 1:
        missing = "training on labels needs labels; without them set distill to 1.0"
        _check_labels(source, learned, count, missing)
    if options.choose == "labels":
        missing = "evaluation needs labels, found images without one"
        _check_labels(source, chosen, count, missing)


def _check_labels(
    source: ImageSource, indices: Int[np.ndarray, "n"], count: int, missing: str
) -> None:
    labels = source.labels[indices]
    if (labels < 0).any():
        raise InputError(missing)
    if (labels >= count).any():
        raise InputError(
            f"{source.name}: label {labels.max()} is beyond the network's classes, expected 0 to "
            f"{count - 1}"
        )


def run_weights(
    options: TrainConfig,
    data: TrainData,
    classes: Shaped[np.ndarray, "c"] | None,
    prior: Float[np.ndarray, "c"] | None,
    count: int,
) -> ClassWeights:
    """Weights of a run's classes, of so many.

    Raises:
      InputError: classes that nothing would use, or classes or a prior that are not the network's.
    """
    source = data.source
    if classes is not None and not options.asks_teacher:
        raise InputError("classes: nothing uses it, expected distill > 0 or choose='teacher'")
    # Labels that the recipe does not read must not make a difference.
    learned = data.train if options.distill < 1 else None
    chosen = data.validation if options.choose == "labels" else None
    read = [
        None if found is None or len(found) == 0 else source.labels[check_indices(found, source)]
        for found in (learned, chosen)
    ]
    return class_weights(classes, prior, count, *read)


def weights_identity(weights: ClassWeights | None) -> list[list[float]] | None:
    """What checkpoints keep of a run's weights."""
    return None if weights is None else [found.tolist() for found in weights]


def class_count(recipe: Recipe, params: Params, preprocess: Preprocess) -> int:
    """How many classes a network tells apart, without running it."""
    if recipe.forward in _SHAPES:
        return recipe.config.num_classes
    side = preprocess.image_size
    image = jax.ShapeDtypeStruct((1, side, side, preprocess.channels), np.float32)
    return jax.eval_shape(functools.partial(recipe.forward, recipe.config), params, image).shape[-1]


def epoch_order(
    options: TrainConfig, indices: Int[np.ndarray, "n"], seed: int, epoch: int
) -> Int[np.ndarray, "k"]:
    """The images of an epoch in their order: a function of the seed and the epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(indices)
    return order[: options.images_in_epoch(len(indices))]


def run_identity(
    params: Params,
    train: Int[np.ndarray, "n"],
    validation: Int[np.ndarray, "m"],
    masks: Params | None,
) -> dict[str, Any]:
    """What tells one run from another, long things as hashes."""
    return {
        "train": content_hash(np.asarray(train).tolist()),
        "validation": content_hash(np.asarray(validation).tolist()),
        "params": tree_hash(params),
        "masks": None if masks is None else tree_hash(masks),
    }


def teacher_identity(teacher: Teacher | None) -> dict[str, Any] | None:
    """What tells one teacher from another."""
    return teacher and {"config": to_plain(teacher.config), "params": tree_hash(teacher.params)}


def key_data(seed: int) -> np.ndarray:
    """A random key as plain numbers, which every process can hand to a program of all.

    Raises:
      InputError: a seed outside 0 to 2^32 - 1, which NumPy or JAX may not take.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, expected 0 to 2^32 - 1")
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def all_devices(mesh: Mesh | None) -> list[jax.Device]:
    """The devices of a mesh in process order; None is all there are.

    Raises:
      InputError: a mesh that leaves out processes.
    """
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    found = {device.process_index for device in devices}
    if len(found) != distributed.process_count():
        raise InputError(
            f"mesh: has devices of {len(found)} processes, expected all "
            f"{distributed.process_count()}"
        )
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def even_devices(devices: list[jax.Device], most: int) -> list[jax.Device]:
    """As many devices of every process: at most `most`, and no more than each of them has."""
    own: dict[int, list[jax.Device]] = {}
    for device in devices:
        own.setdefault(device.process_index, []).append(device)
    each = min(most, *map(len, own.values()))
    return [device for found in own.values() for device in found[:each]]


def _devices(mesh: Mesh | None, batch_size: int) -> list[jax.Device] | None:
    processes = distributed.process_count()
    if mesh is None and processes == 1 and accelerator_mesh() is None:
        return None
    devices = all_devices(mesh)
    if mesh is None:
        each = len(even_devices(devices, len(devices))) // processes
        rows = batch_size // processes
        devices = even_devices(devices, max(n for n in range(1, each + 1) if rows % n == 0))
    if batch_size % len(devices):
        raise InputError(
            f"batch_size is {batch_size}, expected a multiple of the {len(devices)} devices"
        )
    return devices


class _OneRun(Program):
    """One run: on one device, or its batches spread over several and its parameters on all."""

    def __init__(
        self,
        recipe: Recipe,
        params: Params,
        data: TrainData,
        seed: int,
        masks: Params | None,
        teacher: Teacher | None,
        weights: ClassWeights | None,
        devices: list[jax.Device] | None,
    ):
        self._recipe, self._data, self._seed = recipe, data, seed
        self._key = key_data(seed)
        self._params, self._masks = params, masks
        self._teacher_params = teacher.params if teacher else None
        self._own_weights = self._weights = weights
        self._reference = teacher if recipe.options.choose == "teacher" else None
        self._schedule = np.asarray(recipe.options.schedule_steps(len(data.train)), np.float32)
        self.steps = (recipe.options.steps_per_epoch(len(data.train)),)
        self._mesh = self._local_mesh = None
        if devices is not None:
            own = [d for d in devices if d.process_index == distributed.process_index()]
            self._mesh, self._local_mesh = data_mesh(devices), data_mesh(own)
            fixed = (self._masks, self._teacher_params, self._weights, self._schedule, self._key)
            self._masks, self._teacher_params, self._weights, self._schedule, self._key = (
                self._copy_to_all(fixed)
            )
            if self._reference is not None:
                local = _local_copies(self._teacher_params, self._local_mesh)
                self._reference = dataclasses.replace(self._reference, params=local)

    def _copy_to_all(self, tree: Any) -> Any:
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
        )

    def initial(self) -> State:
        params = self._params
        if self._mesh is not None:
            params = self._copy_to_all(params)
        if self._masks is not None:
            params = jax.tree.map(lambda p, m: p * m, params, self._masks)
        rest = initial_rest(self._recipe.options, params, self.steps[0])
        if self._mesh is not None:
            rest = self._copy_to_all(rest)
        state = {"params": params, "best": params, "rest": rest}
        # Bound to their device, as a checkpoint's are: a run that continues need not compile anew.
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jnp.asarray(leaf).sharding), state)

    def batches(
        self, epoch: int, first: int, alive: Bool[np.ndarray, "r"]
    ) -> Iterator[dict[str, Any]]:
        data, options = self._data, self._recipe.options
        order = epoch_order(options, data.train, self._seed, epoch)
        part = (0, 1)
        if self._mesh is not None:
            part = (distributed.process_index(), distributed.process_count())
        for batch in batches(
            data.source,
            order,
            data.preprocess,
            options.batch_size,
            workers=data.workers,
            start=first,
            part=part,
        ):
            batch = {name: batch[name] for name in KEYS}
            if self._mesh is not None:
                sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
                place = functools.partial(jax.make_array_from_process_local_data, sharding)
                batch = {name: place(array) for name, array in batch.items()}
            yield batch

    def step(
        self,
        state: State,
        batch: dict[str, Any],
        epoch: int,
        i: int,
        alive: Bool[np.ndarray, "r"],
    ) -> State:
        params, rest = _step(
            self._recipe,
            state["params"],
            state["rest"],
            batch,
            self._masks,
            self._teacher_params,
            self._weights,
            self._schedule,
            self._key,
            np.int32(epoch),
            np.int32(i),
        )
        return {"params": params, "best": state["best"], "rest": rest}

    def losses(self, state: State) -> Float[np.ndarray, "1 steps"]:
        return np.asarray(state["rest"]["losses"])[None]

    def measure(self, state: State, alive: Bool[np.ndarray, "r"]) -> list[Metrics]:
        params, data = evaluated(state), self._data
        if self._mesh is not None:
            params = _local_copies(params, self._local_mesh)
        return [
            evaluate_indices(
                self._recipe.config,
                params,
                data.source,
                data.validation,
                data.preprocess,
                self._recipe.options.batch_size,
                self._recipe.forward,
                teacher=self._reference,
                weights=self._own_weights,
                mesh=self._local_mesh,
                workers=data.workers,
            )
        ]

    def keep_best(self, state: State, improved: Bool[np.ndarray, "r"]) -> State:
        if not improved[0]:
            return state
        # The average is copied: the next step takes its memory for the next one.
        best = state["params"]
        if "ema" in state["rest"]:
            best = jax.tree.map(jnp.copy, state["rest"]["ema"])
        return state | {"best": best}


def _local_copies(params: Params, mesh: Mesh) -> Params:
    """Parameters that lie on all devices of all processes, as arrays of this process alone."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.make_array_from_single_device_arrays(
            leaf.shape, sharding, [shard.data for shard in leaf.addressable_shards]
        ),
        params,
    )
