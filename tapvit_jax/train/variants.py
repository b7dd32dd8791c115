"""Many runs of one recipe in one program: the variants' axis is vmapped and sharded."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from tapvit_jax import distributed
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params
from tapvit_jax.sharding import Backlog
from tapvit_jax.stages import Scratch
from tapvit_jax.structs import to_plain
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.classes import ClassWeights
from tapvit_jax.train.evaluate import Forward, Metrics, Teacher, agreement_sums, batch_sums
from tapvit_jax.train.finetune import (
    TrainData,
    all_devices,
    check_run,
    class_count,
    epoch_order,
    even_devices,
    key_data,
    run_identity,
    run_weights,
    teacher_identity,
    weights_identity,
)
from tapvit_jax.train.loop import Program, State, TrainResult, best_epoch, run_epochs
from tapvit_jax.train.step import Recipe, TrainConfig, evaluated, initial_rest, update

AXIS = "variants"
_ONE, _ALL = PartitionSpec(AXIS), PartitionSpec()


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One run among many: its own start, data, masks and seed.

    Attributes:
      params: where to start; all variants have the same shapes.
      train: indices to train on.
      validation: indices that choose the epoch.
      masks: parameter masks (see `prune.mask.param_masks`), or None.
      seed: for the order of the images and their augmentation.
      classes: a mask or weights of the device's likely classes (see `finetune.train`), or None.
      prior: how much likelier each class is on the device (see `finetune.train`), or None.
    """

    params: Params
    train: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "m"]
    masks: Params | None = None
    seed: int = 0
    classes: Shaped[np.ndarray, "c"] | None = None
    prior: Float[np.ndarray, "c"] | None = None


def train_variants(
    config: Any,
    variants: Sequence[Variant],
    source: ImageSource,
    preprocess: Preprocess,
    options: TrainConfig,
    *,
    forward: Forward = backbone.apply,
    teacher: Teacher | None = None,
    mesh: Mesh | None = None,
    workers: int = 0,
    checkpoints: Path | Scratch | None = None,
    on_epoch: Callable[[int, int, Metrics], None] | None = None,
    on_share: Callable[[float], None] = lambda share: None,
    on_results: Callable[[list[TrainResult | InputError]], None] | None = None,
) -> list[TrainResult | InputError]:
    """Train many variants at once; each ends as `train` alone would end it, but for rounding.

    Every variant has its own order of images, number of steps, schedule, best epoch and early
    stopping. One that has finished or diverged stays as it is while the others go on. Every device
    holds its share of the variants, and every process reads the images of its own variants alone.

    Args:
      config: the network's config, the same for all.
      variants: the runs.
      source: where all images come from.
      preprocess: how they become the network's input.
      options: the recipe, the same for all.
      forward: logits from (config, params, images).
      teacher: as for `train`, the same for all.
      mesh: the devices to use, of all processes; None is all there are.
      workers: processes that decode images (see `data.pipeline.batches`).
      checkpoints: directory of the checkpoints, as for `train`; they go when all variants are done.
      on_epoch: called after every epoch with (variant, epoch, validation metrics).
      on_share: called with every share of the work that is done, after every step of all.
      on_results: called with what is returned, as `train`'s `on_result`.

    Returns:
      results of all variants, in order, on every process; parameters are NumPy arrays. One whose
      loss is no longer finite has in its place the error that `train` would raise.

    Raises:
      InputError: as `train` but for the loss, or variants of different shapes.

    Source: ours.
    """
    if not variants:
        return []
    recipe = Recipe.of(forward, config, options, teacher)
    _check_variants(variants, source, preprocess, recipe, teacher)
    weights = _common_weights(variants, recipe, source, preprocess)
    with contextlib.ExitStack() as stack:
        keeper = None
        if checkpoints is not None:
            identity = {
                "options": options.identity(),
                "config": to_plain(config),
                "source": source.fingerprint(),
                "preprocess": to_plain(preprocess),
                "teacher": teacher_identity(teacher),
                "variants": {
                    str(v): run_identity(one.params, one.train, one.validation, one.masks)
                    | {
                        "seed": one.seed,
                        "classes": weights_identity(weights and weights[v]),
                    }
                    for v, one in enumerate(variants)
                },
            }
            keeper = stack.enter_context(Checkpoints(checkpoints, identity))
        teacher_params = teacher.params if teacher else None
        devices = all_devices(mesh)
        program = _ManyRuns(
            recipe, variants, source, preprocess, teacher_params, weights, devices, workers
        )
        state, records, failed = run_epochs(program, options, keeper, on_epoch, on_share)
        best = program.to_host(state["best"])
        results = [
            TrainResult(jax.tree.map(lambda leaf, v=v: leaf[v], best), best_epoch(record), record)
            if failure is None
            else InputError(failure)
            for v, (record, failure) in enumerate(zip(records, failed, strict=True))
        ]
        if on_results is not None:
            on_results(results)
    return results


def _check_variants(
    variants: Sequence[Variant],
    source: ImageSource,
    preprocess: Preprocess,
    recipe: Recipe,
    teacher: Teacher | None,
) -> None:
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), v.params) for v in variants]
    for v, variant in enumerate(variants):
        if shapes[v] != shapes[0]:
            raise InputError(f"variant {v}: has parameters of other shapes than variant 0")
        data = TrainData(source, preprocess, variant.train, variant.validation)
        # Seen by all processes at once, before any of them waits for the others.
        try:
            check_run(recipe, variant.params, data, variant.masks, teacher)
        except InputError as error:
            raise InputError(f"variant {v}: {error}") from error


def _step_all(
    recipe: Recipe,
    params: Params,
    rest: dict[str, Any],
    batch: dict[str, Array],
    fixed: dict[str, Any],
    alive: Bool[Array, "v"],
    teacher_params: Params | None,
    epoch: Int[Array, ""],
    i: Int[Array, ""],
) -> tuple[Params, dict[str, Any]]:
    def one(params: Params, rest: Any, batch: Any, fixed: Any, alive: Array) -> Any:
        given = (fixed["masks"], teacher_params, fixed["weights"], fixed["schedule"], fixed["key"])
        after = update(recipe, params, rest, batch, *given, epoch, i)
        moves = alive & (i < fixed["steps"])
        return jax.tree.map(lambda new, old: jnp.where(moves, new, old), after, (params, rest))

    return jax.vmap(one)(params, rest, batch, fixed, alive)


def _sums_all(
    recipe: Recipe,
    params: Params,
    batch: dict[str, Array],
    weights: ClassWeights | None,
    teacher_params: Params | None,
) -> Float[Array, "v 4"]:
    def one(params: Params, batch: Any, weights: ClassWeights | None) -> Array:
        if recipe.options.choose == "labels":
            return batch_sums(recipe.forward, recipe.config, params, batch, weights)
        against = (recipe.teacher, teacher_params, weights)
        return agreement_sums(recipe.forward, recipe.config, params, batch, *against)

    return jax.vmap(one)(params, batch, weights)


@dataclasses.dataclass(frozen=True)
class _Programs:
    step: Callable[..., Any]
    sums: Callable[..., Any]
    first_rest: Callable[..., Any]
    keep: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _programs(recipe: Recipe, mesh: Mesh, steps: int) -> _Programs:
    """Everything that is compiled, kept so that the next variants of a recipe find it."""
    # Neither data nor parameters leave their device: variants know nothing of one another.
    spread = functools.partial(jax.shard_map, mesh=mesh, out_specs=_ONE, check_vma=False)
    step = spread(
        functools.partial(_step_all, recipe),
        in_specs=(_ONE, _ONE, _ONE, _ONE, _ONE, _ALL, _ALL, _ALL),
    )
    sums = spread(functools.partial(_sums_all, recipe), in_specs=(_ONE, _ONE, _ONE, _ALL))
    first_rest = functools.partial(initial_rest, recipe.options, steps=steps)

    def keep(better: Array, new: Params, old: Params) -> Params:
        return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, old)

    return _Programs(
        step=jax.jit(step, donate_argnums=1),
        sums=jax.jit(sums),
        first_rest=jax.jit(spread(jax.vmap(first_rest), in_specs=_ONE)),
        keep=jax.jit(spread(jax.vmap(keep), in_specs=_ONE)),
    )


class _ManyRuns(Program):
    """Arrays with an axis of variants in front, spread over the devices.

    Places beyond the last variant, which fill up the devices, repeat the first and never live.
    """

    def __init__(
        self,
        recipe: Recipe,
        variants: Sequence[Variant],
        source: ImageSource,
        preprocess: Preprocess,
        teacher_params: Params | None,
        weights: list[ClassWeights] | None,
        devices: list[jax.Device],
        workers: int,
    ):
        self._recipe, self._variants, self._workers = recipe, variants, workers
        self._source, self._preprocess = source, preprocess
        options = recipe.options
        self.steps = [options.steps_per_epoch(len(v.train)) for v in variants]
        # Not more devices of a process than its variants need: idle copies cost time.
        processes = distributed.process_count()
        devices = even_devices(devices, -(-len(variants) // processes))
        mesh = Mesh(np.asarray(devices, dtype=object), (AXIS,))
        self._sharding = NamedSharding(mesh, _ONE)
        places = -(-len(variants) // len(devices)) * len(devices)
        share = places // processes
        self._places = range(
            share * distributed.process_index(), share * (distributed.process_index() + 1)
        )
        self._programs = _programs(recipe, mesh, max(self.steps))
        self._teacher_params = jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(
                NamedSharding(mesh, _ALL), np.asarray(leaf)
            ),
            teacher_params,
        )
        masks = _common_masks(variants)
        self._fixed = self._stack(
            lambda v: {
                "masks": masks and masks[v],
                "weights": weights and weights[v],
                "schedule": np.asarray(options.schedule_steps(len(variants[v].train)), np.float32),
                "key": key_data(variants[v].seed),
                "steps": np.int32(self.steps[v]),
            }
        )

    def _stack(self, of_variant: Callable[[int], Any]) -> Any:
        """This process's variants as one tree, spread over all devices."""
        count = len(self._variants)
        trees = [of_variant(place if place < count else 0) for place in self._places]
        return self._place(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))

    def _place(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._sharding, leaf), tree
        )

    def _flags(self, values: Bool[np.ndarray, "r"]) -> Array:
        flags = np.array([v < len(values) and values[v] for v in self._places], bool)
        return self._place(flags)

    def to_host(self, tree: Any) -> Any:
        """The arrays of all variants, on every process."""

        def fetch(leaf: Array) -> np.ndarray:
            shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            own = np.concatenate([np.asarray(shard.data) for shard in shards])
            if own.size == 0:
                return np.zeros((len(self._variants), *leaf.shape[1:]), leaf.dtype)
            everything = distributed.gather(own).reshape(-1, *leaf.shape[1:])
            return everything[: len(self._variants)]

        return jax.tree.map(fetch, tree)

    def initial(self) -> State:
        def start(v: int) -> Params:
            variant = self._variants[v]
            params = jax.tree.map(np.asarray, variant.params)
            if variant.masks is None:
                return params
            return jax.tree.map(lambda p, m: p * np.asarray(m), params, variant.masks)

        params = self._stack(start)
        return {"params": params, "best": params, "rest": self._programs.first_rest(params)}

    def batches(
        self, epoch: int, first: int, alive: Bool[np.ndarray, "r"]
    ) -> Iterator[dict[str, Any]]:
        options = self._recipe.options
        orders = {
            v: epoch_order(options, variant.train, variant.seed, epoch)
            for v, variant in enumerate(self._variants)
            if alive[v]
        }
        yield from self._read(orders, first)

    def _read(
        self, orders: dict[int, Int[np.ndarray, "n"]], first: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches of all variants side by side, from a step on; who has no more gets padding."""
        width = self._recipe.options.batch_size
        longest = max(-(-len(order) // width) for order in orders.values())
        own = [orders.get(place, np.zeros(0, np.int64)) for place in self._places]
        steps = [
            [order[i * width : (i + 1) * width] for order in own] for i in range(first, longest)
        ]
        wanted = [np.concatenate(chunks) for chunks in steps]
        stream = batches(
            self._source,
            np.concatenate(wanted) if wanted else np.zeros(0, np.int64),
            self._preprocess,
            width * len(own),
            remainder="short",
            workers=self._workers,
        )
        counts = [len(indices) for indices in wanted]
        images = regroup((batch["image"] for batch in stream), counts)
        side, channels = self._preprocess.image_size, self._preprocess.channels
        for chunks, indices, found in zip(steps, wanted, images, strict=True):
            mask = np.zeros((len(own), width), bool)
            for row, chunk in enumerate(chunks):
                mask[row, : len(chunk)] = True
            image = np.zeros((*mask.shape, side, side, channels), np.float32)
            label = np.zeros(mask.shape, np.int32)
            if len(indices):
                image[mask], label[mask] = found, self._source.labels[indices]
            yield self._place({"image": image, "label": label, "mask": np.float32(mask)})

    def step(
        self,
        state: State,
        batch: dict[str, Any],
        epoch: int,
        i: int,
        alive: Bool[np.ndarray, "r"],
    ) -> State:
        params, rest = self._programs.step(
            state["params"],
            state["rest"],
            batch,
            self._fixed,
            self._flags(alive),
            self._teacher_params,
            np.int32(epoch),
            np.int32(i),
        )
        return {"params": params, "best": state["best"], "rest": rest}

    def losses(self, state: State) -> Float[np.ndarray, "r steps"]:
        return self.to_host(state["rest"]["losses"])

    def measure(self, state: State, alive: Bool[np.ndarray, "r"]) -> list[Metrics | None]:
        orders = {
            v: np.asarray(variant.validation)
            for v, variant in enumerate(self._variants)
            if alive[v]
        }
        total, backlog = None, Backlog()
        for batch in self._read(orders):
            found = self._programs.sums(
                evaluated(state), batch, self._fixed["weights"], self._teacher_params
            )
            total = found if total is None else total + found
            backlog.sent(batch, total)
        sums = self.to_host(total)
        return [Metrics.of_sums(sums[v]) if alive[v] else None for v in range(len(alive))]

    def keep_best(self, state: State, improved: Bool[np.ndarray, "r"]) -> State:
        best = self._programs.keep(self._flags(improved), evaluated(state), state["best"])
        return state | {"best": best}


def _common_masks(variants: Sequence[Variant]) -> list[Params] | None:
    """Masks of one shape for all variants, ones where a variant has none; None if none has any."""
    given = [v.masks for v in variants if v.masks is not None]
    if not given:
        return None
    ones = jax.tree.map(lambda leaf: np.ones((), np.float32), given[0])
    trees = [ones if v.masks is None else v.masks for v in variants]

    def common(*leaves: Any) -> list[np.ndarray]:
        shape = np.broadcast_shapes(*(np.shape(leaf) for leaf in leaves))
        return [np.broadcast_to(np.asarray(leaf, np.float32), shape) for leaf in leaves]

    flat = [jax.tree.leaves(tree) for tree in trees]
    columns = [common(*leaves) for leaves in zip(*flat, strict=True)]
    structure = jax.tree.structure(given[0])
    return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


def _common_weights(
    variants: Sequence[Variant], recipe: Recipe, source: ImageSource, preprocess: Preprocess
) -> list[ClassWeights] | None:
    """Weights of all variants' classes, ones where a variant has none; None if none has any."""
    if all(variant.classes is None and variant.prior is None for variant in variants):
        return None
    count = class_count(recipe, variants[0].params, preprocess)
    found = []
    for v, variant in enumerate(variants):
        data = TrainData(source, preprocess, variant.train, variant.validation)
        told = variant.classes, variant.prior
        try:
            found.append(run_weights(recipe.options, data, *told, count))
        except InputError as error:
            raise InputError(f"variant {v}: {error}") from error
    return found


def regroup(
    stream: Iterable[Float[np.ndarray, "k s s c"]], counts: Iterable[int]
) -> Iterator[Float[np.ndarray, "n s s c"] | None]:
    """Cut a stream of rows into groups of the given sizes; an empty group is None."""
    arrays, held = iter(stream), None
    for count in counts:
        parts, missing = [], count
        while missing:
            if held is None or not len(held):
                held = next(arrays)
            parts.append(held[:missing])
            held = held[missing:]
            missing -= len(parts[-1])
        yield np.concatenate(parts) if parts else None
