"""The path of one device, from its images to a smaller model, as functions that programs share."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from tapvit_jax import distributed
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.export.check import exact_logits
from tapvit_jax.importance.criteria import CriterionConfig, criterion, unit_importance
from tapvit_jax.importance.layers import LayerConfig, LayerScores, layer_importance
from tapvit_jax.importance.neurons import Method as Composite
from tapvit_jax.importance.neurons import NeuronConfig, Scores, neuron_importance
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model, preprocess_of
from tapvit_jax.prune.allocate import AllocateConfig, allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost, images_at_once
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.prune.mask import Plan, apply_masks, param_masks, unit_masks
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.structs import check_fields
from tapvit_jax.timing import Latency, take_turns
from tapvit_jax.train.evaluate import Metrics, evaluate_indices


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """How units and layers are scored and widths chosen.

    Attributes:
      neurons: how units are ranked.
      layers: how layers are probed.
      allocate: how widths follow from the layers' scores and the budget.
      batch_size: images in a scoring batch; the kernels compare images within a batch.
      criterion: name in `CRITERIA` that ranks the units instead of `neurons`, of which only
        `max_batches` then counts; None is what `neurons` says.
      deletion_images: how many images a criterion reads that deletes every unit in turn
        (single_channel_kl); each costs a forward pass a unit.
    """

    neurons: NeuronConfig = NeuronConfig()
    layers: LayerConfig = LayerConfig()
    allocate: AllocateConfig = AllocateConfig()
    batch_size: int = 64
    criterion: str | None = None
    deletion_images: int = CriterionConfig.max_images

    def __post_init__(self):
        check_fields(self)
        if self.criterion is not None:
            criterion(self.criterion)
        if self.allocate.attention != self.layers.attention:
            raise InputError(
                f"allocate.attention is {self.allocate.attention!r} and layers.attention "
                f"{self.layers.attention!r}, expected the same"
            )
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}, expected 2 or more")
        if self.deletion_images < 1:
            raise InputError(f"deletion_images is {self.deletion_images}, expected 1 or more")

    def ranked_by(self, name: str) -> dict[str, Any]:
        """The fields `neurons` and `criterion` that rank units by a criterion of the registry.

        Raises:
          InputError: an unknown criterion.
        """
        if name not in get_args(Composite):
            return {"neurons": self.neurons, "criterion": criterion(name).name}
        neurons = NeuronConfig.of_method(name)
        neurons = dataclasses.replace(neurons, max_batches=self.neurons.max_batches)
        return {"neurons": neurons, "criterion": None}

    @classmethod
    def as_published(cls, probe_sparsity: float = 0.5) -> "PruneConfig":
        """TAP-ViTs as published (arXiv 2601.02437), quirks included."""
        return cls(
            neurons=NeuronConfig.as_published(),
            layers=LayerConfig.as_published((probe_sparsity,)),
            allocate=AllocateConfig.as_published(),
        )


def score(
    model: Model,
    source: ImageSource,
    metric: Int[np.ndarray, "m"],
    config: PruneConfig,
    *,
    seed: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> tuple[Scores, LayerScores | None]:
    """Neuron and layer scores of a model on a metric dataset; None for layers that nothing reads.

    Args:
      model: the dense model.
      source: images.
      metric: indices of the metric dataset.
      config: how units and layers are scored, and by which rule widths will be chosen.
      seed: for the classes that losses draw, and for random scores.
      on_share: called with every share of the work that is done.

    Raises:
      InputError: too few images, images that cannot be read, or labels missing for the criterion.
    """
    preprocess = preprocess_of(model)
    size = even_batch_size(len(metric), config.batch_size)
    count = len(metric) // size
    # Layer probes run the network many times over, neuron scores a few times.
    effort = {"neurons": 4, "layers": 20 if config.allocate.reads_layers else 0}
    most = {"neurons": config.neurons.max_batches, "layers": config.layers.batches_read}
    whole = sum(effort[k] * min(count, most[k]) for k in effort)
    processes = distributed.process_count()

    def metric_batches(kind: str) -> Iterator[dict[str, np.ndarray]]:
        for batch in scoring_batches(source, metric, preprocess, size):
            yield batch
            on_share(effort[kind] * processes / whole)

    units = score_units(model, metric_batches("neurons"), config, seed)
    if not config.allocate.reads_layers:
        return units, None
    return units, layer_importance(model, metric_batches("layers"), units, config=config.layers)


def score_units(
    model: Model, found: Iterable[dict[str, np.ndarray]], config: PruneConfig, seed: int = 0
) -> Scores:
    """Unit scores of batches by the config's criterion, or as its `neurons` say.

    Raises:
      InputError: see `unit_importance`.
    """
    options = CriterionConfig(config.neurons.max_batches, config.deletion_images)
    if config.criterion is None:
        return neuron_importance(model, found, config=config.neurons, seed=seed)
    return unit_importance(model, found, config.criterion, config=options, seed=seed)


def scoring_batches(
    source: ImageSource,
    metric: Int[np.ndarray, "m"],
    preprocess: Preprocess,
    size: int,
    *,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's full batches of a metric dataset; what is left over is not read.

    Kernels compare the images of one batch, so that processes share out whole batches.
    """
    count = len(metric) // size
    shared = np.reshape(metric[: count * size], (count, size))
    own = shared[distributed.process_index() :: distributed.process_count()].ravel()
    return batches(source, own, preprocess, size, workers=workers)


def allocate_measured(
    model: Model,
    units: Scores,
    layers: LayerScores | None,
    budget: Budget,
    latency: LatencyModel,
    *,
    config: AllocateConfig | None = None,
    measure: Callable[[Model, Model], tuple[float, float]],
    rounds: int = 4,
) -> tuple[Plan, dict[str, float]]:
    """Plan under a budget on latency, and keep the promise: measure the result, plan again if slow.

    The latency model only predicts. Where the measured time exceeds the bound, the bound that the
    planner sees is tightened by the excess.

    Args:
      model: the dense model.
      units: neuron scores.
      layers: layer scores; None as in `allocate`.
      budget: with a bound on latency; `latency` is a fraction of the dense time measured here.
      latency: predicts times.
      config: see `allocate`.
      measure: milliseconds of the dense and the pruned model, measured side by side.
      rounds: plans that are tried.

    Returns:
      The plan, and milliseconds dense_ms, pruned_ms and predicted_ms.

    Raises:
      InputError: an infeasible budget, or one that no plan met when measured.

    Source: ours.
    """
    planned, found = budget, None
    for _ in range(rounds):
        try:
            plan = allocate(model, units, layers, planned, config=config, latency=latency)
        except InputError:
            if found is None:
                raise
            break
        small = reshape(model, plan)
        dense_ms, pruned_ms = measure(model, small)
        limit = min(
            budget.latency_ms or np.inf,
            (budget.latency or np.inf) * dense_ms,
        )
        found = {
            "dense_ms": dense_ms,
            "pruned_ms": pruned_ms,
            "predicted_ms": latency.predict(small.config),
            "limit_ms": limit,
        }
        if pruned_ms <= limit:
            return plan, found
        planned = planned.tightened(0.99 * limit / pruned_ms)
    raise InputError(
        f"budget {budget} was not met: the last plan took {found['pruned_ms']:.2f} ms when "
        f"measured, expected at most {found['limit_ms']:.2f} ms"
    )


def even_batch_size(count: int, most: int) -> int:
    """Batch size from most / 2 to `most` that leaves the fewest of `count` images over.

    Kernels compare images within a batch and every batch size is compiled, so that batches should
    be full; what is left over, a few images at most, is not scored.
    """
    if count <= most:
        return max(count, 1)
    return min(range(most, most // 2, -1), key=lambda size: count % size)


def plan_masks(plan: Plan) -> Params:
    """Parameter masks of a plan, of shapes that broadcast against the parameters'.

    Source: ours.
    """
    return param_masks(plan.config, unit_masks(plan))


def reshape_checked(
    model: Model, plan: Plan, images: Float[Array, "b s s ch"], tolerance: float = 1e-4
) -> tuple[Model, float]:
    """Reshape, and prove on real images that nothing changed.

    Both models are compared in float32: coarser products round what they sum up in another order.

    Returns:
      The smaller model and the largest difference of its logits to the masked model's, relative to
      the largest logit.

    Raises:
      RuntimeError: the outputs differ by more than `tolerance`; a bug, not bad input.
    """
    small = reshape(model, plan)
    masked = exact_logits(apply_masks(model, plan), images)
    difference = float(np.abs(masked - exact_logits(small, images)).max())
    relative = difference / max(1.0, float(np.abs(masked).max()))
    if not relative <= tolerance:
        raise RuntimeError(f"masked and reshaped outputs differ by {relative:.2e} of the scale")
    return small, relative


def evaluate_model(
    model: Model,
    source: ImageSource,
    indices: Int[np.ndarray, "n"],
    batch_size: int | None = None,
    *,
    workers: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> Metrics:
    """Top-1 of a model on some images of a source, every one counted once on any number of hosts.

    `batch_size` images at a time, by default as many as take little enough memory (see
    `images_at_once`). `on_share` is called with every share of the work that is done.

    Raises:
      InputError: no images, images without labels, or a model without preprocessing.

    Source: ours.
    """
    preprocess = preprocess_of(model)
    return evaluate_indices(
        model.config,
        model.params,
        source,
        indices,
        preprocess,
        images_at_once(model.config, len(indices)) if batch_size is None else batch_size,
        workers=workers,
        on_share=on_share,
    )


def summary(model: Model) -> dict[str, Any]:
    """Cost and widths of a model, for tables."""
    found = cost(model.config)
    return dataclasses.asdict(found) | {
        "widths": [dataclasses.asdict(block) for block in model.config.blocks]
    }


def latencies(models: dict[str, Model], batch_size: int, repeats: int = 30) -> dict[str, Latency]:
    """Time forward passes of several models in JAX on this machine, see `take_turns`."""
    runs = {}
    for name, model in models.items():
        side = model.config.image_size
        images = jax.random.normal(
            jax.random.key(0), (batch_size, side, side, model.config.in_channels)
        )
        runs[name] = lambda model=model, images=images: model.apply(images).block_until_ready()
    return take_turns(runs, repeats=repeats)
