"""Exact evaluation: every example counts once, whatever the batch size and number of hosts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tapvit_jax import distributed
from tapvit_jax.data.base import ImageSource, check_indices
from tapvit_jax.data.pipeline import batches as read_batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params
from tapvit_jax.sharding import accelerator_mesh, fetch_ahead, replicate, shard_rows
from tapvit_jax.train.classes import ClassWeights, class_logits, teacher_logits

Forward = Callable[[Any, Params, Float[Array, "b s s ch"]], Float[Array, "b c"]]
"""Logits from (config, params, images)."""

KEYS = ("image", "label", "mask")
"""What a network sees of a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A fixed network whose soft labels the student learns.

    Attributes:
      config: the network's config.
      params: its parameters.
      forward: logits from (config, params, images).
    """

    config: Any
    params: Params
    forward: Forward = backbone.apply


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Result of an evaluation.

    Attributes:
      top1: share of examples whose highest logit is their class; of a comparison with a teacher,
        whose highest logit is the teacher's.
      loss: mean cross-entropy; of a comparison, mean KL(teacher || network).
      count: examples evaluated. With `ClassWeights`, they count as much as their class does in
        shares and means, and this is the sum of that.
    """

    top1: float
    loss: float
    count: int

    @classmethod
    def of_sums(cls, sums: Float[np.ndarray, "4"]) -> "Metrics":
        """Metrics from sums as `batch_sums` makes them.

        Raises:
          InputError: no examples, or a label that the network does not have.
        """
        correct, loss, count, foreign = map(float, sums)
        if count == 0:
            raise InputError("evaluation needs at least one example")
        if foreign:
            raise InputError(
                f"{round(foreign)} of {round(count)} labels are beyond the network's classes"
            )
        return cls(top1=correct / count, loss=loss / count, count=round(count))


def batch_sums(
    forward: Forward,
    config: Any,
    params: Params,
    batch: Mapping[str, Array],
    weights: ClassWeights | None = None,
) -> Float[Array, "4"]:
    """Sums over a batch: correct, cross-entropy, examples, labels that the network lacks.

    With `weights`, an example counts as much as its class does in validation.
    """
    logits = forward(config, params, batch["image"]).astype(jnp.float32)
    labels, mask = batch["label"], batch["mask"]
    counted = mask if weights is None else mask * weights.validation[labels]
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    foreign = labels >= logits.shape[-1]
    sums = [(values * counted).sum() for values in (correct, loss, jnp.ones(()))]
    return jnp.stack([*sums, (foreign * mask).sum()])


def agreement_sums(
    forward: Forward,
    config: Any,
    params: Params,
    batch: Mapping[str, Array],
    teacher: tuple[Forward, Any],
    teacher_params: Params,
    weights: ClassWeights | None,
) -> Float[Array, "4"]:
    """As `batch_sums` with a teacher for the labels: agreeing, KL(teacher || network), examples, 0.

    Labels are not read. Source: ours.
    """
    teacher_forward, teacher_config = teacher
    logits = class_logits(forward(config, params, batch["image"]), weights and weights.classes)
    wanted = teacher_forward(teacher_config, teacher_params, batch["image"])
    wanted = teacher_logits(wanted, weights)
    log_p, log_t = jax.nn.log_softmax(logits), jax.nn.log_softmax(wanted)
    kl = (jnp.exp(log_t) * (log_t - log_p)).sum(axis=-1)
    agrees = (logits.argmax(axis=-1) == wanted.argmax(axis=-1)).astype(jnp.float32)
    mask = batch["mask"]
    return jnp.stack([(agrees * mask).sum(), (kl * mask).sum(), mask.sum(), jnp.zeros(())])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(
    forward: Forward, config: Any, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b c"]:
    return jax.nn.softmax(forward(config, params, images).astype(jnp.float32))


_batch_sums = jax.jit(batch_sums, static_argnums=(0, 1))
_agreement_sums = jax.jit(agreement_sums, static_argnums=(0, 1, 4))


def evaluate(
    config: Any,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    forward: Forward = backbone.apply,
    *,
    teacher: Teacher | None = None,
    weights: ClassWeights | None = None,
    mesh: Mesh | None = None,
    shared: bool = False,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Metrics:
    """Top-1 and cross-entropy over batches with keys "image", "label" and "mask".

    Args:
      config: the network's config.
      params: its parameters.
      batches: the examples; padding has mask 0.
      forward: logits from (config, params, images).
      teacher: stands for the labels, which are not read then (see `Metrics`).
      weights: of the classes in that comparison, or of the labels where the epoch is chosen;
        None is one for each.
      mesh: devices of this process over which the rows of a batch are spread; None is one device.
      shared: `batches` are this process's share of the examples; sums are added over all processes.
      on_batch: called with the number of examples of every batch that is done.

    Raises:
      InputError: no examples, or an example without a label or with one that the network does not
        have; on every process where the examples are shared out.
    """
    if mesh is not None:
        params = replicate(params, mesh)
        if teacher is not None:
            teacher = dataclasses.replace(teacher, params=replicate(teacher.params, mesh))
    sums, unlabelled = np.zeros(4), False

    def steps() -> Iterator[tuple[Array, int]]:
        nonlocal unlabelled
        for batch in batches:
            real = np.asarray(batch["mask"]) > 0
            unlabelled = teacher is None and bool((np.asarray(batch["label"])[real] < 0).any())
            if unlabelled:
                return
            batch = {name: batch[name] for name in KEYS}
            if mesh is not None:
                batch = {name: shard_rows(array, mesh)[0] for name, array in batch.items()}
            if teacher is None:
                found = _batch_sums(forward, config, params, batch, weights)
            else:
                network = (teacher.forward, teacher.config)
                found = _agreement_sums(
                    forward, config, params, batch, network, teacher.params, weights
                )
            yield found, int(real.sum())

    for found, count in fetch_ahead(steps()):
        sums += found
        on_batch(count)
    sums = np.append(sums, unlabelled)
    if shared:
        sums = distributed.sum_over_processes(sums)
    if sums[-1]:
        raise InputError("evaluation needs labels, found images without one")
    return Metrics.of_sums(sums[:-1])


def predict(
    network: Teacher,
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    batch_size: int,
    *,
    mesh: Mesh | None = None,
    workers: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> Float[np.ndarray, "n c"]:
    """Class probabilities of images of a source, for what `classes` makes of them; without labels.

    Every process reads its own share of the images, and all of them return the same. `mesh` and
    `on_share` are as for `evaluate_indices`.

    Raises:
      InputError: no images, one that cannot be read, or a number out of range.

    Source: ours.
    """
    indices = check_indices(indices, source)
    if len(indices) == 0:
        raise InputError("prediction needs at least one image")
    own = distributed.share(len(indices))
    mesh = accelerator_mesh() if mesh is None else mesh
    params = network.params if mesh is None else replicate(network.params, mesh)
    run = functools.partial(_probabilities, network.forward, network.config, params)

    def steps() -> Iterator[tuple[Array, np.ndarray]]:
        for batch in read_batches(
            source, indices[own.start : own.stop], preprocess, batch_size, workers=workers
        ):
            images = batch["image"] if mesh is None else shard_rows(batch["image"], mesh)[0]
            yield run(images), np.asarray(batch["mask"]) > 0

    rows = []
    for probabilities, real in fetch_ahead(steps()):
        rows.append(probabilities[: len(real)][real])
        on_share(len(rows[-1]) / len(own))
    sent = np.concatenate(rows).tobytes() if rows else b""
    everything = np.frombuffer(b"".join(distributed.gather_bytes(sent)), np.float32)
    return everything.reshape(len(indices), -1)


def evaluate_indices(
    config: Any,
    params: Params,
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    batch_size: int,
    forward: Forward = backbone.apply,
    *,
    teacher: Teacher | None = None,
    weights: ClassWeights | None = None,
    mesh: Mesh | None = None,
    workers: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> Metrics:
    """Top-1 and cross-entropy over images of a source, on any number of hosts.

    Every process reads and evaluates its own share of the images, `batch_size` at a time, and all
    of them return the same. `teacher`, `weights` and `mesh` are as for `evaluate`, but without a
    mesh all accelerators of a process are used. `on_share` is called with every share of this
    process's images that is done.

    Raises:
      InputError: as `evaluate`, or an image cannot be read.
    """
    indices = check_indices(indices, source)
    own = distributed.share(len(indices))
    found = read_batches(
        source, indices[own.start : own.stop], preprocess, batch_size, workers=workers
    )
    return evaluate(
        config,
        params,
        found,
        forward,
        teacher=teacher,
        weights=weights,
        mesh=accelerator_mesh() if mesh is None else mesh,
        shared=distributed.process_count() > 1,
        on_batch=lambda count: on_share(count / len(own)),
    )
